"""The explorer in a real browser: what it shows, by clicking, against the store's files and the encoder itself."""

from __future__ import annotations

import asyncio
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from aiohttp.test_utils import TestClient, TestServer
from browser import Serve, Tab, draw, fetch, signed_in, wait_for

from graphbuild.errors import StorageError
from graphbuild.job.verbs import run_verb
from graphbuild.look.explore import server
from graphbuild.nodes.encoder import find_encoder, open_model
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store


@pytest.fixture(scope="module")
def address(serve: Serve, store: Path) -> str:
    return serve(store)


@pytest.fixture(scope="module")
def texts(store: Path) -> list[str]:
    tables = [pq.read_table(path) for path in sorted((store / "nodes").glob("*.parquet"))]
    return [text for table in tables for text in table["text"].to_pylist()]


def similarities(store: Path) -> np.ndarray[Any, Any]:
    vectors = np.concatenate([np.load(path) for path in sorted((store / "nodes").glob("*.npy"))]).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors @ vectors.T)


def shown_nodes(tab: Tab, side: int = 0) -> list[int]:
    found = tab.page.locator(".side").nth(side).locator(".card:visible")
    return [int(one.get_attribute("data-node")) for one in found.all()]


def test_search_shows_the_nearest_and_a_click_walks(tab: Tab, address: str, store: Path, texts: list[str]) -> None:
    tab.page.goto(address)
    wait_for(tab, 0)
    query = "a dog runs through the snow"
    tab.page.select_option("#how", "text")
    tab.page.fill("#what", query)
    tab.page.press("#what", "Enter")
    tab.wait("!document.querySelector('.asked') && document.querySelector('.card')")
    encoder = open_model(find_encoder("sentence-transformers/all-MiniLM-L6-v2"), "cpu", "float32")
    wanted = encoder.reference([query])[0].astype(np.float64)
    vectors = np.concatenate([np.load(path) for path in sorted((store / "nodes").glob("*.npy"))]).astype(np.float64)
    scores = vectors @ wanted / np.linalg.norm(vectors, axis=1) / np.linalg.norm(wanted)
    found = shown_nodes(tab)
    assert len(found) == 24
    assert scores[found].min() >= np.sort(scores)[-24] - 2e-3  # bfloat16 may order near-ties otherwise
    best = found[0]
    assert tab.page.locator(".card .caption").first.text_content() == texts[best]

    tab.page.locator(".card .open").first.click()
    wait_for(tab, best)
    assert tab.page.locator(".asked .text").text_content() == texts[best]
    lists = np.concatenate([np.load(path) for path in sorted((store / "graph").glob("*.neighbors.npy"))])
    assert shown_nodes(tab) == lists[best].tolist()
    picture = tab.page.locator(".asked img")
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    second = shown_nodes(tab)[1]
    tab.page.locator(".card .open").nth(1).click()
    wait_for(tab, second)
    tab.page.go_back()
    wait_for(tab, best)
    assert tab.page.input_value("#how") == "node"
    tab.page.fill("#what", "words, not a number")
    tab.page.press("#what", "Enter")
    tab.wait("!document.querySelector('.asked') && document.querySelector('.card')")
    assert tab.page.input_value("#how") == "text"


def test_a_key_is_found_and_copied(tab: Tab, address: str, store: Path) -> None:
    tab.page.goto(address)
    wait_for(tab, 0)
    row = pq.read_table(sorted((store / "samples").glob("*.parquet"))[1]).to_pylist()[40]
    tab.page.select_option("#how", "key")
    tab.page.fill("#what", row["key"])
    tab.page.click("text=Find >> nth=-1")
    wait_for(tab, row["node"])
    tab.page.click(".copy")
    tab.page.wait_for_selector("text=Copied")
    first = tab.page.evaluate("navigator.clipboard.readText()")
    rows = [one for path in sorted((store / "samples").glob("*.parquet")) for one in pq.read_table(path).to_pylist()]
    keys = [one["key"] for one in rows if one["node"] == row["node"]]
    assert first == keys[0]
    tab.page.fill("#what", "no such key")
    tab.page.press("#what", "Enter")
    tab.page.wait_for_selector("#problem:has-text('no sample of it has the key no such key')")
    assert tab.page.locator(".card, .asked").count() == 0, "the answer to another question is gone"


