"""What the tests of pages share: headless Chromium, and a store whose captions are photographs' and hostile strings."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from browser import Serve, Tab

from graphbuild.demo.scenes import encode_jpeg, make_scenes, render
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store
from tests.e2e import forked

K = 8
PHOTOS = 120


@pytest.fixture(scope="session")
def strings(shared_data: Path) -> list[str]:
    found: list[str] = json.loads(gzip.decompress((shared_data / "hostile/naughty_strings.json.gz").read_bytes()))
    assert len(found) == 515
    return found


@pytest.fixture(scope="session")
def made_stores(
    shared_data: Path, strings: list[str], make_once: Callable[[str, Callable[[Path], object]], Path]
) -> Path:
    return make_once("pages", lambda folder: make_stores(folder, shared_data, strings))


@pytest.fixture(scope="session")
def store(made_stores: Path) -> Path:
    """A finished graph: two tars of real photographs with their captions, and of drawings with hostile captions."""
    return made_stores / "store"


@pytest.fixture(scope="session")
def other_store(made_stores: Path) -> Path:
    """The same samples with another k."""
    return made_stores / "other"


def make_stores(folder: Path, shared_data: Path, strings: list[str]) -> None:
    with tarfile.open(shared_data / "images/flickr8k.tar") as archive:
        members = [member for member in archive if member.isfile()][:PHOTOS]
        photos = [archive.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    captions = dict(
        line.split(",", 1)
        for line in (shared_data / "images/flickr8k_captions.csv").read_text().splitlines()[1:]
        if "," in line
    )
    drawings = [encode_jpeg(render(scene, 32)) for scene in make_scenes(8)]
    samples = [
        (photo, captions[Path(member.name).name].strip('"')) for photo, member in zip(photos, members, strict=True)
    ]
    samples += [(drawings[at % 8], text) for at, text in enumerate(strings)]
    for number, part in enumerate((samples[:300], samples[300:])):
        with tarfile.open(folder / f"{number:05}.tar", "w") as archive:
            for at, (image, text) in enumerate(part):
                for extension, content in (("jpg", image), ("json", json.dumps({"caption": text}).encode())):
                    info = tarfile.TarInfo(f"{number}{at:04}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    recipe = Recipe(embed=Embed(shards=f"{folder}/*.tar", caption_member="json:caption"), index=Index(k=K))
    with Runner(workers=0) as runner:
        for verb in ("embed", "index", "export"):
            run_verb(verb, recipe, Store(str(folder / "store")), runner)
        shutil.copytree(folder / "store", folder / "other")
        other = Recipe(embed=recipe.embed, index=Index(k=2 * K))
        run_verb("index", other, Store(str(folder / "other")), runner, force=True)


PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def missing() -> str | None:
    """What a browser test lacks here, and how to get it."""
    if not any(map(shutil.which, PROGRAMS)):
        return "no Chromium: apt-get install chromium"
    return None if find_spec("playwright") else "no playwright: pip install playwright"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips before a store is built for nothing."""
    reason = missing()
    for item in items:
        if reason and "chromium" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")  # no longer: workers forked by later tests would keep its pipes open, for it to wait on
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, PROGRAMS)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--enable-unsafe-swiftshader"]
        )
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Tab]:
    """A fresh tab; console messages, errors and dialogs count as problems, which no test may leave."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened = Tab(context.new_page())
    said = opened.page.on
    said("console", lambda message: "GL Driver Message" in message.text or opened.problems.append(message.text))
    opened.page.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.page.on("dialog", lambda dialog: (opened.problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
    opened.page.on("request", lambda request: opened.requests.append(request.url))
    yield opened
    context.close()
    assert opened.problems == []


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """The address that `graphbuild explore ARGUMENTS` prints, on a free port; the same arguments share a server."""
    running: dict[tuple[str, ...], tuple[forked.Started, str]] = {}

    def start(*arguments: object) -> str:
        key = tuple(map(str, arguments))
        if key not in running:
            process = forked.Started(["graphbuild", "explore", *key, "--port", "0"], os.environ)
            running[key] = process, printed(process)
        return running[key][1]

    def printed(process: forked.Started) -> str:
        end = time.monotonic() + 120
        while not process.printed()[0].endswith("\n"):
            assert process.poll() is None, process.printed()[1]
            assert time.monotonic() < end
            time.sleep(0.02)
        return process.printed()[0].split()[1]

    yield start
    for process, _ in running.values():
        process.send_signal(signal.SIGTERM)
        process.wait(20)
