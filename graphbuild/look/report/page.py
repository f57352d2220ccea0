"""`graphbuild report`: index.html, which opens from disk without a network, and report.json with the same numbers.

The page runs no script but its own, by its hash in its Content-Security-Policy; captions are escaped text.
Size: about 150 KB, and some 130 thumbnails at most, of 2 to 10 KB each.
"""

from __future__ import annotations

import base64
import hashlib
from functools import partial
from itertools import islice
from typing import Any

from graphbuild.errors import ConfigError, GraphbuildError, StorageError
from graphbuild.look.catalog import Catalog, Sample
from graphbuild.look.pages import base_css, own_text
from graphbuild.look.report.captions import MANY
from graphbuild.look.report.charts import charts, comparison_charts
from graphbuild.look.report.compare import compare
from graphbuild.look.report.history import builds
from graphbuild.look.report.numbers import numbers
from graphbuild.store.store import Json, Store, json_text

FOLDER = "report"
PAGES = {"report": "index.html", "compare": "compare.html"}
THUMBNAIL = 96  # pixels
PICTURES = 3  # of one caption, at most
NEAR_SHARDS = 8  # from a node's own on, in which its samples are looked for
Pictures = dict[Any, list[str | None]]  # addresses that hold a JPEG; None: it could not be read
LETTERS = ("lookalikes", "scripts")  # reasons that are told without images, which would make the page too large
REASONS = {
    name: {"title": title, "what": what, "column": column, "images": name not in LETTERS}
    for name, title, what, column in (
        ("boilerplate", "Boilerplate", "patterns of many captions, without their numbers", "one of them"),
        ("repeated", "One caption of many samples", f"captions of {MANY} samples or more each", "caption"),
        ("markup", "Markup, addresses, names of files", "captions with a file's name, an address or markup", "caption"),
        ("minority", "Another script than most captions", "captions are mainly in other scripts", "caption"),
        (
            "lookalikes",
            "Two scripts in one word",
            "captions with a word that mixes Latin, Cyrillic or Greek",
            "caption",
        ),
        ("scripts", "Two scripts in one caption", "captions with words of a second script", "caption"),
        ("far", "Far from all others", "captions with a nearest neighbour no nearer than random pairs are", "caption"),
    )
}


def write_report(store: Store, out: str | None = None, other: Store | None = None) -> str:
    """Write index.html and report.json; returns where the page is. With another store compare.html and compare.json.

    out: a folder or URL for them; without it STORE/report.

    Raises:
        ConfigError: nothing is finished, of two stores no graph, or the folder cannot be written to.
    """
    if not store.manifest()["stages"]:
        raise ConfigError(
            f"{store.url} has nothing finished to report", "run a stage first, for instance `graphbuild embed`"
        )
    both = [Catalog(one) for one in (store, other)] if other is not None else []
    folder = Store(store.display(FOLDER) if out is None else out)
    try:
        folder.check_writable()
    except (ConfigError, StorageError) as error:
        raise ConfigError(f"no report can be written there: {error.cause}", "name another folder by --out") from error
    name = "compare" if both else "report"
    found = compare(*both) if both else numbers(store)
    if "edges" in found:
        found["history"] = builds(store, folder)
    page = (
        render_comparison(found, _compared_pictures(both, found)) if both else render(found, *_pictures(store, found))
    )
    folder.write_bytes(f"{name}.json", json_text(found))
    folder.write_bytes(PAGES[name], page.encode())
    return folder.display(PAGES[name])


def render_comparison(found: Json, pictures: Pictures | None = None) -> str:
    """The page for compare.json's numbers. pictures: by store (0 or 1) and node."""
    title = " and ".join(one["store"] for one in found["stores"])
    return fill("compare.html", "compare.json", comparison_charts(found), title=title, n=found, pictures=pictures or {})


def render(found: Json, pictures: Pictures | None = None, unread: str = "") -> str:
    """The page for report.json's numbers. pictures: by node, or by sha256 of the repeated images."""
    n = {**_every_part(found), "repeated_images": found.get("repeated_images", [])}
    return fill(
        "page.html", "report.json", charts(found), title=n["store"], n=n, pictures=pictures or {}, unread=unread
    )


def fill(template: str, json: str, figures: Json, **values: Any) -> str:
    """A page of this folder, with its look, its charts, its script and the policy that lets no other run."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    script = own_text(__package__, "page.js")
    policy = (
        f"default-src 'none'; script-src {_hashed(script)}; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    loader = FunctionLoader(partial(own_text, __package__))
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(
        json=json,
        figures=figures,
        reasons=REASONS,
        css=Markup(base_css() + own_text(__package__, "page.css")),
        policy=policy,
        page_js=Markup(script),
        **values,
    )


def _every_part(found: Json) -> Json:
    parts = ("embeddings", "fidelity", "graph", "recall", "duplicates", "hosts", "edges", "mass", "targets", "batches")
    lists = ("matches", "two_views", "advice", "suspicious", "history")
    return {**{name: [] for name in lists}, **dict.fromkeys((*parts, "groups")), **found}


def _hashed(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _pictures(store: Store, found: Json) -> tuple[Pictures, str]:
    """Thumbnails of what the page names, once there is a graph to look it up, and why the first of them is missing.

    A repeated image gets all captions of the sample that stands for it.
    """
    pictures: Pictures = {}
    if "edges" not in found:
        return pictures, ""
    catalog = Catalog(store)
    problems: list[str] = []
    for one in found.get("repeated_images", []):
        for sample in catalog.samples(one["key"]):
            one["caption"] = sample.captions or one["caption"]
            pictures[one["sha256"]] = [_picture(catalog, sample, problems)]
    if not catalog.has_images:
        return pictures, ""
    suspects = [row for each in found["suspicious"] if each["reason"] not in LETTERS for row in each["shown"]]
    members = [one for group in found["groups"]["largest"] for one in group["members"]]
    several = {one["node"]: PICTURES for one in found["duplicates"]["texts"]}
    wanted = {one["node"]: 1 for one in [*found["edges"]["hubs"], *members, *suspects]} | several
    for node, count in wanted.items():
        samples = islice(catalog.samples_of(node, NEAR_SHARDS), count)
        pictures[node] = [_picture(catalog, sample, problems) for sample in samples]
    return pictures, problems[0] if problems else ""


def _compared_pictures(both: list[Catalog], found: Json) -> Pictures:
    """Thumbnails of the captions that disagree, and of their neighbours, by store (0 or 1) and node."""
    wanted = {
        (side, node): None
        for one in found["disagreements"]
        for side, nearest in enumerate(one["nearest"])
        for node in (one["nodes"][side], *(near["node"] for near in nearest))
        if both[side].has_images
    }
    return {
        (side, node): [
            _picture(both[side], sample, []) for sample in islice(both[side].samples_of(node, NEAR_SHARDS), 1)
        ]
        for side, node in wanted
    }


def _picture(catalog: Catalog, sample: Sample, problems: list[str]) -> str | None:
    """The address that holds a sample's thumbnail; None, and what is wrong in `problems`, where it cannot be read."""
    try:
        content = catalog.image(sample, THUMBNAIL)
    except GraphbuildError as error:
        problems.append(error.cause)
        return None
    return None if content is None else f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
