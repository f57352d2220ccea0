"""The report in a real browser: its numbers read back from the page, against the store's files by numpy alone."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import Tab

from graphbuild.graph.match.match import match_store
from graphbuild.job.verbs import run_verb
from graphbuild.look.report.charts import _mass
from graphbuild.look.report.numbers import SHOWN, _repeated_texts, numbers, repeated_images
from graphbuild.look.report.page import _pictures, render, render_comparison, write_report
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store


@pytest.fixture(scope="module")
def page(store: Path) -> Path:
    return Path(write_report(Store(str(store))))


def arrays(store: Path, pattern: str) -> np.ndarray[Any, Any]:
    return np.concatenate([np.load(path) for path in sorted(store.glob(pattern))])


def drawn(tab: Tab, chart: str) -> list[dict[str, Any]]:
    """What a chart says of itself, without rounding: name, x (texts) and y of each series."""
    if rows := tab.page.locator(f"#{chart}.rows > li").all():
        names = [row.locator("span").text_content() for row in rows]
        return [{"name": chart, "x": names, "y": [float(row.locator("data").get_attribute("value")) for row in rows]}]
    points: list[tuple[str, dict[str, float]]] = tab.page.evaluate(
        f"""[...document.querySelectorAll('#{chart} .points > li')].map(point => [
            point.querySelector('b data').value,
            Object.fromEntries([...point.querySelectorAll('i')].map(
                one => [one.nextSibling.textContent.trim(), Number(one.nextElementSibling.value)]))])"""
    )
    return [
        {"name": name, "x": [x for x, _ in points], "y": [values[name] for _, values in points]}
        for name in points[0][1]
    ]


def test_it_opens_from_disk_alone(tab: Tab, page: Path) -> None:
    tab.page.goto(page.as_uri())
    assert tab.page.title().startswith("graphbuild report")
    charts = ("funnel", "similarity", "spread", "mass", "batches", "indegree", "duplicates", "stages")
    assert [chart.get_attribute("id") for chart in tab.page.query_selector_all(".chart:has(svg)")] == [
        f"chart-{name}" for name in charts
    ]
    assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []


def test_it_is_small_and_names_no_address(page: Path) -> None:
    assert page.stat().st_size < 500_000
    found = json.loads((page.parent / "report.json").read_text())
    groups = (one for group in found["groups"]["largest"] for one in group["members"])
    shown = (one for reason in found["suspicious"] for one in reason["shown"])
    for one in (*found["edges"]["hubs"], *found["duplicates"]["texts"], *groups, *shown):
        one["text"] = one["why"] = ""  # what users wrote may hold addresses
    found["recipe"] = ""
    text = render(found)
    assert re.findall(r"\w+://.*|@import.*|url\(.*", text) == []
    links = re.findall(r"(?:href|src)=\"([^\"]*)\"", text)
    assert links
    assert all(link.startswith("#") for link in links)


@pytest.mark.parametrize("width", [390, 2560])
def test_marks_stand_where_the_ticks_beside_them_say(tab: Tab, page: Path, width: int) -> None:
    tab.page.set_viewport_size({"width": width, "height": 900})
    tab.page.goto(page.as_uri())
    for chart, mark, top, log in (
        ("similarity", "line", r"V([\d.]+)H", False),
        ("spread", "dots", r",([\d.]+)h0", True),
        ("mass", "dots", r",([\d.]+)h0", False),
        ("batches", "area", r"v-([\d.]+)h", False),
        ("indegree", "area", r"v-([\d.]+)h", True),
    ):
        marks_stand(tab, chart, mark, top, log)


def marks_stand(tab: Tab, chart: str, mark: str, top: str, log: bool) -> None:
    plot = tab.page.locator(f"#chart-{chart} .plot")
    pixels, values = [], []
    for tick in plot.locator("span.y").all():
        box, text = tick.bounding_box(), tick.text_content().replace(",", "")
        pixels.append(box["y"] + box["height"] / 2)
        values.append(float(text[:-1]) / 100 if text.endswith("%") else float(text))
    assert len(values) >= 3
    scale = np.log if log else np.asarray
    slope, offset = np.polyfit(scale(values), pixels, 1)
    assert np.abs(slope * scale(values) + offset - pixels).max() < 1
    box = plot.locator("> svg").bounding_box()
    series = drawn(tab, f"chart-{chart}")
    marks = plot.locator(f"path.{mark}").all()
    assert len(marks) == len(series)
    for one, path in zip(series, marks, strict=True):
        tops = np.array(re.findall(top, path.get_attribute("d")), float)
        tops = 100 - tops if mark == "area" else tops
        heights = np.array([value for value in one["y"] if value or mark != "area"])
        expected = slope * scale(heights) + offset
        assert np.abs(box["y"] + tops / 100 * box["height"] - expected).max() < 1
    if mark == "dots":
        ticks = plot.locator("span.x").all()
        centres = [tick.bounding_box()["x"] + tick.bounding_box()["width"] / 2 for tick in ticks]
        slope, offset = np.polyfit([np.log(float(tick.text_content())) for tick in ticks], centres, 1)
        lefts = np.array(re.findall(r"M([\d.]+),", path.get_attribute("d")), float)
        expected = slope * np.log(np.array(one["x"], float)) + offset
        assert np.abs(box["x"] + lefts / 100 * box["width"] - expected).max() < 1


def test_values_are_read_by_hovering_and_by_keys(tab: Tab, page: Path) -> None:
    tab.page.goto(page.as_uri())
    points = tab.page.locator("#chart-spread .points > li")
    shown = (
        "[...document.querySelectorAll('.tip')].filter(e => getComputedStyle(e).opacity === '1').map(e => e.innerText)"
    )
    assert tab.page.evaluate(shown) == []
    points.nth(2).hover()
    (text,) = tab.page.evaluate(shown)
    assert text.split("\n")[0] == "tau_s 0.03"
    assert text.split("\n")[1] == f"batch of 64 {drawn(tab, 'chart-spread')[0]['y'][2]:,.2f}"
    tab.page.mouse.move(0, 0)
    points.first.focus()
    for key, title in (
        ("ArrowRight", "0.02"),
        ("End", "1"),
        ("ArrowRight", "1"),
        ("ArrowLeft", "0.5"),
        ("Home", "0.01"),
    ):
        tab.page.keyboard.press(key)
        (text,) = tab.page.evaluate(shown)
        assert text.split("\n")[0] == f"tau_s {title}"
    tab.page.keyboard.press("Tab")
    assert tab.page.evaluate("document.activeElement.closest('.chart').id") == "chart-mass"


def test_charts_show_the_store_s_numbers(tab: Tab, page: Path, store: Path) -> None:
    tab.page.goto(page.as_uri())
    vectors = arrays(store, "nodes/*.npy").astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    count = len(vectors)
    similarities, neighbors = arrays(store, "graph/*.similarities.npy"), arrays(store, "graph/*.neighbors.npy")
    k = neighbors.shape[1]

    densities = {one["name"]: one for one in drawn(tab, "chart-similarity")}
    for name, values in (("edges", similarities.ravel()), ("the k-th neighbour", similarities[:, -1])):
        middles, heights = np.array(densities[name]["x"], float), np.array(densities[name]["y"])
        bars = np.linspace(-1, 1, 201).round(4)
        shares = np.histogram(values.astype(np.float64), bars)[0] / values.size
        shares = shares[np.rint((middles + 0.995) * 100).astype(int)]
        rounding = np.isin(values.astype(np.float64).round(6) % 0.01, (0.0, 0.01)).mean()  # on the edge of two bars
        assert np.abs(heights * 0.01 - shares).max() <= 0.003 + rounding
        assert np.isclose((heights * 0.01).sum(), 1)
    off_diagonal = cosines[~np.eye(count, dtype=bool)]
    heights = np.array(densities["random pairs"]["y"]) * 0.01
    assert np.isclose(
        (heights * np.array(densities["random pairs"]["x"], float)).sum(), off_diagonal.mean(), atol=0.005
    )

    indegree = np.bincount(neighbors.ravel(), minlength=count)
    (bars,) = drawn(tab, "chart-indegree")
    for label, nodes in zip(bars["x"], bars["y"], strict=True):
        low, _, high = label.partition("-")
        assert nodes == ((indegree >= int(low)) & (indegree <= int(high or low))).sum()
    assert sum(bars["y"]) == count
    hubs = tab.page.locator("#hubs ~ ol.grid").first.locator("data").all()
    assert [int(hub.get_attribute("value")) for hub in hubs] == np.sort(indegree)[::-1][:10].tolist()

    (funnel,) = drawn(tab, "chart-funnel")
    tables = [pq.read_table(path) for path in sorted((store / "samples").glob("*.parquet"))]
    samples = sum(table.num_rows for table in tables)
    captions = sum(table.num_rows - table["node"].null_count for table in tables)
    assert dict(zip(funnel["x"], funnel["y"], strict=True)) == {
        "samples": samples,
        "usable captions": captions,
        "nodes (distinct texts)": count,
        "samples in sidecars": captions,
    }
    told = tab.page.locator("#chart-funnel data").all_inner_texts()
    assert told == [f"{samples:,} samples", f"{captions:,} captions", f"{count:,} nodes", f"{captions:,} samples"]

    spread = drawn(tab, "chart-spread")[-1]
    assert spread["name"] == "batch of 256"
    batch = np.random.default_rng(1).choice(count, 256, replace=False)
    for tau, value in zip(map(float, spread["x"]), spread["y"], strict=True):
        scores = np.exp((cosines[np.ix_(batch, batch)] - 1) / tau)
        target = scores / scores.sum(axis=1, keepdims=True)
        entropies = -(target * np.log(np.maximum(target, 1e-300))).sum(axis=1)
        assert value == pytest.approx(np.exp(entropies.mean()), rel=1e-3)
    mass = {one["name"]: one for one in drawn(tab, "chart-mass")}
    anchors = np.sort(np.random.default_rng(0).choice(count, 256, replace=False))
    for tau, share in zip(map(float, mass[f"+ nearest {k}"]["x"]), mass[f"+ nearest {k}"]["y"], strict=True):
        scores = np.exp((cosines[anchors] - 1) / tau)
        best = np.sort(scores, axis=1)[:, ::-1][:, : k + 1].sum(axis=1) / scores.sum(axis=1)
        assert share == pytest.approx(best.mean(), abs=2e-4)


def test_targets_of_two_views_are_told_for_a_fixed_and_for_calibrated_temperatures(
    tab: Tab, page: Path, store: Path
) -> None:
    vectors = arrays(store, "nodes/*.npy").astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    numbers = json.loads((page.parent / "report.json").read_text())
    rows, similar = numbers["two_views"], numbers["edges"]["similar"]
    off = (vectors @ vectors.T)[~np.eye(len(vectors), dtype=bool)]
    assert similar == pytest.approx(max(0.3, off.mean() + 2 * off.std()), abs=0.01)
    assert [(row["batch"], row["asked"]) for row in rows] == [
        (batch, asked) for batch in (64, 256) for asked in (None, 0.6, 0.8, 0.9, 0.95)
    ]
    for row in rows:
        chosen = vectors[np.random.default_rng(1).choice(len(vectors), row["batch"], replace=False)]
        if row["asked"] is not None:
            assert row["share"] == pytest.approx(row["asked"], abs=0.2)  # captions and hostile strings: two modes
            continue
        target = np.exp((np.tile(chosen @ chosen.T, (1, 2)) - 1) / 0.1)
        own = np.arange(len(chosen))
        target[own, own], target[own, own + len(chosen)] = 0, 1
        target /= target.sum(axis=1, keepdims=True)
        share = target[own, own + len(chosen)]
        entropy = -(target * np.log(np.maximum(target, 1e-300))).sum(axis=1)
        target[own, own + len(chosen)] = 0
        low = target[np.tile(chosen @ chosen.T < similar, (1, 2))].sum() / target.sum()
        found = [row[name] for name in ("tau_s", "share", "deviation", "perplexity", "low")]
        assert found == pytest.approx([0.1, share.mean(), share.std(), np.exp(entropy).mean(), low], rel=1e-3)
    for batch in (64, 256):
        good = [row for row in rows if row["batch"] == batch and row["asked"] is not None and row["low"] <= 0.5]
        assert [row for row in rows if row["batch"] == batch and row["recommended"]] == good[:1]
    tab.page.goto(page.as_uri())
    cells = tab.page.locator("h3 ~ .scroll").first.locator("tbody tr").nth(1).locator("th, td").all_inner_texts()
    assert [cell.split()[0] for cell in cells[:3]] == ["64", "0.6", f"{rows[1]['tau_s']:.3f}"]
    marked = tab.page.locator("h3 ~ .scroll").first.locator("tbody tr:has(b)").all_inner_texts()
    assert len(marked) == sum(row["recommended"] for row in rows)


def test_edges_per_anchor_are_those_of_random_batches(tab: Tab, page: Path, store: Path) -> None:
    tab.page.goto(page.as_uri())
    neighbors = arrays(store, "graph/*.neighbors.npy")
    count, k = neighbors.shape
    random = next(one for one in drawn(tab, "chart-batches") if one["name"] == "random batches")
    for batch, edges in zip((64, 256), random["y"], strict=True):
        assert edges == pytest.approx(k * (batch - 1) / (count - 1), rel=0.25)  # each neighbour is in it by chance


def test_what_was_asked_of_the_graph_has_its_section_and_all_is_accessible(
    tab: Tab, page: Path, store: Path, tmp_path: Path
) -> None:
    tab.page.goto(page.as_uri())
    assert tab.page.locator("#matches").count() == 0
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    captions = pq.read_table(next((copy / "samples").glob("00000.parquet")), columns=["caption"])["caption"]
    asked = [text for text in captions.to_pylist() if text][:20]
    pq.write_table(pa.table({"caption": [*asked, "nothing of the kind"]}), tmp_path / "asked.parquet")
    match_store(Store(str(copy)), "leaks", {"captions": str(tmp_path / "asked.parquet")})
    leaked = pq.read_table(copy / "match/leaks.parquet")
    tab.page.goto(Path(write_report(Store(str(copy)))).as_uri())
    cells = tab.page.locator("#matches ~ .scroll").first.locator("tbody tr").locator("th, td").all_inner_texts()
    assert [cell.strip() for cell in cells[:3]] == ["match/leaks.parquet", f"{len(leaked):,}", "search exact"]
    assert {"21 queries", "20 leaked queries"} <= set(cells[3].split("\n"))
    tab.accessible()


def test_hostile_captions_are_text_and_run_nothing(tab: Tab, page: Path, strings: list[str], tmp_path: Path) -> None:
    numbers = json.loads((page.parent / "report.json").read_text())
    numbers["edges"]["hubs"] = [{"node": at, "indegree": 1, "text": text} for at, text in enumerate(strings)]
    numbers["suspicious"] = [{"reason": "markup", "found": 1, "samples": 1, "shown": []}]
    numbers["suspicious"][0]["shown"] = [{"node": at, "why": text, "text": text} for at, text in enumerate(strings)]
    numbers["duplicates"]["texts"] = [{"samples": 2, "text": text} for text in strings]
    numbers["store"], numbers["funnel"][0]["name"] = strings[-1], "</script><script>alert(1)</script>"
    hostile = tmp_path / "hostile.html"
    hostile.write_text(render(numbers), "utf-8")
    tab.page.goto(hostile.as_uri())
    drawn(tab, "chart-funnel")
    shown = tab.page.evaluate("[...document.querySelectorAll('#hubs ~ ol.grid span')].map(e => e.textContent)")
    plain = [text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "") for text in strings]  # as HTML reads them
    assert shown[: len(strings)] == plain
    for place in ("td.text", "td.why", ".grid span"):
        assert tab.page.evaluate(f"document.querySelectorAll('{place} *:not(br)').length") == 0
    assert tab.page.locator("script").count() == 1


def test_the_page_of_two_stores_is_accessible_and_its_captions_run_nothing(
    tab: Tab, store: Path, other_store: Path, strings: list[str], tmp_path: Path
) -> None:
    page = Path(write_report(Store(str(store)), str(tmp_path), Store(str(other_store))))
    found = json.loads(page.with_name("compare.json").read_text())
    assert found["k"] == 8, "of 8 and 16"
    assert found["overlap_at_k"]["mean"] > 0.99, "of the same vectors; equal similarities may be in another order"
    tab.page.goto(page.as_uri())
    assert tab.page.locator(".sides img").count() == 2 * 5 * len(found["disagreements"])
    assert page.stat().st_size < 1_500_000
    (overlap,) = drawn(tab, "chart-depths")
    assert overlap["y"] == pytest.approx(found["overlap"])
    tab.accessible()
    assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []
    for one, text in zip(found["disagreements"], strings, strict=False):
        one["text"] = text
        for at, near in enumerate(one["nearest"][0] + one["nearest"][1]):
            near["text"] = strings[-at]
    page.write_text(render_comparison(found), "utf-8")
    tab.page.goto(page.as_uri())
    assert tab.page.evaluate("document.querySelectorAll('td.text *, .asked *').length") == 0
    assert tab.page.locator("script").count() == 1


def test_a_phone_shows_captions_whole_and_a_shadow_on_what_scrolls(tab: Tab, page: Path, tmp_path: Path) -> None:
    numbers = json.loads((page.parent / "report.json").read_text())
    text = "several words that say what a photograph shows " * 3
    row = {"node": 1, "why": "https://example", "text": text}
    numbers["suspicious"] = [{"reason": "markup", "found": 1, "samples": 1, "shown": [row]}]
    numbers["duplicates"]["texts"] = [{"samples": 3, "node": 1, "text": text}]
    narrow = tmp_path / "phone.html"
    narrow.write_text(render(numbers, {1: ["data:,"] * 3}), "utf-8")
    tab.page.set_viewport_size({"width": 390, "height": 900})
    tab.page.goto(narrow.as_uri())
    right = "[...document.querySelectorAll('td[dir=auto], td.row')].map(e => e.getBoundingClientRect().right)"
    assert max(tab.page.evaluate(right)) <= 390
    assert min(tab.page.evaluate("[...document.querySelectorAll('td.text[dir=auto]')].map(e => e.clientWidth)")) > 120
    scroll = "[...document.querySelectorAll('.scroll')].map(e => getComputedStyle(e).backgroundImage)"
    assert all(shadow.count("linear-gradient") == 4 for shadow in tab.page.evaluate(scroll))


def test_a_cell_of_a_grid_shows_one_picture_and_a_repeated_caption_several(page: Path) -> None:
    found = json.loads((page.parent / "report.json").read_text())
    node = found["edges"]["hubs"][0]["node"]
    found["duplicates"]["texts"] = [{"samples": 3, "node": node, "text": "a hub that is a repeated caption"}]
    text = render(found, {node: ["data:,"] * 3})
    pictures = [cell.count("<img") for cell in re.findall(r"<li>((?:<img [^>]+>)+)<span", text)]
    assert pictures
    assert set(pictures) == {1}
    assert next(row.count("<img") for row in re.findall(r'<td class="row">((?:<img [^>]+>)+)', text)) == 3


@pytest.mark.parametrize("k", [8, 64, 2048])
def test_no_two_lines_of_a_chart_look_alike(k: int) -> None:
    ranks = [0, *(2**power for power in range(k.bit_length()) if 2**power < k), k]
    mass = _mass({"ranks": ranks, "tau_s": [0.1], "share": [[0.5] * len(ranks)]})
    looks = [(mark["color"], mark["dash"]) for mark in mass["marks"]]
    assert len(set(looks)) == len(ranks)


def test_a_number_of_samples_that_no_node_has_is_a_bar_of_none(tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    pq.write_table(
        pa.table({"node": [0, 1, 2], "samples": [1, 1, 7], "text": ["a", "b", "c"]}),
        tmp_path / "nodes" / "00000.parquet",
    )
    found = _repeated_texts(Store(str(tmp_path)), {"shards": [{"shard": "00000", "nodes": 3}]})
    bars = [(one["from"], one["to"], one["nodes"]) for one in found["samples_per_node"]]
    assert bars == [(1, 1, 2), (2, 2, 0), (3, 4, 0), (5, 8, 1)]
    assert found["texts"] == [{"samples": 7, "node": 2, "text": "c"}]


def test_repeated_images_are_those_that_a_plain_count_over_all_shards_finds(tmp_path: Path) -> None:
    random, rows = np.random.default_rng(0), []
    for shard in range(12):  # 10 and 11 come behind 9
        own = []
        for row in range(30):
            failed, name = random.random() < 0.2, hashlib.sha256(bytes([random.integers(60)])).hexdigest()
            status, digest = ("failed_to_download", None) if failed else ("success", name)
            own.append({"key": f"{shard}-{row}", "caption": f"{row} of {shard}", "status": status, "sha256": digest})
        (tmp_path / "shards").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(own), tmp_path / f"shards/{shard}.parquet")
        rows += own
    counts = Counter(row["sha256"] for row in rows if row["sha256"])  # in the order in which each came first
    expected = [
        {
            "urls": urls,
            **next(
                {name: row[name] for name in ("sha256", "key", "caption")} for row in rows if row["sha256"] == digest
            ),
        }
        for digest, urls in counts.most_common(SHOWN)
    ]
    assert len({one["urls"] for one in expected}) < len(expected) == SHOWN, "some are as many as others"
    assert repeated_images(Store(str(tmp_path))) == expected


def test_a_repeated_image_is_shown_with_all_captions_of_its_sample(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text("a\tb\n" + "".join(f"dog {at}\tbrown dog {at}\n" for at in range(20)))
    store = Store(str(tmp_path / "store"))
    recipe = Recipe(embed=Embed(captions=str(tmp_path / "list.tsv"), caption_column="a;b"), index=Index(k=2))
    with Runner(workers=0) as runner:
        for verb in ("embed", "index"):
            run_verb(verb, recipe, store, runner)
    repeated = {"urls": 2, "sha256": "0" * 64, "key": "3", "caption": "dog 3"}  # as a download's table has it
    found = {**numbers(store), "repeated_images": [repeated, {**repeated, "key": "nobody", "caption": "of old"}]}
    pictures, _ = _pictures(store, found)
    first, second = found["repeated_images"]
    assert first["caption"] == "dog 3 \N{MIDDLE DOT} brown dog 3"
    assert second["caption"] == "of old"
    assert first["caption"] in render(found, pictures)
