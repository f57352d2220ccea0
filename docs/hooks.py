"""What `make docs` adds to the pages of docs/: files of the project that pages link, the command line's help, llms.txt.

A link that leaves docs/ would lead nowhere on the site. So the file that it names comes along below project/: Markdown
as a page, others as they are. Markdown that comes along may link further files, and they come too.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^([ ]*)```.*?^\1```[ ]*$", re.M | re.S)
HELP = ROOT / "tests" / "cli" / "help"
OTHERS = "Pages of measurements"  # which the navigation has not
pages: list[tuple[str, Page]] = []  # in the order of the navigation, with the name of its part; then the others
texts: dict[str, Path] = {}  # programs, recipes and notebooks that pages link, by their place on the site


def source(uri: str) -> Path:
    """The file of the project that a page is made of."""
    name = uri.removeprefix("project/").replace("about.md", "README.md")
    return ROOT / name if uri.startswith("project/") else DOCS / uri


def place(path: Path) -> str:
    """Where a file of the project lies among the sources of the site; a README.md would be its folder's index there."""
    if path.is_relative_to(DOCS):
        return str(path.relative_to(DOCS))
    return f"project/{path.relative_to(ROOT)}".replace("README.md", "about.md")


def linked(path: Path) -> list[Path]:
    """The files that a Markdown file links."""
    targets = [match[2] for match in LINK.finditer(FENCE.sub("", path.read_text()))]
    return [Path(os.path.normpath(path.parent / target)) for target in targets if "://" not in target]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    config.copyright = f"graphbuild {version}, Apache-2.0"
    pages.clear()
    texts.clear()
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    todo, known = list(DOCS.rglob("*.md")), {DOCS}
    while todo:
        path = todo.pop()
        for target in [path, *linked(path)]:
            if target in known or not target.is_file():
                continue
            known.add(target)
            if target.suffix in (".py", ".yaml", ".ipynb"):
                texts[place(target)] = target
            if not target.is_relative_to(DOCS):
                file = File.generated(config, place(target), abs_src_path=str(target))
                file.inclusion = InclusionLevel.INCLUDED if target.suffix != ".md" else InclusionLevel.NOT_IN_NAV
                files.append(file)
            if target.suffix == ".md":
                todo.append(target)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = source(page.file.src_uri)
    if here.is_relative_to(ROOT / "benchmarks"):
        page.meta["search"] = {"exclude": True}  # tables of numbers, which would come first for every word in them
    return with_links(markdown, page).replace("<!-- the help of every verb -->", commands())


