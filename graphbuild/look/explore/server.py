"""The explorer's web server: queries go to the store, nothing is loaded whole (catalog.py says what each one reads).

Captions and images are strangers': the page gets captions as JSON and shows them as text, images are encoded anew, and
a strict Content-Security-Policy lets nothing but the page's own files run. Listens on loopback unless asked, and asks
for the token of the address that it prints: loopback is every user's of this machine. There, requests under another
host's name are refused, so that no web page can reach it by DNS.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import ipaddress
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiohttp import web

from graphbuild.errors import ConfigError, GraphbuildError, InputError
from graphbuild.look.catalog import Catalog, Sample
from graphbuild.look.explore.duplicates import duplicates
from graphbuild.look.explore.map import MADE, NodeMap, codes_by, columns_of, free_name, node_map, select_on_map
from graphbuild.look.pages import base_css, own_text
from graphbuild.store.store import Json, Store

logger = logging.getLogger(__name__)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
SCRIPTS = ("page.js", "map.js", "select.js", "duplicates.js")
PIXELS = 384
MOST = 200  # neighbours or results of a request
LONGEST = 10_000  # characters of a text to search for
DIGITS = 18  # of a number
PATIENCE = 5  # seconds until a page that waits for a job hears how far it is
JOBS = 16  # whose results are kept in memory, the last ones asked for: colours have a byte a point
COOKIE = "graphbuild_token_{}"  # of a port: browsers send a host's cookies to all of its ports
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def serve(stores: Sequence[Store], host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve until interrupted; `announce` is called with the page's URL. stores: one, or two to compare.

    Raises ConfigError when a store has no graph, or nothing can listen at host and port.
    """
    catalogs = [Catalog(store) for store in stores]
    asyncio.run(_serve(Explorer(catalogs, host), host, port, announce))


async def _serve(explorer: Explorer, host: str, port: int, announce: Callable[[str], None]) -> None:
    runner = web.AppRunner(explorer.application(), access_log=None, max_line_size=20 * LONGEST)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(f"cannot listen at {host}:{port} ({error.strerror})", "choose another --port") from error
        announce(explorer.address(runner.addresses[0][1]))
        warming = asyncio.create_task(explorer.warm())
        await asyncio.Event().wait()
        await warming
    finally:
        await runner.cleanup()


class _Working(Exception):  # noqa: N818
    """A job goes on; `share` of it is done, if that is known."""

    def __init__(self, share: float | None) -> None:
        self.share = share


