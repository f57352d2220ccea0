"""`graphbuild report`: index.html, which opens from disk without a network, and report.json with the same numbers.

The page runs no script but its own, by its hash in its Content-Security-Policy; captions are escaped text.
Size: about 150 KB, and thumbnails of repeated images.
"""

from __future__ import annotations

import base64
import hashlib

from graphbuild.errors import ConfigError, GraphbuildError, StorageError
from graphbuild.look.catalog import Catalog
from graphbuild.look.pages import base_css, own_text
from graphbuild.look.report.charts import charts
from graphbuild.look.report.numbers import numbers
from graphbuild.store.store import Json, Store, json_text

FOLDER = "report"
THUMBNAIL = 160  # pixels


def write_report(store: Store, out: str | None = None) -> str:
    """Write index.html and report.json; returns where the page is.

    out: a folder or URL for them; without it STORE/report.

    Raises:
        ConfigError: nothing is finished, or the folder cannot be written to.
    """
    if not store.manifest()["stages"]:
        raise ConfigError(
            f"{store.url} has nothing finished to report", "run a stage first, for instance `graphbuild embed`"
        )
    folder = Store(store.display(FOLDER) if out is None else out)
    try:
        folder.check_writable()
    except (ConfigError, StorageError) as error:
        raise ConfigError(f"no report can be written there: {error.cause}", "name another folder by --out") from error
    found = numbers(store)
    folder.write_bytes("report.json", json_text(found))
    folder.write_bytes("index.html", render(found, _images(store, found)).encode())
    return folder.display("index.html")


def render(found: Json, images: list[Json] | None = None) -> str:
    """The page for report.json's numbers. images: the repeated ones, with `thumbnail` or `problem`."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    script = own_text(__package__, "page.js")
    policy = (
        f"default-src 'none'; script-src {_hashed(script)}; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(own_text(__package__, "page.html")).render(
        n={**_every_part(found), "repeated_images": images or []},
        figures=charts(found),
        css=Markup(base_css() + own_text(__package__, "page.css")),
        policy=policy,
        page_js=Markup(script),
    )


def _every_part(found: Json) -> Json:
    parts = ("embeddings", "fidelity", "graph", "recall", "duplicates", "hosts", "edges", "mass", "targets", "batches")
    return {"matches": [], "two_views": [], **dict.fromkeys(parts), **found}


def _hashed(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _images(store: Store, found: Json) -> list[Json]:
    """The repeated images, with all captions of the sample that stands for each once there is a graph to look it up."""
    if not found.get("repeated_images") or "edges" not in found:
        return [{**one, "thumbnail": None, "problem": ""} for one in found.get("repeated_images", [])]
    catalog = Catalog(store)
    images = []
    for one in found["repeated_images"]:
        thumbnail, problem, caption = None, "no image", one["caption"]
        try:
            sample = catalog.sample(one["key"])
            caption = sample.captions or caption
            content = catalog.image(sample, THUMBNAIL)
            if content is not None:
                thumbnail = f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
        except GraphbuildError as error:
            problem = error.cause
        images.append({**one, "caption": caption, "thumbnail": thumbnail, "problem": problem})
    return images