def with_links(markdown: str, page: Page) -> str:
    """A page's text with its links as they are on the site."""
    here = source(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        if "://" in match[2]:
            return match[0]
        target = Path(os.path.normpath(here.parent / match[2]))
        if not target.is_relative_to(ROOT) or not target.exists():
            return match[0]  # the build names it
        return match[1] + os.path.relpath(place(target), Path(page.file.src_uri).parent) + match[3]

    return LINK.sub(moved, markdown)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings name pages by their path in the project: links, on the site."""
    if not page.file.src_uri.startswith("reference/api/"):
        return html
    return re.sub(r"\bdocs/([\w/-]+)\.md", r'<a href="../../../\1/">\1</a>', html)


def commands() -> str:
    verbs = sorted(path for path in HELP.glob("*.txt") if path.stem != "graphbuild")
    parts = [f"```text\n{(HELP / 'graphbuild.txt').read_text()}```\n"]
    parts += [f"## {path.stem}\n\n```text\n{path.read_text()}```\n" for path in verbs]
    return "\n".join(parts)


def on_nav(nav: Navigation, *, config: MkDocsConfig, files: Files) -> Navigation:
    for page in nav.pages:
        part = page.ancestors[-1].title if page.ancestors else ""
        pages.append((part, page))
    listed = {page.file.src_uri for page in nav.pages}
    others = [file for file in files.documentation_pages() if file.src_uri not in listed]
    pages.extend((OTHERS, file.page) for file in sorted(others, key=lambda file: file.src_uri) if file.page)
    return nav


def signatures(markdown: str) -> str:
    """A page of the Python reference as text: `::: name` becomes signature and docstring of each public name."""

    def one(found: griffe.Object | griffe.Alias, depth: int) -> str:
        kind = "class " if found.is_class else ""
        arguments = ""
        if found.is_function or (found.is_class and "__init__" in found.all_members):
            called: Any = found if found.is_function else found.all_members["__init__"]
            given = [each for each in called.parameters if each.name != "self"]
            star = next((n for n, each in enumerate(given) if each.kind is griffe.ParameterKind.keyword_only), None)
            words = list(map(argument, given))
            arguments = f"({', '.join(words if star is None else [*words[:star], '*', *words[star:]])})"
            arguments += f" -> {called.returns}" if found.is_function and called.returns else ""
        text = found.docstring.value if found.docstring else ""
        parts = [f"{'#' * depth} {kind}{found.name}{arguments}\n\n{text}\n"]
        if found.is_class:
            public = [each for name, each in found.members.items() if not name.startswith("_") and each.docstring]
            parts += [one(each, depth + 1) for each in public if each.is_function or each.is_attribute]
        return "\n".join(parts)

    def argument(each: griffe.Parameter) -> str:
        default = f" = {each.default}" if each.default is not None else ""
        return f"{each.name}{f': {each.annotation}' if each.annotation is not None else ''}{default}"

    package = griffe.load("graphbuild", search_paths=[str(ROOT)], resolve_aliases=True)
    return re.sub(
        r"^::: graphbuild\.([\w.]+)$(?:\n    .*$)*", lambda match: one(package[match[1]], 2), markdown, flags=re.M
    )


def text_of(page: Page) -> str:
    markdown = with_links(source(page.file.src_uri).read_text(), page)
    markdown = markdown.replace("<!-- the help of every verb -->", commands())
    return signatures(markdown) if "\n::: " in markdown else markdown


def file_text(path: Path) -> str:
    """A linked file as Markdown; of a notebook what it says and runs."""
    if path.suffix != ".ipynb":
        return f"```{path.suffix[1:]}\n{path.read_text()}```\n"
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for kind, text in cells) + "\n"


def on_post_build(*, config: MkDocsConfig) -> None:
    """llms.txt: what there is, a line a page; llms-full.txt: all of it; and each page as Markdown beside itself."""
    site = Path(config.site_dir)
    index = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    whole, part_before = [], None
    for part, page in pages:
        text = text_of(page)
        title = re.search(r"^# (.*)$", text, re.M)
        first = re.search(r"\n\n(?!```|[#>|!<-])(\S.+?)\n\n", text, re.S)
        if part != OTHERS and (title is None or first is None):
            raise PluginError(f"{page.file.src_uri} begins with no title and sentence")
        if part != part_before:
            index += ["", f"## {part}", ""] if part else []
            part_before = part
        says = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(first[1].split())) if first else "results"
        says = re.split(r"(?<=[.:]) (?=[A-Z])", says)[0].rstrip(":")
        index.append(f"- [{title[1] if title else page.file.src_uri}]({page.file.src_uri}): {says}")
        copy = site / page.file.src_uri
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
        whole.append(f"<!-- {page.file.src_uri} -->\n\n{text.rstrip()}\n")
    index += ["", "## Programs, recipes and notebooks", ""]
    for name, path in sorted(texts.items()):
        index.append(f"- [{path.name}]({name}): linked by the pages above")
        whole.append(f"<!-- {name} -->\n\n{file_text(path)}")
    index += ["", "## All of it", "", "- [llms-full.txt](llms-full.txt): every page and file above, in one file"]
    (site / "llms.txt").write_text("\n".join(index) + "\n")
    (site / "llms-full.txt").write_text("\n\n".join(whole))