class Explorer:
    """The application: pages, and JSON about one store or two."""

    def __init__(self, catalogs: Sequence[Catalog], host: str) -> None:
        self.catalogs = catalogs
        self.host = host
        self.loopback = _is_loopback(host)
        self.token = secrets.token_urlsafe(24)
        self._jobs: dict[tuple[int, str], asyncio.Task[Any]] = {}
        self._share: dict[int, float] = {}  # of a store's map that is made

    def application(self) -> web.Application:
        application = web.Application(middlewares=[self._guard, _errors])
        application.on_response_prepare.append(_add_headers)
        application.add_routes(
            [
                web.get("/", _file("page.html", "text/html")),
                *(web.get(f"/{name}", _file(name, "text/javascript")) for name in SCRIPTS),
                web.get("/page.css", _file("page.css", "text/css", base_css())),
                web.get("/favicon.ico", _no_icon),
                web.get("/api/stores", self._stores),
                web.get(r"/api/{store:\d+}/search", self._search),
                web.get(r"/api/{store:\d+}/key", self._key),
                web.get(r"/api/{store:\d+}/node/{node:\d+}", self._node),
                web.get(r"/api/{store:\d+}/map", self._map),
                web.get(r"/api/{store:\d+}/places", self._places),
                web.get(r"/api/{store:\d+}/colour", self._colour),
                web.get(r"/api/{store:\d+}/duplicates", self._duplicates),
                web.post(r"/api/{store:\d+}/select", self._select),
                web.get(r"/image/{store:\d+}/{node:\d+}", self._image),
            ]
        )
        return application

    def address(self, port: int) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{port}/?token={self.token}"

    async def warm(self) -> None:
        """Load the encoder before the first search; a failure shows there."""
        for catalog in self.catalogs:
            if catalog.searchable:
                try:
                    await asyncio.to_thread(catalog.search, "warm", 1)
                except GraphbuildError as error:
                    logger.warning("no search by text: %s", error.cause)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.loopback and not _is_loopback(request.url.host or ""):
            return web.Response(status=403, text="open it by the address that graphbuild printed")
        cookie = COOKIE.format(request.url.port)
        if request.path == "/" and self._is_token(request.query.get("token", "")):
            moved = web.Response(status=303, headers={"Location": "/"})
            # Not Strict: browsers leave that out behind a link on another page, such as a terminal in one.
            moved.set_cookie(cookie, self.token, httponly=True, samesite="Lax")
            return moved
        if not self._is_token(request.cookies.get(cookie, "")):
            return web.Response(status=403, text="open it by the address with the token, which graphbuild printed")
        return await handler(request)

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.token.encode())

    def _catalog(self, request: web.Request) -> Catalog:
        return self.catalogs[self._store_number(request)]

    def _store_number(self, request: web.Request) -> int:
        return _number("store", request.match_info["store"], 0, len(self.catalogs) - 1)

    # -- what the page asks for

    async def _stores(self, request: web.Request) -> web.Response:
        return web.json_response(
            [
                {
                    "store": catalog.store.url,
                    "nodes": len(catalog.graph),
                    "k": catalog.graph.k,
                    "encoder": catalog.graph.encoder,
                    "recall": catalog.graph.certificate["recall"],
                    "searchable": catalog.searchable,
                    "keys": catalog.has_samples,
                    "images": catalog.has_images,
                    "mapped": catalog.store.exists(MADE),
                }
                for catalog in self.catalogs
            ]
        )

    async def _search(self, request: web.Request) -> web.Response:
        text = request.query.get("text", "")
        if len(text) > LONGEST:
            raise InputError(f"the text has {len(text):,} characters, at most {LONGEST:,}", "search by fewer words")
        found = await asyncio.to_thread(self._catalog(request).search, text, _count(request))
        return web.json_response({"neighbors": [dataclasses.asdict(one) for one in found]})

    async def _key(self, request: web.Request) -> web.Response:
        catalog, key = self._catalog(request), request.query.get("key", "")
        if not await asyncio.to_thread(catalog.samples, key):
            return web.json_response({"node": None})  # the page says so: the other store may have it
        sample = await asyncio.to_thread(catalog.sample, key)
        if sample.node is None:
            raise InputError(f"sample {sample.key!r} has no usable caption, so no node", "choose another key")
        return web.json_response(_public(sample))

    async def _node(self, request: web.Request) -> web.Response:
        catalog, count = self._catalog(request), _count(request)
        return web.json_response(await asyncio.to_thread(_described, catalog, _node_of(request, catalog), count))

    async def _map(self, request: web.Request) -> web.Response:
        made, catalog = await self._made(request), self._catalog(request)
        columns = await self._job(request, "columns", lambda: columns_of(catalog))
        name = await asyncio.to_thread(free_name, catalog.store)
        return web.json_response(made.about | {"columns": columns, "free_name": name})

    async def _places(self, request: web.Request) -> web.Response:
        """Of points `begin` to `begin` + `count` - 1, both coordinates as uint16, little-endian."""
        made, last = await self._made(request), len(self._catalog(request).graph)
        begin, count = (_number(name, request.query.get(name, ""), 0, last) for name in ("begin", "count"))
        some = made.nodes_of_points(begin, count)
        return web.Response(body=await asyncio.to_thread(lambda: made.places[some].astype("<u2").tobytes()))

    async def _colour(self, request: web.Request) -> web.Response:
        """The legend, as a line of JSON, and behind it a byte for each point."""
        made, catalog, by = await self._made(request), self._catalog(request), request.query.get("by", "")[:LONGEST]
        legend, codes = await self._job(request, f"colour {by}", lambda: codes_by(catalog, made, by))
        return web.Response(body=json.dumps(legend).encode() + b"\n" + codes)

    async def _duplicates(self, request: web.Request) -> web.Response:
        catalog = self._catalog(request)
        return web.json_response(await self._job(request, "duplicates", lambda: duplicates(catalog)))

    async def _select(self, request: web.Request) -> web.Response:
        made, catalog = await self._made(request), self._catalog(request)
        try:
            asked = dict(await request.json())
        except (TypeError, ValueError):
            raise InputError("what is to be selected is no JSON object", "select it on the page") from None
        return web.json_response(await asyncio.to_thread(select_on_map, catalog, made, asked))

    async def _made(self, request: web.Request) -> NodeMap:
        number, catalog = self._store_number(request), self._catalog(request)
        told = functools.partial(self._share.__setitem__, number)
        found: NodeMap = await self._job(request, "map", lambda: node_map(catalog, told))
        return found

    async def _job(self, request: web.Request, name: str, work: Callable[[], Any]) -> Any:
        """What `work` returns, run once in a thread; after PATIENCE seconds _Working, and the page asks again."""
        number = self._store_number(request)
        task = self._jobs.pop((number, name), None)
        if task is None or (task.done() and task.exception()):  # what failed may do so no more
            task = asyncio.create_task(asyncio.to_thread(work))
        self._jobs[number, name] = task
        for old in [key for key, one in self._jobs.items() if one.done() and key[1] != "map"][:-JOBS]:
            del self._jobs[old]
        await asyncio.wait([task], timeout=PATIENCE)
        if not task.done():
            raise _Working(self._share.get(number) if name == "map" else None)
        return task.result()

    async def _image(self, request: web.Request) -> web.Response:
        catalog = self._catalog(request)
        node = _node_of(request, catalog)
        content = await asyncio.to_thread(lambda: catalog.image(catalog.sample_of(node), PIXELS))
        if content is None:
            raise web.HTTPNotFound(text="no image")
        return web.Response(body=content, content_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})


