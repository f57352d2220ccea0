"""The site of `make docs` asks no other host for anything; its links lead somewhere, llms.txt leads to every page."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    made = subprocess.run(["make", "docs", f"SITE={folder}"], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


class Loads(HTMLParser):
    """What a browser fetches for a page without being asked, and what it follows when a link is clicked."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.found += [given[name] or "" for name in ("src", "srcset", "data", "poster") if name in given]
        if tag == "link" and given.get("rel") != "canonical":
            self.found.append(given.get("href") or "")
        if tag == "a":
            self.links.append(given.get("href") or "")


def test_no_page_loads_anything_from_elsewhere_and_every_link_leads_to_a_file(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text())
        assert len(loads.found) > 5
        for target in loads.found:
            assert not re.match(r"(\w+:)?//", target), f"{page} loads {target}"
        base = site if page.name == "404.html" else page.parent
        for target in (*loads.found, *loads.links):
            path = target.split("?")[0].split("#")[0].removeprefix("/")
            assert "://" in target or target.startswith("data:") or (base / path).exists(), f"{page} names {target}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text()), style


def test_llms_txt_leads_to_every_page_and_the_whole_has_the_python_reference(site: Path) -> None:
    listed = re.findall(r"^- \[.+\]\((.+\.(?:md|py|yaml))\): \S", (site / "llms.txt").read_text(), re.M)
    assert {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} <= set(listed)
    for page in site.rglob("index.html"):  # x/index.html is made of x.md, or of x/index.md
        folder = page.parent.relative_to(site)
        assert {f"{folder}.md", str(folder / "index.md")} & set(listed), page
    assert all((site / name).exists() for name in listed)
    whole = (site / "llms-full.txt").read_text()
    assert all(f"<!-- {name} -->" in whole for name in listed)
    assert all((site / name).read_text().rstrip() in whole for name in listed)
    entries = re.findall(r"^- \[(.+?)\]\([^)]+\): (.+)$", (site / "llms.txt").read_text(), re.M)
    assert not [title for title, _ in entries if title.endswith(".md")]
    programs = [says for title, says in entries if title.endswith((".py", ".yaml"))]
    assert len(set(programs)) == len(programs) > 10, "each says what it is"
    assert "class XSampleLoss(tau: float" in whole
    assert "--caption-member <str>" in whole


def test_a_notebook_is_a_page_with_its_code_output_and_pictures_that_the_navigation_and_the_search_have(
    site: Path,
) -> None:
    found = {each["location"] for each in json.loads((site / "search/search_index.json").read_text())["docs"]}
    for path in (ROOT / "docs/notebooks").glob("*.ipynb"):
        page = (site / "notebooks" / path.stem / "index.html").read_text()
        for cell in json.loads(path.read_text())["cells"]:
            for output in cell.get("outputs", []):
                for line in "".join(output.get("text", "")).split("\n"):
                    assert html.escape(line.strip(), quote=False) in page
            drawn = sum("image/jpeg" in output.get("data", {}) for output in cell.get("outputs", []))
            assert drawn <= 1
        assert len(re.findall(rf'<img [^>]*src="\.\./{path.stem}-\d+\.jpg"', page)) >= 3
        assert f"notebooks/{path.stem}/" in found
        assert f'href="notebooks/{path.stem}/"' in (site / "index.html").read_text()


def test_the_site_holds_no_compiled_code_no_raw_notebook_and_no_empty_sitemap(site: Path) -> None:
    names = [path.name for path in site.rglob("*")]
    assert not [name for name in names if name.endswith((".pyc", ".ipynb")) or name.startswith(("__", "sitemap"))]


def test_every_link_in_the_text_leads_to_something_that_llms_txt_and_the_whole_have(site: Path) -> None:
    lists = [(site / "llms.txt").read_text(), (site / "llms-full.txt").read_text()]
    known = set(re.findall(r"\]\(([^)]+)\): ", lists[0])) & set(re.findall(r"^<!-- (.+) -->$", lists[1], re.M))
    followed = set()
    for page in (site / name for name in known if name.endswith(".md")):
        prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#\s]+)", prose):
            if "://" not in target and not target.endswith((".jpg", ".png", ".svg")):
                path = os.path.relpath(page.parent / target, site)
                assert path in known, f"{page} links {target}"
                followed.add(path)
    assert {"how-to/choosing.md", "project/pipelines/about.md", "project/pipelines/cc3m.yaml"} <= followed
    assert {"project/benchmarks/results/simulation.md", "notebooks/graph.md", "tutorials/scenes.py"} <= followed


def test_each_version_keeps_its_pages_and_the_latest_one_is_what_the_address_leads_to(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    author = {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.org"}
    project = clone / "pyproject.toml"
    before = re.search(r'^version = "(.+)"$', project.read_text(), re.M)
    assert before
    for version in (before[1], "99.0.0"):
        project.write_text(project.read_text().replace(f'version = "{before[1]}"', f'version = "{version}"'))
        command = ["make", "docs-version", f"DOCS={ROOT / '.venv-docs'}"]
        made = subprocess.run(command, cwd=clone, env=os.environ | author, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr

    def published(path: str) -> str:
        return subprocess.run(
            ["git", "show", f"gh-pages:{path}"], cwd=clone, check=True, capture_output=True, text=True
        ).stdout

    versions = {one["version"]: one["aliases"] for one in json.loads(published("versions.json"))}
    assert versions == {"99.0.0": ["latest"], before[1]: []}
    assert "latest/" in published("index.html")
    for version in versions:
        assert f"graphbuild {version}," in published(f"{version}/tutorials/index.html")