def test_of_a_sample_that_the_other_store_lacks_one_side_is_shown(
    tab: Tab, serve: Serve, store: Path, tmp_path: Path
) -> None:
    (tmp_path / "list.csv").write_text("id,caption\n" + "".join(f"other {n},caption {n}\n" for n in range(30)))
    recipe = Recipe(embed=Embed(captions=str(tmp_path / "list.csv"), key_column="id"), index=Index(k=4))
    with Runner(workers=0) as runner:
        for verb in ("embed", "index"):
            run_verb(verb, recipe, Store(str(tmp_path / "other")), runner)
    tab.page.goto(serve(store, "--compare", tmp_path / "other"))
    wait_for(tab, 0)
    tab.wait("document.querySelectorAll('.side').length === 2")
    key = pq.read_table(store / "samples/00000.parquet")["key"][0].as_py()
    beside = tab.page.locator(".side").nth(1)
    assert f"Not in {tmp_path / 'other'}: no sample of it has the key {key}" in beside.text_content()
    assert tab.page.locator(".side").first.locator(".card").count() > 0
    assert tab.page.locator("#problem").text_content() == ""
    tab.page.select_option("#how", "key")
    tab.page.fill("#what", "other 3")
    tab.page.press("#what", "Enter")
    wait_for(tab, 3)
    assert "no sample of it has the key other 3" in tab.page.locator(".side").first.text_content()
    assert len(shown_nodes(tab, 1)) == 4
    tab.page.select_option("#how", "text")
    tab.page.fill("#what", "")
    tab.page.press("#what", "Enter")
    tab.wait("document.getElementById('problem').textContent !== ''")
    assert "--" not in tab.page.locator("#problem").text_content(), "an option of the command line"
    assert tab.page.locator(".side").count() == 0
    tab.problems[:] = [one for one in tab.problems if "400" not in one]  # the browser logs the refused request
    tab.accessible()


def test_the_filter_hides_what_is_less_similar(tab: Tab, address: str, store: Path) -> None:
    tab.page.goto(f"{address}#node=3")
    wait_for(tab, 3)
    values = np.concatenate([np.load(path) for path in sorted((store / "graph").glob("*.similarities.npy"))])[3]
    least = float(values[3])
    tab.page.locator("#least").evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", str(least))
    limit = float(tab.page.locator("#least").input_value())
    assert len(shown_nodes(tab)) == (values >= limit).sum() < len(values)


def test_two_stores_stand_side_by_side(tab: Tab, serve: Serve, store: Path, other_store: Path) -> None:
    tab.page.goto(f"{serve(store, '--compare', other_store)}#node=7")
    wait_for(tab, 7)
    tab.wait("document.querySelectorAll('.side .cards').length === 2")
    lists = [
        np.concatenate([np.load(path) for path in sorted((one / "graph").glob("*.neighbors.npy"))])[7]
        for one in (store, other_store)
    ]
    assert [shown_nodes(tab, side) for side in (0, 1)] == [one.tolist() for one in lists]
    both = len(set(lists[0].tolist()) & set(lists[1].tolist()))
    assert tab.page.locator(".card.both").count() == 2 * both
    assert f"{both} in both lists" in tab.page.locator("#status").text_content()
    tab.page.locator(".side").nth(1).locator(".card .open").nth(2).click()
    wait_for(tab, int(lists[1][2]))
    tab.accessible()


@pytest.mark.slow
def test_every_hostile_caption_is_text_and_runs_nothing(tab: Tab, address: str, texts: list[str]) -> None:
    tab.page.add_init_script("Object.defineProperty(HTMLImageElement.prototype, 'src', {set() {}})")  # none is loaded
    tab.page.goto(f"{address}#node=1")
    wait_for(tab, 1)
    tab.page.locator("#count").evaluate("input => { input.value = 2; }")
    shown = tab.page.evaluate(
        """async (count) => {
            const found = [];
            for (let node = 0; node < count; node++) {
                location.hash = `#node=${node}`;
                while (document.querySelector('.asked dd')?.textContent !== String(node))
                    await new Promise((done) => setTimeout(done, 2));
                found.push([...document.querySelectorAll('.asked .text, .card .caption')].map((e) => e.textContent));
            }
            return found;
        }""",
        len(texts),
    )
    assert [one[0] for one in shown] == texts
    known = {unicodedata.normalize("NFC", text) for text in texts}
    assert {re.sub(r" \(x\d+\)$", "", text) for one in shown for text in one[1:]} <= known
    assert tab.page.evaluate("document.querySelectorAll('.text *, .caption *').length") == 0
    draw(tab)
    tab.page.click("#duplicates-show")
    tab.wait("!document.getElementById('duplicates-parts').hidden")
    assert tab.page.evaluate("document.querySelectorAll('#map-legend span *, .half span *').length") == 0
    assert tab.page.locator("script").count() == 4