def _described(catalog: Catalog, node: int, count: int) -> Json:
    itself = catalog.describe([node], [1.0])[0]
    mean, deviation = catalog.graph.background([node])[0].tolist()
    sample = catalog.sample_of(node)
    return {
        **dataclasses.asdict(itself),
        "sample": _public(sample) if sample else None,
        "background": {"mean": mean, "deviation": deviation},
        "neighbors": [dataclasses.asdict(one) for one in catalog.neighbors(node, count)],
    }


def _public(sample: Sample) -> Json:
    return {**dataclasses.asdict(sample), "captions": [sample.caption, *sample.more], "image": sample.image is not None}


def _count(request: web.Request) -> int:
    return _number("count", request.query.get("count", "24"), 1, MOST)


def _node_of(request: web.Request, catalog: Catalog) -> int:
    return _number("node", request.match_info["node"], 0, len(catalog.graph) - 1)


def _number(name: str, given: str, least: int, most: int) -> int:
    """A number of a request, of which Python reads only so many digits."""
    if not given.isdecimal() or len(given) > DIGITS or not least <= int(given) <= most:
        raise InputError(f"{name} {given[:DIGITS]!r} is not in {least}..{most}", "give a number of these")
    return int(given)


def _file(name: str, kind: str, before: str = "") -> Handler:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=before + own_text(__package__, name), content_type=kind)

    return handler


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)


async def _no_icon(request: web.Request) -> web.Response:
    return web.Response(status=204)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except GraphbuildError as error:
        fix = "" if "--" in error.fix else error.fix  # the command line's options are none of the page's
        return web.json_response({"cause": error.cause, "fix": fix}, status=400)
    except _Working as working:
        return web.json_response({"share": working.share}, status=202)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
