"""What `make docs` adds to the pages of docs/: files that pages link, notebooks, the command line's help, llms.txt.

A link that leaves docs/ would lead nowhere on the site. So the file that it names comes along below project/: Markdown
as a page, others as they are. Markdown that comes along may link further files, and they come too. A notebook becomes a
page of its own, with the output that is kept in it; nothing is run.
"""

from __future__ import annotations

import ast
import base64
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
texts: dict[str, Path] = {}  # programs and recipes that pages link, by their place on the site


def source(uri: str) -> Path:
    """The file of the project that a page is made of."""
    name = uri.removeprefix("project/").replace("about.md", "README.md")
    path = ROOT / name if uri.startswith("project/") else DOCS / uri
    notebook = path.with_suffix(".ipynb")
    return notebook if notebook.exists() else path


def place(path: Path) -> str:
    """Where a file of the project lies among the sources of the site; a README.md would be its folder's index there."""
    if path.is_relative_to(DOCS):
        return str(path.relative_to(DOCS)).replace(".ipynb", ".md")
    return f"project/{path.relative_to(ROOT)}".replace("README.md", "about.md")


def linked(path: Path) -> list[Path]:
    """The files that a page's source links."""
    targets = [match[2] for match in LINK.finditer(FENCE.sub("", markdown_of(path)))]
    return [Path(os.path.normpath(path.parent / target)) for target in targets if "://" not in target]


def markdown_of(path: Path) -> str:
    """A page's source as Markdown: of a notebook its prose, its code, and what each cell printed and drew."""
    if path.suffix != ".ipynb":
        return path.read_text()
    parts = []
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
        outputs = cell.get("outputs", [])
        if printed := "".join("".join(output.get("text", "")) for output in outputs):
            parts.append(f"```text\n{printed.rstrip()}\n```")
        if pictures(cell):
            parts.append(f"![What the code above draws]({path.stem}-{number}.jpg)")
    return "\n\n".join(parts).replace("\r", "") + "\n"


def pictures(cell: dict[str, Any]) -> list[bytes]:
    found = [output.get("data", {}).get("image/jpeg") for output in cell.get("outputs", [])]
    return [base64.b64decode("".join(picture)) for picture in found if picture]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    config.copyright = f"graphbuild {version}, Apache-2.0"
    pages.clear()
    texts.clear()
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    notebooks = sorted(DOCS.rglob("*.ipynb"))
    for path in notebooks:
        files.remove(files.src_uris[str(path.relative_to(DOCS))])
        files.append(File.generated(config, place(path), content=markdown_of(path)))
        for number, cell in enumerate(json.loads(path.read_text())["cells"]):
            for picture in pictures(cell):
                uri = place(path).replace(".md", f"-{number}.jpg")
                files.append(File.generated(config, uri, content=picture))
    todo, known = [*DOCS.rglob("*.md"), *notebooks], {DOCS, *notebooks}
    while todo:
        path = todo.pop()
        for target in [path, *linked(path)]:
            if target in known or not target.is_file():
                continue
            known.add(target)
            if target.suffix in (".py", ".yaml"):
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
    markdown = with_links(markdown_of(source(page.file.src_uri)), page)
    markdown = markdown.replace("<!-- the help of every verb -->", commands())
    return signatures(markdown) if "\n::: " in markdown else markdown


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.:]) (?=[A-Z`])", " ".join(text.split()))[0].rstrip(":.") + "."


def about(path: Path) -> str:
    """What a program's docstring, or the comment on top of a recipe, says first."""
    text = path.read_text()
    if path.suffix == ".py":
        return first_sentence(ast.get_docstring(ast.parse(text)) or "")
    comment = re.match(r"(?:#.*\n)+", text)
    return first_sentence(re.sub(r"^# ?", "", comment[0].partition("\n#   ")[0], flags=re.M) if comment else "")


def on_post_build(*, config: MkDocsConfig) -> None:
    """llms.txt: what there is, a line a page; llms-full.txt: all of it; and each page as Markdown beside itself.

    There is no sitemap: it would have to name the address of the site, which can lie anywhere.
    """
    site = Path(config.site_dir)
    for name in ("sitemap.xml", "sitemap.xml.gz"):
        (site / name).unlink()
    index = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    whole, part_before = [], None
    for part, page in pages:
        text = text_of(page)
        title = re.search(r"^# (.*)$", text, re.M)
        first = re.search(r"\n\n(?!```|[#>|!<-])(\S.+?)\n\n", text, re.S)
        if title is None or (part != OTHERS and first is None):
            raise PluginError(f"{page.file.src_uri} begins with no title and sentence")
        if part != part_before:
            index += ["", f"## {part}", ""] if part else []
            part_before = part
        says = first_sentence(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", first[1])) if first else "results"
        index.append(f"- [{title[1]}]({page.file.src_uri}): {says}")
        copy = site / page.file.src_uri
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
        whole.append(f"<!-- {page.file.src_uri} -->\n\n{text.rstrip()}\n")
    index += ["", "## Programs and recipes", ""]
    for name, path in sorted(texts.items()):
        index.append(f"- [{path.name}]({name}): {about(path)}")
        whole.append(f"<!-- {name} -->\n\n```{path.suffix[1:]}\n{path.read_text()}```\n")
    index += ["", "## All of it", "", "- [llms-full.txt](llms-full.txt): every page and file above, in one file"]
    (site / "llms.txt").write_text("\n".join(index) + "\n")
    (site / "llms-full.txt").write_text("\n\n".join(whole))