def test_strangers_and_bad_requests_are_refused(address: str) -> None:
    base, mine = signed_in(address)
    for path in ("", "page.js", "page.css", "api/stores", "api/0/node/3", "api/0/node/999999", "image/0/1", "none"):
        for headers in ({}, mine):
            _, found, _ = fetch(base + path, **headers)
            assert found["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'"), path
            assert found["X-Content-Type-Options"] == "nosniff"
    assert fetch(base, **mine, Host="evil.example")[0] == 403
    digits = "1" * 5_000
    for path, says in (
        ("api/0/node/999999", "not in 0.."),
        ("api/7/node/1", "store '7' is not in 0..0"),
        ("api/0/node/1?count=0", "not in 1..200"),
        (f"api/{digits}/node/1", "not in 0..0"),
        (f"api/0/node/{digits}", "not in 0.."),
        (f"image/0/{digits}", "not in 0.."),
        (f"api/{digits}/map", "not in 0..0"),
        (f"api/0/node/1?count={digits}", "not in 1..200"),
        (f"api/0/search?text=a&count={digits}", "not in 1..200"),
        ("api/0/search?text=", "cannot be searched"),
        ("api/0/search?text=" + "a" * 10_001, "10,001 characters"),
    ):
        status, _, body = fetch(base + path, **mine)
        assert (status, says in body) == (400, True), (path, body)
    status, _, body = fetch(base + "api/0/key?key=../../etc/passwd", **mine)
    assert (status, body) == (200, '{"node": null}'), "no sample has it"


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_only_who_was_given_the_printed_address_gets_in_on_loopback_too(serve: Serve, store: Path, host: str) -> None:
    arguments = [] if host == "127.0.0.1" else ["--host", host]  # the first is what it takes by itself
    address = serve(store, *arguments).replace("0.0.0.0", "127.0.0.1")
    base, mine = signed_in(address)
    for path in ("", "?token=wrong", "?token=", "page.js", "api/stores", "api/0/node/3", "api/0/map", "image/0/1"):
        assert fetch(base + path)[0] == 403, path
        assert fetch(base + path, Cookie=mine["Cookie"][:-1])[0] == 403, path
    assert len(address.partition("?token=")[2]) >= 32
    assert fetch(base + "api/stores", **mine)[0] == 200


def test_two_explorers_of_one_machine_do_not_sign_each_other_out(
    tab: Tab, serve: Serve, address: str, store: Path, other_store: Path
) -> None:
    tab.page.goto(f"{address}#node=3")
    tab.page.context.new_page().goto(serve(store, "--compare", other_store))
    tab.page.reload()
    tab.wait("document.querySelectorAll('.card').length > 0")
    assert tab.page.url == address.partition("?")[0] + "#node=3", "the token stays out of the browser's history"


def test_a_map_that_failed_is_drawn_when_asked_for_again_and_then_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[object] = []

    def node_map(catalog: object, told: object) -> SimpleNamespace:
        drawn.append(catalog)
        if len(drawn) == 1:
            raise StorageError("the store cannot be reached", "try again")
        return SimpleNamespace(about={"nodes": 7})

    monkeypatch.setattr(server, "node_map", node_map)
    monkeypatch.setattr(server, "columns_of", lambda catalog: ["row"])
    monkeypatch.setattr(server, "free_name", lambda store: "from-map")

    async def asked() -> list[tuple[int, dict[str, Any]]]:
        explorer = server.Explorer([SimpleNamespace(store=None)], "127.0.0.1")  # type: ignore[list-item]
        async with TestClient(TestServer(explorer.application())) as client:
            await client.get("/", params={"token": explorer.token})
            answers = [await client.get("/api/0/map") for _ in range(3)]
            return [(answer.status, await answer.json()) for answer in answers]

    failed, *later = ThreadPoolExecutor(1).submit(asyncio.run, asked()).result()  # playwright has a loop here
    assert failed == (400, {"cause": "the store cannot be reached", "fix": "try again"})
    assert later == [(200, {"nodes": 7, "columns": ["row"], "free_name": "from-map"})] * 2
    assert len(drawn) == 2
