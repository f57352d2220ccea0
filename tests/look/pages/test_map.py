"""The explorer's map: where nodes lie, what colours them, what is selected; and the folder that needs no server."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import networkx
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from browser import Serve, Tab, draw, fetch, signed_in, wait_for
from matplotlib.path import Path as Outline
from scipy.sparse.csgraph import connected_components
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.neighbors import NearestNeighbors

from graphbuild.errors import ConfigError, InputError
from graphbuild.graph.lists import derived
from graphbuild.job.verbs import run_verb
from graphbuild.look.catalog import Catalog
from graphbuild.look.explore import duplicates as duplicating
from graphbuild.look.explore import map as maps
from graphbuild.look.explore import write_static
from graphbuild.look.explore.duplicates import duplicates
from graphbuild.look.explore.layout import hierarchy, joined, lay_out
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store

GROUPS, SAMPLES = 8, 600
POINTS = "Array.from({length: chart.count}, (_, p) => [chart.node(p), chart.places[2 * p], chart.places[2 * p + 1]])"


def grouped(n: int, d: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Unit vectors about GROUPS centres, and the centre of each."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, GROUPS, n)
    vectors = rng.standard_normal((GROUPS, d))[label] + 0.7 * rng.standard_normal((n, d))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), label


def nearest(vectors: np.ndarray[Any, Any], k: int) -> np.ndarray[Any, Any]:
    return NearestNeighbors(n_neighbors=k).fit(vectors).kneighbors(return_distance=False).astype(np.int32)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray[Any, Any]:
    return grouped(1_500, 12)[0]


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of tars with vectors beside them: captions of several lengths, and JSON members."""
    folder = tmp_path_factory.mktemp("map")
    vectors, label = grouped(SAMPLES, 12, 1)
    vectors[::50] = vectors[1::50]  # near-duplicates
    captions = [f"{'word ' * (1 + at % 5)}of group {label[at]} number {at}" for at in range(SAMPLES)]
    for number in range(3):
        with tarfile.open(folder / f"{number:05}.tar", "w") as archive:
            for at in range(200 * number, 200 * number + 200):
                about = {"width": 100 + at % 7} | ({"source": f"site {at % 3}"} if at % 11 else {})
                for extension, content in (("txt", captions[at].encode()), ("json", json.dumps(about).encode())):
                    info = tarfile.TarInfo(f"{at:04}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    keys = [f"{at:04}" for at in range(SAMPLES)]
    pl.DataFrame({"key": keys, "embedding": vectors.astype(np.float32).tolist()}).write_parquet(folder / "v.parquet")
    embed = Embed(shards=f"{folder}/*.tar", vectors=f"{folder}/v.parquet", key_column="key")
    with Runner(workers=0) as runner:
        for verb in ("embed", "index"):
            run_verb(verb, Recipe(embed=embed, index=Index(k=10)), Store(str(folder / "store")), runner)
    return folder / "store"


@pytest.fixture(scope="module")
def catalog(mapped: Path) -> Catalog:
    return Catalog(Store(str(mapped)))


@pytest.fixture(scope="module")
def plural(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of samples of two captions each, and with a number in their JSON."""
    folder = tmp_path_factory.mktemp("plural")
    with tarfile.open(folder / "0.tar", "w") as archive:
        for at in range(12):
            captions = f"first caption {at}\n<b>other</b> words {at}\n".encode()
            for extension, content in (("txt", captions), ("json", json.dumps({"number": at}).encode())):
                info = tarfile.TarInfo(f"{at:03}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    embed = Embed(shards=f"{folder}/0.tar", caption_member="txt:lines")
    with Runner(workers=0) as runner:
        for verb in ("embed", "index"):
            run_verb(verb, Recipe(embed=embed, index=Index(k=4)), Store(str(folder / "store")), runner)
    return folder / "store"


# -- places


def test_places_keep_far_more_neighbours_than_principal_components_and_are_as_trustworthy_as_scikit_learn_says(
    vectors: np.ndarray[Any, Any],
) -> None:
    lists = nearest(vectors, 15)
    places, _ = lay_out(lists)
    flat = PCA(2, random_state=0).fit_transform(vectors)
    near = [set(row) for row in nearest(places, 15)]
    share = np.mean([len(near[node] & set(row)) / 15 for node, row in enumerate(lists)])
    assert maps.kept(places, lists) == pytest.approx(share, abs=1e-3)
    assert share > 2 * maps.kept(flat.astype(np.float32), lists) > 0
    trusted = [trustworthiness(vectors, found, n_neighbors=15) for found in (places, flat)]
    assert trusted[0] > max(trusted[1], 0.93)


def test_one_graph_has_one_map_whatever_the_number_of_threads(
    vectors: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = nearest(vectors, 15)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        found.append(lay_out(lists)[0].tobytes())
    assert found[0] == found[1]


def test_communities_are_as_modular_as_those_of_networkx(vectors: np.ndarray[Any, Any]) -> None:
    lists = nearest(vectors, 15)
    label = joined(hierarchy(lists)[0])
    graph = networkx.Graph((node, int(other)) for node, row in enumerate(lists) for other in row)
    measured = networkx.community.modularity
    ours = measured(graph, [set(np.flatnonzero(label == one)) for one in range(label.max() + 1)])
    theirs = measured(graph, networkx.community.louvain_communities(graph, seed=0))
    assert ours > 0.9 * theirs > 0.3


@pytest.mark.parametrize(
    ("case", "lists"),
    {
        "one node": np.empty((1, 0)),
        "two nodes": [[1], [0]],
        "no edges": np.empty((5, 0)),
        "islands": [[node ^ 1] for node in range(300)],
        "a hub that all list": [[1], *[[0]] * 400],
        "all list all": [[other for other in range(9) if other != node] for node in range(9)],
    }.items(),
)
def test_odd_graphs_have_finite_places_apart(case: str, lists: Any) -> None:
    places, _ = lay_out(np.array(lists, np.int32).reshape(len(lists), -1))
    assert np.isfinite(places).all()
    assert len(np.unique(places, axis=0)) == len(lists)
    assert np.abs(places).max() < 2_000


# -- the kept map


def test_the_map_is_made_once_for_a_graph_and_left_out_of_a_store_that_cannot_be_written(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, made = catalog.store, []
    monkeypatch.setattr(maps, "lay_out", lambda *given: made.append(1) or lay_out(*given))
    first = maps.node_map(catalog)
    again = maps.node_map(catalog)
    assert len(made) == 1
    assert first.about == again.about == json.loads(Path(store.path(maps.MADE)).read_text())
    assert np.array_equal(np.load(store.path("explore/places.npy")), first.places)
    other = SimpleNamespace(**{name: getattr(catalog.graph, name) for name in ("fingerprint",)})
    Path(store.path(maps.MADE)).write_text(json.dumps(first.about | {"graph": other.fingerprint[::-1]}))
    maps.node_map(catalog)
    assert len(made) == 2, "of another graph"

    def refused(self: Store) -> None:
        raise ConfigError("cannot write to it", "give another")

    Path(store.path(maps.MADE)).unlink()
    monkeypatch.setattr(Store, "check_writable", refused)
    assert maps.node_map(catalog).about == first.about
    assert not store.exists(maps.MADE)
    assert "not kept: cannot write to it" in caplog.text
    monkeypatch.undo()
    maps.node_map(catalog)


def test_points_are_all_nodes_once_and_the_first_ones_are_spread_over_all(catalog: Catalog) -> None:
    nodes = maps.node_map(catalog).nodes_of_points()
    assert sorted(nodes) == list(range(len(catalog.graph)))
    gaps = np.diff(np.sort(nodes[:60]))
    assert gaps.max() < 3 * len(nodes) / 60


def test_nodes_that_no_sample_has_any_more_are_not_drawn(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = np.zeros(len(catalog.graph), bool)
    gone[[3, 77]] = True
    fresh = Catalog(catalog.store)
    monkeypatch.setitem(fresh.graph.__dict__, "gone", gone)
    made = maps._made(fresh, lambda share: None)
    assert np.array_equal((made.places == maps.CORNER).all(axis=1), gone)
    assert np.array_equal(made.codes == maps.NONE, gone)


# -- colours, selections, duplicates


def first_values(mapped: Path, of: dict[str, Any]) -> list[Any]:
    """Of each node the value of its first sample, by the store's files."""
    rows = pl.concat([pl.read_parquet(path) for path in sorted((mapped / "samples").glob("*.parquet"))])
    firsts = rows.sort("row").unique("node", keep="first").sort("node")
    return [of[key] for key in firsts["key"]]


def test_colours_are_those_of_the_samples_columns_and_json_members(catalog: Catalog, mapped: Path) -> None:
    made = maps.node_map(catalog)
    points = made.nodes_of_points()
    keys = [f"{at:04}" for at in range(SAMPLES)]
    widths = np.array(first_values(mapped, {key: 100 + at % 7 for at, key in enumerate(keys)}))[points]
    legend, codes = maps.codes_by(catalog, made, "width")
    assert (legend["kind"], legend["ticks"][0], legend["ticks"][-1]) == ("numbers", 100, 106)
    order = {
        width: {code for code, one in zip(codes, widths, strict=True) if one == width} for width in range(100, 107)
    }
    assert all(len(found) == 1 for found in order.values())
    assert sorted(order, key=lambda width: min(order[width])) == list(range(100, 107)), "by rank"

    sources = {key: f"site {at % 3}" if at % 11 else None for at, key in enumerate(keys)}
    wanted = [first_values(mapped, sources)[node] for node in points]
    legend, codes = maps.codes_by(catalog, made, "source")
    names = [one["name"] for one in legend["names"]]
    assert [names[code] if code != maps.NONE else None for code in codes] == wanted
    assert [one["size"] for one in legend["names"]] == [wanted.count(name) for name in names]

    legend, codes = maps.codes_by(catalog, made, "LENGTH(caption) > 40 AND source = 'site 1'")
    assert legend["kind"] == "truth"
    text = [pq.read_table(path)["text"].to_pylist() for path in sorted((mapped / "nodes").glob("*.parquet"))]
    texts = [one for part in text for one in part]
    long = [len(texts[node]) > 40 and source == "site 1" for node, source in zip(points, wanted, strict=True)]
    assert [code == 1 for code in codes] == long

    counted = np.bincount(
        np.concatenate([np.load(p) for p in sorted((mapped / "graph").glob("*.neighbors.npy"))]).ravel()
    )
    legend, codes = maps.codes_by(catalog, made, "degree")
    assert (legend["ticks"][0], legend["ticks"][-1]) == (counted.min(), counted.max())
    assert np.corrcoef(np.frombuffer(codes, np.uint8), counted[points])[0, 1] > 0.8
    for bad, says in (("width >", "cannot be read"), ("nothing", "no sample"), ("SUM(width)", "more than one sample")):
        with pytest.raises(ConfigError, match=says):
            maps.codes_by(catalog, made, bad)


def test_a_lasso_and_a_filter_become_a_selection_that_select_takes(catalog: Catalog, mapped: Path) -> None:
    from graphbuild.graph.select.rules import select

    made = maps.node_map(catalog)
    corners = [
        [9_000.5, 20_000.5],
        [50_000.5, 11_000.5],
        [60_000.5, 48_000.5],
        [30_000.5, 30_000.5],
        [12_000.5, 60_000.5],
    ]
    inside = Outline(corners).contains_points(made.places.astype(float))
    assert 20 < inside.sum() < len(inside) - 20
    said = maps.select_on_map(catalog, made, {"name": "drawn", "polygon": corners, "where": "width < 104"})
    assert said["file"] == str(mapped / "selections/drawn.parquet")
    found = pq.read_table(said["file"])
    rows = pl.concat([pl.read_parquet(path) for path in sorted((mapped / "samples").glob("*.parquet"))]).sort("row")
    wanted = [bool(inside[node]) and row % 7 < 4 for row, node in zip(rows["row"], rows["node"], strict=True)]
    assert found["keep"].to_pylist() == wanted
    assert said["kept"] == sum(wanted)
    again = select(catalog.graph, keep=[said["file"]]).table()
    assert again["keep"].to_pylist() == wanted
    for bad, says in (
        ({"name": "x"}, "nothing is selected"),
        ({"name": "x", "polygon": "round"}, "no list of corners"),
    ):
        with pytest.raises(InputError, match=says):
            maps.select_on_map(catalog, made, bad)


def test_every_threshold_counts_the_duplicates_that_connected_components_have(catalog: Catalog, mapped: Path) -> None:
    found = duplicates(catalog)
    assert found == duplicates(catalog), "read again"
    lists, values = (
        np.concatenate([np.load(path) for path in sorted((mapped / "graph").glob(f"*.{name}.npy"))])
        for name in ("neighbors", "similarities")
    )
    nodes = pl.concat([pl.read_parquet(path) for path in sorted((mapped / "samples").glob("*.parquet"))])[
        "node"
    ].to_numpy()
    assert [step["threshold"] for step in found["steps"]] == [step / 200 for step in range(200, 99, -1)]
    for step in found["steps"][::10]:
        joins = np.zeros((len(lists), len(lists)), bool)
        at, place = np.nonzero(values.astype(np.float32) >= step["threshold"])
        joins[at, lists[at, place]] = True
        _, label = connected_components(joins, directed=False)
        sizes = np.bincount(label[nodes])
        assert (step["drop"], step["groups"]) == ((sizes[sizes > 0] - 1).sum(), (sizes > 1).sum()), step["threshold"]
    vectors = np.concatenate([np.load(path) for path in sorted((mapped / "nodes").glob("*.npy"))]).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    shown = [pair | {"limit": step["threshold"]} for step in found["steps"] for pair in step["pairs"]]
    assert len(shown) > 100
    for pair in shown:
        a, b = pair["nodes"]
        assert pair["similarity"] == pytest.approx(vectors[a] @ vectors[b], abs=1e-3)
        assert pair["limit"] - 1e-3 <= pair["similarity"] < pair["limit"] + 0.005 + 1e-3


def test_more_edges_of_the_first_threshold_than_are_held_are_counted_in_parts(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = duplicates(catalog)["steps"][0]
    catalog.store.remove(duplicating.MADE)
    united: list[int] = []
    unite = duplicating.unite
    monkeypatch.setattr(duplicating, "unite", lambda parent, a, b: united.append(len(a)) or unite(parent, a, b))
    monkeypatch.setattr(duplicating, "EDGES", 9)
    monkeypatch.setattr(derived, "BLOCK", 50)
    (step,) = duplicates(catalog)["steps"]
    catalog.store.remove(duplicating.MADE)
    assert len(united) > 1
    assert max(united) <= 9
    assert (step["threshold"], step["drop"], step["groups"]) == (1.0, whole["drop"], whole["groups"])
    assert [pair["similarity"] for pair in step["pairs"]] == pytest.approx([1.0] * 6, abs=1e-3)


# -- the page


def test_the_map_is_drawn_walked_coloured_and_selected_from_by_keyboard(
    tab: Tab,
    serve: Serve,
    mapped: Path,
) -> None:
    tab.page.goto(serve(mapped))
    wait_for(tab, 0)
    draw(tab)
    places = np.load(mapped / "explore/places.npy")
    shown = np.array(tab.page.evaluate(POINTS))
    assert np.array_equal(places[shown[:, 0]], shown[:, 1:])
    assert tab.page.evaluate(
        "Array.from({length: chart.count}, (_, p) => chart.point(chart.node(p)) === p).every(Boolean)"
    )
    assert tab.page.evaluate("chart.node(chart.chosen)") == 0, "the node of the page is marked"
    painted = """() => { const pixels = new Uint8Array(4 * gl.drawingBufferWidth * gl.drawingBufferHeight);
        gl.drawArrays(gl.POINTS, 0, chart.count);
        gl.readPixels(0, 0, gl.drawingBufferWidth, gl.drawingBufferHeight, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
        return pixels.filter((value, at) => at % 4 === 3 && value > 0).length; }"""
    tab.page.wait_for_timeout(300)
    assert tab.page.evaluate(painted) > SAMPLES, "pixels"
    named = tab.page.locator("#map-legend li").all_text_contents()
    assert sum(int(text.rpartition("(")[2].rstrip(")").replace(",", "")) for text in named) == len(places)

    tab.page.focus("#map")
    tab.page.keyboard.press("ArrowRight")
    chosen = tab.page.evaluate("chart.node(chart.chosen)")
    assert places[chosen][0] > places[0][0]
    tab.page.keyboard.press("Enter")
    wait_for(tab, chosen)
    before = tab.page.evaluate("chart.zoom")
    tab.page.keyboard.press("+")
    assert tab.page.evaluate("chart.zoom") > before
    tab.page.select_option("#colour", "source")
    tab.wait("document.getElementById('map-legend').textContent.includes('site 1')")
    assert "no value" in tab.page.text_content("#map-legend")
    tab.page.fill("#where", "width < 102")
    tab.page.press("#where", "Enter")
    tab.wait("document.getElementById('selected').textContent.includes('selected')")
    tab.page.click("#in-view")
    tab.page.fill("#name", "by-hand")
    tab.page.click("#save")
    tab.wait("document.getElementById('selected').textContent.includes('samples, in')")
    selection = pq.read_table(mapped / "selections/by-hand.parquet")
    assert 0 < sum(selection["keep"].to_pylist()) < SAMPLES
    corners = Outline(tab.page.evaluate("chart.corners"))
    rows = pl.concat([pl.read_parquet(path) for path in sorted((mapped / "samples").glob("*.parquet"))]).sort("row")
    inside = corners.contains_points(places.astype(float))[rows["node"].to_numpy()]
    assert selection["keep"].to_pylist() == (inside & (rows["row"].to_numpy() % 7 < 2)).tolist()

    tab.page.click("#duplicates-show")
    tab.wait("!document.getElementById('duplicates-parts').hidden")
    tab.page.locator("#threshold").evaluate("(e) => { e.value = 0.9; e.dispatchEvent(new Event('input')); }")
    step = next(one for one in duplicates(Catalog(Store(str(mapped))))["steps"] if one["threshold"] == 0.9)
    assert f"{step['drop']} of {SAMPLES} samples" in tab.page.text_content("#duplicates-says")
    assert tab.page.locator("#above li:not(.quiet)").count() == len(step["pairs"])
    tab.accessible()


def test_a_click_before_the_page_draws_its_map_draws_no_second_one(tab: Tab, serve: Serve, mapped: Path) -> None:
    held: list[Any] = []

    def hold(route: Any) -> None:
        held.append(route)

    tab.page.route("**/api/stores", hold)
    tab.page.goto(serve(mapped))
    draw(tab)
    held[0].continue_()
    tab.wait("document.getElementById('stores').children.length === 1")
    tab.page.wait_for_load_state("networkidle")
    assert sum("/api/0/map" in url for url in tab.requests) == 1
    assert tab.page.evaluate("chart.places.some((one) => one)")


def test_a_lasso_is_drawn_by_hand_and_a_click_opens_the_point(tab: Tab, serve: Serve, mapped: Path) -> None:
    tab.page.goto(serve(mapped))
    draw(tab)
    box = tab.page.locator("#map").bounding_box()
    tab.page.click("#lasso")
    corners = [(0.2, 0.2), (0.8, 0.25), (0.7, 0.8), (0.3, 0.7)]
    for at, (x, y) in enumerate(corners):
        tab.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        if at == 0:
            tab.page.mouse.down()
    tab.page.mouse.up()
    tab.wait("document.getElementById('selected').textContent.includes('selected')")
    drawn = Outline(tab.page.evaluate("chart.corners"))
    places = np.load(mapped / "explore/places.npy").astype(float)
    assert tab.page.evaluate("chart.dims.filter((one) => !one).length") == drawn.contains_points(places).sum() > 0
    node, x, y = tab.page.evaluate(
        """() => { const p = chart.dims.lastIndexOf(0);
        return [chart.node(p), ...toScreen(chart.places[2 * p], chart.places[2 * p + 1])]; }"""
    )
    tab.page.mouse.click(box["x"] + x, box["y"] + y)
    tab.wait("document.querySelector('.asked dd')?.textContent !== '0'")
    opened = int(tab.page.locator(".asked dd").first.text_content())
    assert np.hypot(*(places[opened] - places[node])) * tab.page.evaluate("chart.zoom") < 3, "the nearest"


def test_several_captions_of_a_sample_are_a_list_and_each_one_s_node_is_coloured_and_filtered(
    tab: Tab, serve: Serve, plural: Path
) -> None:
    tab.page.goto(serve(plural))
    wait_for(tab, 0)
    assert tab.page.locator(".captions li").all_text_contents() == ["first caption 0", "<b>other</b> words 0"]
    draw(tab)
    assert tab.page.evaluate("chart.count") == 24
    for by in ("degree", "nearest", "shard", "number"):
        tab.page.select_option("#colour", by)
        tab.wait(f"chart.by === '{by}'")
        assert tab.page.evaluate("chart.codes.includes(255)") is False, by
        assert "no value" not in tab.page.text_content("#map-legend")
    tab.page.fill("#where", "number < 5")
    tab.page.press("#where", "Enter")
    tab.wait("document.getElementById('selected').textContent.startsWith('10 of 24 points')")
    tab.page.click("#in-view")
    tab.page.click("#save")
    tab.wait("document.getElementById('selected').textContent.startsWith('5 samples, in')")


def test_of_several_captions_each_node_has_its_own_and_its_sample_s_values(plural: Path) -> None:
    catalog = Catalog(Store(str(plural)))
    made = maps.node_map(catalog)
    points = made.nodes_of_points()
    described = catalog.describe(points, np.ones(len(points)))
    values, names = maps._values(catalog.graph, "LENGTH(caption)")
    assert names is None
    assert values[points].tolist() == [len(one.text or "") for one in described]
    values, _ = maps._values(catalog.graph, "number")
    assert values[points].tolist() == [float((one.text or "").split()[-1]) for one in described]
    legend, codes = maps.codes_by(catalog, made, "NULLIF(number, 3)")
    assert (legend["none"], codes.count(maps.NONE)) == (2, 2)


def test_a_selection_that_is_saved_is_the_one_that_is_shown(tab: Tab, serve: Serve, mapped: Path) -> None:
    tab.page.goto(serve(mapped))
    draw(tab)
    tab.page.fill("#where", "width = 101")
    tab.page.press("#where", "Enter")
    tab.wait("!document.getElementById('save').disabled")
    shown = tab.page.evaluate("chart.dims.filter((one) => !one).length")
    for other in ("width = 102", "nothing = 1"):  # typed; and applied without success
        tab.page.fill("#where", other)
        assert tab.page.is_disabled("#save")
        assert "is not applied" in tab.page.text_content("#selected")
    tab.page.press("#where", "Enter")
    tab.wait("document.getElementById('selected').textContent.includes('has a column')")
    assert f"{shown} of {SAMPLES} points are selected" in tab.page.text_content("#selected")
    assert tab.page.is_disabled("#save")
    tab.page.fill("#where", "width = 101")
    assert tab.page.input_value("#name") == "from-map"
    for name, again in (("from-map", False), ("from-map-2", False), ("from-map", True)):
        tab.page.fill("#name", name)
        tab.page.click("#save")
        tab.wait(f"document.getElementById('selected').textContent.includes('{name}.parquet')")
        assert ("(replaced" in tab.page.text_content("#selected")) == again
        kept = pq.read_table(mapped / f"selections/{name}.parquet")["keep"].to_pylist()
        assert kept == [row % 7 == 1 for row in range(SAMPLES)]
    assert tab.page.input_value("#name") == "from-map-3"
    tab.problems[:] = [one for one in tab.problems if "400" not in one]  # the browser logs the refused filter


def test_a_lasso_of_many_corners_takes_a_moment_and_selects_what_the_server_does(
    tab: Tab, serve: Serve, mapped: Path
) -> None:
    tab.page.goto(serve(mapped))
    draw(tab)
    rng, count = np.random.default_rng(3), 3_000_000
    places = (np.arange(count)[:, None] * np.array([40_503, 30_011]) // np.array([1, 7]) % 65_535).astype(np.uint16)
    tab.page.evaluate(
        """(count) => { paint = () => {};
        Object.assign(chart, {count, places: new Uint16Array(2 * count), dims: new Uint8Array(count), kept: null});
        for (let p = 0; p < count; p++) {
            chart.places[2 * p] = p * 40503 % 65535;
            chart.places[2 * p + 1] = Math.floor(p * 30011 / 7) % 65535;
        } }""",
        count,
    )
    turn = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    star = 32_767 + (20_000 + 9_000 * np.sin(9 * turn))[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    for corners in (
        star,
        star.round(),
        rng.uniform(-9_000, 75_000, (60, 2)),  # crosses itself, and leaves the map
        rng.integers(0, 65_535, (40, 2)),
        np.array([[10, 20], [900, 20], [900, 4_000], [10, 4_000]]),
    ):
        taken, left, marked = tab.page.evaluate(
            """(corners) => { chart.corners = corners;
            const once = () => { const begin = performance.now(); dim(); return performance.now() - begin; };
            const taken = [1, 2, 3, 4].map(once);
            return [Math.min(...taken), left, chart.dims.reduce((sum, one, p) => (one ? sum : sum + p), 0)]; }""",
            corners.tolist(),
        )
        inside = np.flatnonzero(maps._inside(places, corners.astype(np.float64)))
        assert (left, marked) == (len(inside), inside.sum())
        assert taken < 3_000 or corners is not star, "milliseconds, also where other work goes on"
    few = places[:20_000]
    assert np.array_equal(maps._inside(few, star), Outline(star).contains_points(few.astype(float)))


def test_colours_are_chosen_from_a_list_and_a_bad_expression_says_what_is_still_shown(
    tab: Tab, serve: Serve, mapped: Path
) -> None:
    tab.page.goto(serve(mapped))
    draw(tab)
    choices = tab.page.locator("#colour option").all_text_contents()
    assert choices[:4] == ["community", "shard", "LENGTH(caption)", "degree"]
    assert {"width", "source"} < set(choices)
    assert tab.page.is_hidden("#colour-by")
    tab.page.select_option("#colour", choices[-1])
    assert tab.page.evaluate("document.activeElement.id") == "colour-by"
    for by, known in (("width * 2", True), ("nothing * 2", False)):
        tab.page.fill("#colour-by", by)
        tab.page.press("#colour-by", "Enter")
        says = "" if known else "The colours are still those by width * 2: no sample"
        tab.wait(f"chart.by === 'width * 2' && document.getElementById('colour-says').textContent.startsWith('{says}')")
        assert tab.page.get_attribute("#map-legend", "aria-label") == "Colours by width * 2"
    tab.page.select_option("#colour", "source")
    tab.wait("chart.by === 'source'")
    none = sum(at % 11 == 0 for at in range(SAMPLES))
    assert f"no value ({none})" in tab.page.text_content("#map-legend")
    assert tab.page.is_hidden("#colour-by")
    assert tab.page.text_content("#colour-says") == ""
    tab.problems[:] = [one for one in tab.problems if "400" not in one]


def test_the_map_is_printed(tab: Tab, serve: Serve, mapped: Path) -> None:
    tab.page.goto(serve(mapped))
    draw(tab)
    tab.page.evaluate("theme('dark')")
    coloured = """[...$('marks').getContext('2d').getImageData(0, 0, $('marks').width, $('marks').height).data]
        .filter((value, at, all) => at % 4 === 3 && value && Math.abs(all[at - 3] - all[at - 1]) > 40).length"""
    tab.page.wait_for_timeout(300)
    assert tab.page.evaluate(coloured) == 0
    tab.page.emulate_media(media="print")
    tab.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.page.evaluate(coloured) > SAMPLES, "pixels, on the canvas that is printed"
    assert tab.page.evaluate("document.documentElement.dataset.theme") == "light"
    swatch = "getComputedStyle(document.querySelector('.swatch')).printColorAdjust"
    assert tab.page.evaluate(swatch) == "exact"
    tab.page.evaluate("dispatchEvent(new Event('afterprint'))")
    tab.page.wait_for_timeout(300)
    assert tab.page.evaluate(coloured) == 0
    assert tab.page.evaluate("document.documentElement.dataset.theme") == "dark"
    tab.problems[:] = [one for one in tab.problems if "getImageData" not in one]  # it is read only here


def test_tab_goes_as_one_sees_and_beside_long_neighbours_the_map_stays_in_view(
    tab: Tab, serve: Serve, store: Path
) -> None:
    tab.page.goto(serve(store))
    wait_for(tab, 0)
    draw(tab)
    where = "(ids) => ids.map((id) => $(id).getBoundingClientRect()).map((box) => [box.left, box.top, box.bottom])"
    parts = ["map-section", "near", "duplicates"]
    order = tab.page.locator("main section[id]").evaluate_all("all => all.map((one) => one.id)")
    assert order == parts
    for width in (390, 1280, 1920):
        tab.page.set_viewport_size({"width": width, "height": 900})
        tab.page.evaluate("scrollTo(0, 0)")
        tab.page.wait_for_timeout(200)
        map_at, near_at, last_at = tab.page.evaluate(where, parts)
        assert (map_at[0] < near_at[0]) if width > 1120 else (map_at[2] <= near_at[1])
        assert last_at[1] >= max(map_at[2], near_at[2])
        if width > 1120:
            tab.page.evaluate("$('near').style.minHeight = '2500px'; scrollTo(0, 400)")
            begin, end = tab.page.evaluate(where, parts)[0][1:]
            assert (begin if end < 899 else end - 900) == pytest.approx(0, abs=2)
            tab.page.evaluate("scrollTo(0, 99999)")
            map_at, _, last_at = tab.page.evaluate(where, parts)
            assert map_at[2] <= last_at[1], "covers nothing"


def test_a_community_s_name_leaves_the_ring_of_the_chosen_node_free(tab: Tab, serve: Serve, mapped: Path) -> None:
    tab.page.goto(serve(mapped))
    draw(tab)
    boxes = tab.page.evaluate(
        """() => { const found = []; const pen = CanvasRenderingContext2D.prototype; const own = pen.fillText;
        pen.fillText = function (text, x, y) { found.at(-1).push([x, y, this.measureText(text).width / 2]); };
        const rings = chart.about.communities.filter((one) => one.x !== undefined).map((one) => {
            chart.chosen = nearest(...toScreen(one.x, one.y), 999);
            found.push([]);
            paintNow();
            return toScreen(chart.places[2 * chart.chosen], chart.places[2 * chart.chosen + 1]);
        });
        pen.fillText = own;
        return rings.map((ring, at) => [ring, found[at]]); }"""
    )
    assert len(boxes) > 3
    for (x, y), names in boxes:
        assert names
        for a, baseline, half in names:
            assert abs(a - x) > half + 9 or y + 9 < baseline - 10 or y - 9 > baseline + 3


def test_pairs_are_shown_within_the_border_that_they_stand_under(tab: Tab, serve: Serve, mapped: Path) -> None:
    tab.page.goto(serve(mapped))
    wait_for(tab, 0)
    tab.page.click("#duplicates-show")
    tab.wait("!document.getElementById('duplicates-parts').hidden")
    shown = tab.page.evaluate(
        """steps.map((step) => { $('threshold').value = step.threshold; border();
        return ['above', 'below'].map((side) => [$(`${side}-title`).textContent.match(/[0-9.]+/g).map(Number),
            [...document.querySelectorAll(`#${side} .similarity`)].map((one) => Number(one.textContent))]); })"""
    )
    assert sum(len(values) for step in shown for _, values in step) > 200
    for step in shown:
        for limits, values in step:
            assert all(limits[0] <= one and (one < limits[-1] or limits == [1]) for one in values), (limits, values)
    said = tab.page.text_content("#mine")
    assert said == f"graphbuild mine {mapped} --what duplicates --threshold 0.5"


def test_bad_requests_about_the_map_are_refused(serve: Serve, mapped: Path) -> None:
    base, mine = signed_in(serve(mapped))
    for path, says in (
        ("api/0/places?begin=0", "count '' is not in"),
        ("api/0/places?begin=-1&count=3", "begin '-1' is not in"),
        ("api/0/colour?by=", "cannot be read"),
        ("api/0/colour?by=nothing", "has a column 'nothing'"),
    ):
        status, _, body = fetch(base + path, **mine)
        assert (status, says in body) == (400, True), (path, body)
    assert fetch(base + "api/0/select", **mine)[0] == 405, "only by POST, which other sites' pages cannot send"


# -- without a server


@pytest.fixture(scope="module")
def page_at() -> Iterator[Callable[[Path], str]]:
    """The address of a folder behind a plain web server."""
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *given: None})
    with contextlib.ExitStack() as running:

        def serve(folder: Path) -> str:
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=folder))
            running.callback(running.enter_context(server).shutdown)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            return f"http://127.0.0.1:{server.server_address[1]}/"

        yield serve


@pytest.fixture(scope="module")
def still(mapped: Path, tmp_path_factory: pytest.TempPathFactory, page_at: Any) -> tuple[str, Path]:
    """The folder of `explore --static`, behind a plain web server, below a path."""
    folder = tmp_path_factory.mktemp("still")
    assert "600 of 600 nodes" in write_static(Store(str(mapped)), str(folder / "some where"))
    return page_at(folder) + "some%20where/", folder / "some where"


def test_a_static_folder_shows_what_the_server_shows(tab: Tab, still: tuple[str, Path], catalog: Catalog) -> None:
    address = still[0]
    tab.page.goto(address + "#node=5")
    wait_for(tab, 5)
    draw(tab)
    ids, similarities = catalog.graph.neighbors(np.array([5]))
    shown = [int(one.get_attribute("data-node")) for one in tab.page.locator(".card").all()]
    assert shown == ids[0].tolist()
    assert float(tab.page.locator(".card").first.get_attribute("data-similarity")) == pytest.approx(
        similarities[0, 0], abs=1e-3
    )
    made = maps.node_map(catalog)
    found = np.array(tab.page.evaluate(POINTS))
    assert np.array_equal(made.places[found[:, 0]], found[:, 1:])
    assert sorted(found[:, 0]) == list(range(len(catalog.graph)))
    tab.page.select_option("#how", "text")
    tab.page.fill("#what", "number 123")
    tab.page.press("#what", "Enter")
    tab.wait("document.querySelector('.card .caption')?.textContent.includes('number 123')")
    assert tab.page.locator(".card .similarity").first.text_content() == "word match"
    assert tab.page.locator(".card .similarity").last.text_content() == "word match 1/2"
    tab.page.select_option("#how", "key")
    tab.page.fill("#what", "0300")
    tab.page.press("#what", "Enter")
    wait_for(tab, catalog.sample("0300").node)
    tab.page.click("#in-view")
    with tab.page.expect_download() as download:
        tab.page.click("#save")
    keys = Path(download.value.path()).read_text().splitlines()
    assert len(keys) == len(set(keys)) == len(catalog.graph)
    assert tab.page.is_hidden("#where"), "no filter works here"
    assert all(request.startswith((address.partition("/some")[0], "blob:")) for request in tab.requests)
    tab.accessible()


def test_a_static_folder_keeps_to_its_size_with_a_sample_of_the_nodes(mapped: Path, tmp_path: Path) -> None:
    said = write_static(Store(str(mapped)), str(tmp_path), most_bytes=400_000)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 400_000
    ids = np.fromfile(tmp_path / "data/ids.bin", "<u4")
    assert 100 < len(ids) < SAMPLES
    assert f"{len(ids)} of 600 nodes" in said
    entries = [one for path in sorted(tmp_path.glob("data/nodes-*.json")) for one in json.loads(path.read_text())]
    assert all(set(one["neighbors"]) <= set(ids.tolist()) for one in entries)


def test_a_static_selection_has_the_keys_of_all_samples_of_its_nodes_each_once(
    tab: Tab, store: Path, tmp_path: Path, page_at: Any
) -> None:
    rows = pl.concat([pl.read_parquet(path) for path in sorted((store / "samples").glob("*.parquet"))])
    rows = rows.filter(pl.col("node").is_not_null())
    write_static(Store(str(store)), str(tmp_path))
    entries = [one for path in sorted(tmp_path.glob("data/nodes-*.json")) for one in json.loads(path.read_text())]
    ids = np.fromfile(tmp_path / "data/ids.bin", "<u4").tolist()
    assert {node: one["keys"] for node, one in zip(ids, entries, strict=True)} == {
        node: part["key"].to_list() for (node,), part in rows.sort("row").group_by("node", maintain_order=True)
    }
    assert rows["node"].n_unique() < len(rows)
    tab.page.goto(page_at(tmp_path))
    wait_for(tab, 0)
    draw(tab)
    tab.page.click("#duplicates-show")
    tab.wait("!document.getElementById('duplicates-parts').hidden")
    halves = tab.page.locator(".half").count()
    assert tab.page.locator(".half img").count() == halves > 0, "pictures of nodes that were not looked at before"
    tab.page.click("#in-view")
    with tab.page.expect_download() as download:
        tab.page.click("#save")
    assert sorted(Path(download.value.path()).read_text().split()) == sorted(rows["key"])
    assert f"{len(rows)} keys of {len(rows)} samples" in tab.page.text_content("#selected")


def test_a_static_folder_that_is_opened_from_disk_says_that_it_needs_a_web_server(
    tab: Tab, still: tuple[str, Path]
) -> None:
    tab.page.goto((still[1] / "index.html").as_uri())
    tab.wait("document.getElementById('problem').textContent.includes('python -m http.server')")


def test_a_static_folder_is_written_anew_and_one_with_other_files_is_left_alone(mapped: Path, tmp_path: Path) -> None:
    write_static(Store(str(mapped)), str(tmp_path / "out"))
    for name in ("data/nodes-7.json", "data/colour-99.bin", "image/3.jpg", "data/own.json"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("[]")
    write_static(Store(str(mapped)), str(tmp_path / "out"))
    found = {path.name for path in (tmp_path / "out").rglob("*")}
    assert found & {"nodes-7.json", "colour-99.bin", "3.jpg", "own.json", "nodes-0.json"} == {
        "own.json",
        "nodes-0.json",
    }
    for name in ("index.html", "static.js"):
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(ConfigError, match="holds other files"):
            write_static(Store(str(mapped)), str(folder))
        assert [path.name for path in folder.iterdir()] == [name]
