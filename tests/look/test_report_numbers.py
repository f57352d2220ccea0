"""The report's numbers against references of their own: Python's re and unicodedata, numpy, scipy, loops."""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.special import log_softmax
from scipy.stats import entropy, skew

from graphbuild.errors import ConfigError
from graphbuild.job.verbs import run_verb
from graphbuild.look.report import compare as comparing
from graphbuild.look.report import write_report
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store

Array = np.ndarray[Any, Any]
K = 6


def built(embed: Embed, folder: Path, *, force: bool = False, **index: Any) -> Path:
    with Runner(workers=0) as runner:
        for verb in ("embed", "index"):
            run_verb(
                verb, Recipe(embed=embed, index=Index(**{"k": K, **index})), Store(str(folder)), runner, force=force
            )
    return folder


def of_vectors(folder: Path, vectors: Array, *, force: bool = False, **index: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "vectors.npy").exists():
        np.save(folder / "vectors.npy", vectors.astype(np.float32))
    return built(Embed(vectors=str(folder / "vectors.npy")), folder / "store", force=force, **index)


def of_captions(folder: Path, captions: Sequence[str], vectors: dict[str, Array], **index: Any) -> Path:
    """A store of a list of captions, of which each has the given vector: those of a class matrix."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(vectors)
    unit = np.array([vectors[name] / np.linalg.norm(vectors[name]) for name in names])
    np.save(folder / "matrix.npy", unit @ unit.T)
    (folder / "names.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "list.jsonl").write_text("".join(json.dumps({"caption": caption}) + "\n" for caption in captions))
    embed = Embed(
        captions=str(folder / "list.jsonl"),
        class_names=str(folder / "names.txt"),
        encoder=f"matrix:{folder / 'matrix.npy'}",
    )
    return built(embed, folder / "store", **index)


def reported(store: Path) -> dict[str, Any]:
    write_report(Store(str(store)))
    found: dict[str, Any] = json.loads((store / "report/report.json").read_text())
    return found


def compared(one: Path, other: Path, out: Path | None = None) -> dict[str, Any]:
    page = Path(write_report(Store(str(one)), out and str(out), Store(str(other))))
    assert page == (out or one / "report") / "compare.html"
    found: dict[str, Any] = json.loads(page.with_name("compare.json").read_text())
    return found


def arrays(store: Path, pattern: str) -> Array:
    return np.concatenate([np.load(path) for path in sorted(store.glob(pattern))])


def unit_vectors(store: Path) -> Array:
    vectors = arrays(store, "nodes/*.npy").astype(np.float64)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def texts(store: Path) -> list[str]:
    return [
        text for path in sorted((store / "nodes").glob("*.parquet")) for text in pq.read_table(path)["text"].to_pylist()
    ]


# -- suspicious captions and groups

WORDS = ["amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heath", "islet", "jetty", "knoll", "lagoon"]
WORDS += ["marsh", "orchard", "prairie", "quarry", "ridge"]


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A store of captions that are as they should be, and of some of every kind that should not; and its samples."""
    rng = np.random.default_rng(3)
    plain = [f"the {a} by the {b} near a {c}" for a, b, c in (rng.permutation(WORDS)[:3] for _ in range(200))]
    captions = list(dict.fromkeys(plain))
    captions += [f"IMG_{number:04}.jpg" for number in range(12)]
    captions += [f"{text} - Stock Photo" for text in captions[:15]] + [
        f"Photo credit: {text}" for text in captions[20:31]
    ]
    captions += [f"{text} | seldom" for text in captions[:9]]  # of a pattern that few have
    captions += ["see https://example.org for more", "salt &amp; sand", "<b>bold</b> sand", "a < b and c > d"]
    captions += [
        "Привет hello",
        "a pаypal of sand",
        "плот ab",
        "καλημέρα",
        "grüße aus dem été",
        "東京タワー",
        "Кот",
        "плoт",
    ]
    captions += [f"東京の写真{chr(0x4E00 + number)}" for number in range(61)]
    samples = captions + [captions[3]] * 13 + [captions[4]] * 10 + [captions[5]] * 8
    centre = np.ones(24)
    vectors = {text: 2.5 * centre + rng.standard_normal(24) * 3 for text in captions}
    vectors[captions[40]] = -centre  # far from all others
    for number in range(1, 8):  # two groups that are all but equal
        vectors[captions[50 + number]] = vectors[captions[50]] + rng.standard_normal(24) * 0.05
    vectors[captions[71]] = vectors[captions[70]] * 2
    return of_captions(tmp_path_factory.mktemp("listed"), samples, vectors), samples


@pytest.fixture(scope="module")
def numbers(listed: tuple[Path, list[str]]) -> dict[str, Any]:
    return reported(listed[0])


def reason(numbers: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in numbers["suspicious"] if one["reason"] == name)
    return found


def test_boilerplate_is_what_many_captions_share_but_for_their_numbers(
    numbers: dict[str, Any], listed: tuple[Path, list[str]]
) -> None:
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for caption in dict.fromkeys(listed[1]):
        plain = re.sub("[0-9]+", "#", caption.lower())
        found = [plain] if "#" in plain else []
        for separator in (" - ", " | ", ": "):
            head, _, tail = plain.partition(separator)
            found += [f"{head} …", f"… {tail}"] if tail else []
        for pattern in found:
            counts[pattern] += 1
            first.setdefault(pattern, caption)
    expected = [(count, pattern) for pattern, count in counts.most_common() if count >= 10]
    assert expected == [(15, "… stock photo"), (12, "img_#.jpg"), (11, "photo credit …")]
    found = reason(numbers, "boilerplate")
    assert [row["why"] for row in found["shown"]] == [f"{count} captions: {pattern}" for count, pattern in expected]
    assert [row["text"] for row in found["shown"]] == [first[pattern] for _, pattern in expected]
    assert found["found"] == 3


def test_captions_under_many_samples_are_counted(numbers: dict[str, Any], listed: tuple[Path, list[str]]) -> None:
    many = {text: count for text, count in Counter(listed[1]).items() if count >= 10}
    found = reason(numbers, "repeated")
    assert (found["found"], found["samples"]) == (len(many), sum(many.values())) == (2, 25)
    most = Counter(listed[1]).most_common(3)
    assert [(one["text"], one["samples"]) for one in numbers["duplicates"]["texts"]] == most
    assert [texts(listed[0])[one["node"]] for one in numbers["duplicates"]["texts"]] == [text for text, _ in most]


def scripts(text: str) -> Counter[str]:
    names = (unicodedata.name(letter).split()[0] for letter in text if letter.isalpha())
    kana = dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"), "Han and Kana")
    return Counter(kana.get(name, name.capitalize()) for name in names)


def test_scripts_are_those_of_the_letters_names(numbers: dict[str, Any], listed: tuple[Path, list[str]]) -> None:
    """Captions mainly in another script than most are told, some of each such script."""
    mains = {text: scripts(text).most_common(1)[0][0] for text in dict.fromkeys(listed[1])}
    counts = Counter(mains.values())
    assert counts.most_common(1)[0][0] == "Latin"
    found = reason(numbers, "minority")
    assert found["found"] == found["samples"] == len(mains) - counts["Latin"] == 62 + 5
    told = Counter((row["why"], mains[row["text"]]) for row in found["shown"])
    assert {why for why, _ in told} == {f"{name}: {counts[name]} of {len(mains)} captions" for _, name in told}
    assert {name: count for (_, name), count in told.items()} == {"Greek": 1, "Cyrillic": 4, "Han and Kana": 5}


def test_a_word_of_two_scripts_is_told_with_its_odd_letters(numbers: dict[str, Any]) -> None:
    rows = [(row["text"], row["why"]) for row in reason(numbers, "lookalikes")["shown"]]
    assert rows == [
        ("a pаypal of sand", "pаypal: Cyrillic small letter a"),
        ("плoт", "плoт: Latin small letter o"),
    ]


def test_mixes_of_scripts_are_told_with_the_words_of_the_rarer_ones(
    numbers: dict[str, Any], listed: tuple[Path, list[str]]
) -> None:
    several = {text for text in dict.fromkeys(listed[1]) if len(scripts(text)) > 1} - {"a pаypal of sand", "плoт"}
    rows = [(row["text"], row["why"]) for row in reason(numbers, "scripts")["shown"]]
    assert {text for text, _ in rows} == several
    assert rows == [("Привет hello", "Latin: hello"), ("плот ab", "Latin: ab")]  # 5 of 11, 2 of 6 letters


def test_markup_and_names_of_files_are_told(numbers: dict[str, Any]) -> None:
    rows = {row["text"]: row["why"] for row in reason(numbers, "markup")["shown"]}
    assert reason(numbers, "markup")["found"] == 12 + 3
    assert set(rows.values()) <= {".jpg", "https://", "&amp;", "<b>"}
    assert "a < b and c > d" not in rows


def test_what_is_far_from_all_others_is_no_nearer_than_random_pairs(
    numbers: dict[str, Any], listed: tuple[Path, list[str]]
) -> None:
    cosines = unit_vectors(listed[0]) @ unit_vectors(listed[0]).T
    off = cosines[~np.eye(len(cosines), dtype=bool)]
    nearest = arrays(listed[0], "graph/*.similarities.npy")[:, 0].astype(np.float64)
    assert np.abs(nearest - (cosines - 2 * np.eye(len(cosines))).max(axis=1)).max() < 1e-3
    found = reason(numbers, "far")
    assert found["limit"] == pytest.approx(off.mean() + 2 * off.std(), abs=0.01)
    assert found["found"] == (nearest <= found["limit"]).sum() > 0
    shown = [row["node"] for row in found["shown"]]
    assert nearest[shown].tolist() == np.sort(nearest)[:10].tolist()
    assert [float(row["why"].split()[-1]) for row in found["shown"]] == pytest.approx(nearest[shown], abs=6e-4)
    assert found["shown"][0]["text"] == listed[1][40]


def test_groups_are_the_components_of_near_duplicate_pairs(
    numbers: dict[str, Any], listed: tuple[Path, list[str]]
) -> None:
    lists, values = arrays(listed[0], "graph/*.neighbors.npy"), arrays(listed[0], "graph/*.similarities.npy")
    count = len(lists)
    rows, places = np.nonzero(values.astype(np.float64) >= 0.95)
    pairs = csr_array((np.ones(len(rows)), (rows, lists[rows, places])), (count, count))
    sizes = Counter(connected_components(pairs, directed=False)[1].tolist())
    several = sorted((size for size in sizes.values() if size > 1), reverse=True)
    found = numbers["groups"]
    assert (found["groups"], found["nodes"]) == (len(several), sum(several))
    assert [group["nodes"] for group in found["largest"]] == several == [8, 2]
    assert found["truncated"] == (values[:, -1].astype(np.float64) >= 0.95).sum() == 8
    vectors = unit_vectors(listed[0])
    for one in found["largest"][0]["members"]:
        assert one["text"] in listed[1][50:58]
        first = found["largest"][0]["members"][0]["node"]
        assert one["similarity"] == pytest.approx(vectors[one["node"]] @ vectors[first], abs=1e-3)
    assert len(found["largest"][0]["members"]) == 6


# -- advice


def advice(numbers: dict[str, Any], about: str, *, warns: bool) -> dict[str, Any]:
    return dict(next(one for one in numbers["advice"] if (one["about"], one["warns"]) == (about, warns)))


def agrees_with_its_table(numbers: dict[str, Any]) -> None:
    """Each batch size has one sentence, with the share that the table recommends, or else the largest; k has one."""
    shares = [one for one in numbers["advice"] if one["about"] == "share" and "`tau_s=" in one["says"]]
    for batch in {row["batch"] for row in numbers["two_views"]}:
        rows = [row for row in numbers["two_views"] if row["batch"] == batch]
        (one,) = [one for one in shares if f"{batch:,}" in one["says"].split(":")[0]]
        recommended = [row for row in rows if row["recommended"]]
        row = (recommended or rows)[-1]
        assert (one["number"], one["warns"]) == (row["asked"], not recommended)
        assert f"other_view={row['asked']}`" in one["says"]
        assert f"{row['tau_s']:.3f}" in one["says"]
    assert len([one for one in numbers["advice"] if re.search(r"\bk = |larger k|fewer neighbours", one["says"])]) == 1


def test_a_narrow_encoder_is_warned_of_with_the_mean_of_random_pairs(tmp_path: Path) -> None:
    """And so are captions that are alike, which the least similar pairs tell from it."""
    rng = np.random.default_rng(0)
    narrow = 4 + rng.standard_normal((200, 16)) * 3
    kinds = np.repeat(np.eye(16)[:3], [90, 90, 20], axis=0)  # a random pair is of one kind, or has nothing in common
    for name, vectors, says in (
        ("narrow", narrow, "either the encoder uses a narrow range"),
        ("alike", kinds + rng.standard_normal((200, 16)) * 0.1, "it is the captions that are alike"),
    ):
        store = of_vectors(tmp_path / name, vectors)
        cosines = unit_vectors(store) @ unit_vectors(store).T
        off = cosines[~np.eye(200, dtype=bool)]
        numbers = reported(store)
        found = advice(numbers, "similarity", warns=True)
        assert found["number"] == pytest.approx(off.mean(), abs=0.01)
        assert f"similarity of {found['number']:.2f} in the mean" in found["says"]
        assert says in found["says"]
        lowest = float(re.findall(r"one pair in a hundred lies below (-?[\d.]+):", found["says"], re.I)[0])
        assert lowest == pytest.approx(np.quantile(off, 0.01), abs=0.02)
        assert numbers["edges"]["similar"] == pytest.approx(off.mean() + 2 * off.std(), abs=0.02)
        agrees_with_its_table(numbers)


def test_the_advice_does_not_turn_at_a_mean_similarity(tmp_path: Path) -> None:
    """Stores whose random pairs lie at 0.27 and 0.33 are told the same, but for the numbers."""
    rng, told = np.random.default_rng(1), []
    vectors = rng.standard_normal((200, 32))
    for offset, mean in ((0.61, 0.27), (0.71, 0.33)):
        numbers = reported(of_vectors(tmp_path / str(mean), vectors + offset))
        assert numbers["edges"]["random_mean"] == pytest.approx(mean, abs=0.015)
        agrees_with_its_table(numbers)
        told.append([re.sub(r"[\d.,]+", "#", one["says"]) for one in numbers["advice"]])
    assert told[0] == told[1]


def test_shares_that_calibration_misses_are_warned_of_with_what_was_got(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((400, 64))
    one_kind = reported(of_vectors(tmp_path / "one", vectors))
    sources = vectors + 8 * np.repeat(np.eye(64)[:2], 200, axis=0)
    numbers = reported(of_vectors(tmp_path / "two", sources))
    warned = [one for one in numbers["advice"] if one["about"] == "share" and "of several kinds" in one["says"]]
    missed = [(abs(row["share"] - row["asked"]), row) for row in numbers["two_views"] if row["asked"]]
    most, row = max(missed, key=lambda one: one[0])
    assert most > 0.05
    assert [one["number"] for one in warned] == [row["share"]]
    asked = f"Asked for a share of {row['asked']}, calibrated targets of random batches of {row['batch']}"
    assert warned[0]["says"].startswith(asked)
    assert not any("of several kinds" in one["says"] for one in one_kind["advice"])


@pytest.mark.slow
def test_lists_that_end_among_random_pairs_are_warned_of_with_their_share(tmp_path: Path) -> None:
    store = of_vectors(tmp_path, np.random.default_rng(1).standard_normal((120, 4)), k=40)
    values = arrays(store, "graph/*.similarities.npy")[:, -1].astype(np.float64)
    cosines = unit_vectors(store) @ unit_vectors(store).T
    off = cosines[~np.eye(120, dtype=bool)]
    share = (values <= off.mean() + 2 * off.std()).mean()
    found = advice(reported(store), "k", warns=True)
    assert share > 0.9
    told = re.findall(r"noise for (\d+)% of the nodes", found["says"])
    assert float(told[0]) / 100 == pytest.approx(share, abs=0.02)


@pytest.mark.slow
def test_hubs_are_warned_of_with_the_skewness_of_in_degrees(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    vectors = np.concatenate([np.eye(60) + 0.2, np.full((K, 60), 1.0) + rng.standard_normal((K, 60)) * 0.1])
    store = of_vectors(tmp_path, vectors)
    indegree = np.bincount(arrays(store, "graph/*.neighbors.npy").ravel(), minlength=len(vectors))
    found = advice(reported(store), "hubs", warns=True)
    assert found["number"] == pytest.approx(skew(indegree))
    assert found["number"] > 2
    assert f"is {skew(indegree):.1f}, and {(indegree == 0).mean():.0%} of the nodes" in found["says"]


def test_k_is_the_least_that_holds_nearly_all_that_the_lists_hold(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    centres = np.repeat(rng.standard_normal((50, 64)), 5, axis=0)  # each has four that are near, and no others
    store = of_vectors(tmp_path, centres + rng.standard_normal((250, 64)) * 0.3, k=32)
    found = reported(store)
    (told,) = [one for one in found["advice"] if one["about"] == "k"]
    tau = next(row["tau_s"] for row in found["two_views"][::-1] if row["recommended"])
    tau = min(found["mass"]["tau_s"], key=lambda one: abs(np.log(one / tau)))
    masses = np.exp((np.sort(unit_vectors(store) @ unit_vectors(store).T, axis=1)[:, ::-1] - 1) / tau)
    share = (masses.cumsum(axis=1) / masses.sum(axis=1, keepdims=True)).mean(axis=0)  # [r]: itself and r neighbours
    ranks = [0, 1, 2, 4, 8, 16, 32]
    least = next(rank for rank in ranks if share[rank] - share[0] >= 0.95 * (share[32] - share[0]))
    assert told["number"] == least == 4
    assert f"k = 4 is enough: at tau_s = {tau:g}" in told["says"]
    assert f"hold {share[32]:.1%} of a target over all nodes, and the nearest 4 already {share[4]:.1%}" in told["says"]


@pytest.mark.slow
def test_the_share_is_the_smallest_whose_rest_goes_to_similar_captions(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    centres = np.repeat(rng.standard_normal((20, 24)), 16, axis=0)
    found = reported(of_vectors(tmp_path, centres + rng.standard_normal((320, 24)) * 0.6))
    told = [one for one in found["advice"] if one["about"] == "share"]
    for batch in {row["batch"] for row in found["two_views"]}:
        good = [
            row["asked"] for row in found["two_views"] if row["batch"] == batch and row["asked"] and row["low"] <= 0.5
        ]
        says = next(one for one in told if re.search(rf"\b{batch}\b", one["says"]))
        assert says["number"] == good[0] if good else says["warns"]
    assert any(not one["warns"] for one in told)
    agrees_with_its_table(found)


# -- builds


def test_every_build_that_a_report_showed_is_remembered_once_with_what_had_changed(tmp_path: Path) -> None:
    vectors = np.random.default_rng(6).standard_normal((90, 8))
    store = of_vectors(tmp_path, vectors)
    manifests = [json.loads((store / "manifest.json").read_text())]
    reported(store)
    reported(store)
    of_vectors(tmp_path, vectors, k=9, engine="exact", force=True)
    manifests.append(json.loads((store / "manifest.json").read_text()))
    found = reported(store)["history"]
    lines = [json.loads(line) for line in (store / "report/history.jsonl").read_text().splitlines()]
    assert [line["graph"]["k"] for line in lines] == [K, 9]
    for line, manifest in zip(lines, manifests, strict=True):
        assert line["certificate"] == manifest["recall"]
        assert line["graph"]["fingerprint"] == manifest["graph"]["fingerprint"]
        assert line["nodes"] == len(vectors)
    assert [one["changed"] for one in found] == [[], [f"k: {K} to 9", "engine: auto to exact"]]
    page = (store / "report/index.html").read_text()
    assert f'<td class="text">k: {K} to 9<br>engine: auto to exact<br></td>' in page
    (store / "report/history.jsonl").write_text(json.dumps(lines[0])[:-9])
    with pytest.raises(ConfigError, match=r"history.jsonl is damaged"):
        reported(store)


# -- two stores


def pairs_of(store: Path) -> tuple[list[str], Array, Array]:
    return texts(store), arrays(store, "graph/*.neighbors.npy"), unit_vectors(store)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Stores of the same captions in another order, but for some; with vectors that are alike, and another k."""
    folder, rng = tmp_path_factory.mktemp("two"), np.random.default_rng(7)
    captions = [f"{a} {b}" for a in WORDS[:12] for b in WORDS]
    vectors = {text: rng.standard_normal(12) for text in captions}
    other = {text: vector + rng.standard_normal(12) * 0.4 for text, vector in reversed(vectors.items())}
    return (
        of_captions(folder / "a", captions[:-14] + captions[:30], vectors),
        of_captions(folder / "b", captions[:9:-1], other, k=K + 3),
    )


def test_overlap_and_rank_biased_overlap_are_those_of_their_formulas(two: tuple[Path, Path]) -> None:
    found = compared(*two)
    (ours, lists, _), (theirs, others, _) = map(pairs_of, two)
    common = set(ours) & set(theirs)
    overlaps, rbo, lacking, both, both_rbo = [], {}, 0, {}, {}

    def ranked(a: list[str], b: list[str], depth: int, p: float = 0.9) -> float:
        """Webber et al. 2010: RBO_EXT = X_k / k p^k + (1 - p) / p sum over d of X_d / d p^d."""
        agreed = [len(set(a[:d]) & set(b[:d])) for d in range(1, depth + 1)]
        return agreed[-1] / depth * p**depth + (1 - p) / p * sum(agreed[d - 1] / d * p**d for d in range(1, depth + 1))

    for text in common:
        a = [ours[node] for node in lists[ours.index(text)]]
        b = [theirs[node] for node in others[theirs.index(text)]][:K]
        lacking += sum(one not in common for one in a)
        agreed = [len(set(a[:d]) & set(b[:d])) for d in range(1, K + 1)]
        overlaps.append([agreed[d - 1] / d for d in range(1, K + 1)])
        rbo[text] = ranked(a, b, K)
        a, b = ([one for one in side if one in common] for side in (a, b))
        if depth := min(len(a), len(b)):
            both[text] = len(set(a[:depth]) & set(b[:depth])) / depth
            both_rbo[text] = ranked(a, b, depth)
    assert (found["matched"]["by"], found["matched"]["nodes"], found["k"]) == ("caption", len(common), K)
    assert found["matched"]["lacking"][0] == pytest.approx(lacking / len(common) / K)
    assert found["overlap"] == pytest.approx(np.mean(overlaps, axis=0))
    assert list(found["rbo"].values()) == pytest.approx([np.mean(list(rbo.values()))] * 3), "all nodes: no width"
    assert found["both"]["overlap"]["mean"] == pytest.approx(np.mean(list(both.values())))
    assert found["both"]["rbo"]["mean"] == pytest.approx(np.mean(list(both_rbo.values())))
    assert [one["rbo"] for one in found["disagreements"]] == pytest.approx(sorted(both_rbo.values())[:10])
    for one in found["disagreements"]:
        assert (one["rbo"], one["overlap"]) == pytest.approx((both_rbo[one["text"]], both[one["text"]]))
        nearest = [theirs[node] for node in others[theirs.index(one["text"])][:5]]
        assert [(near["text"], near["both"]) for near in one["nearest"][1]] == [
            (near, near in common) for near in nearest
        ]


def test_captions_that_one_store_lacks_do_not_make_encoders_disagree(tmp_path: Path) -> None:
    """A store beside one that has a third of its captions: the vectors are the same, and so are the lists of both."""
    rng = np.random.default_rng(10)
    vectors = {f"caption {number}": rng.standard_normal(12) for number in range(240)}
    whole = of_captions(tmp_path / "whole", list(vectors), vectors, k=24)
    part = of_captions(tmp_path / "part", list(vectors)[::3], vectors, k=24)
    found = compared(whole, part)
    assert found["overlap_at_k"]["mean"] < 0.5
    assert found["both"]["overlap"]["mean"] == found["both"]["rbo"]["mean"] == pytest.approx(1)
    assert found["matched"]["lacking"] == pytest.approx([2 / 3, 0], abs=0.05)
    page = (whole / "report/compare.html").read_text()
    assert "Warning: the stores do not hold the same captions." in page
    assert "95%:" not in page, "all nodes are drawn"
    compared(whole, whole)
    assert "Warning" not in (whole / "report/compare.html").read_text()


def test_divergences_are_those_of_scipy(two: tuple[Path, Path]) -> None:
    found = compared(*two)
    (ours, _, vectors), (theirs, _, others) = map(pairs_of, two)
    common = [text for text in ours if text in theirs]
    assert found["batch"] == len(common) <= 256, "all are anchors"
    chosen = [at[[of.index(text) for text in common]] for of, at in ((ours, vectors), (theirs, others))]
    targets = {
        (side, tau): np.exp(log_softmax(one @ one.T / tau, axis=1)) + 0.0
        for side, one in enumerate(chosen)
        for tau in (row["tau_s"] for row in found["kl"])
    }
    for row in found["kl"][2:]:  # below, float16 of stored vectors counts
        p, q = targets[0, row["tau_s"]], targets[1, row["tau_s"]]
        assert row["forward"] == pytest.approx(entropy(p, q, axis=1).mean(), rel=2e-3)
        assert row["backward"] == pytest.approx(entropy(q, p, axis=1).mean(), rel=2e-3)
        error = 1.96 * entropy(p, q, axis=1).std() / len(p) ** 0.5
        assert row["forward_error"] == pytest.approx(error, rel=1e-2)
        each = {tau: entropy(p, targets[1, tau], axis=1).mean() for side, tau in targets if side == 1}
        assert row["matching"] == min(each, key=lambda tau: each[tau])


def test_of_drawn_nodes_the_interval_holds_the_mean_of_all(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compared(*two, tmp_path / "all")["overlap_at_k"]
    monkeypatch.setattr(comparing, "SAMPLED", 60)
    some = compared(*two, tmp_path / "some")["overlap_at_k"]
    assert some["low"] < whole["mean"] < some["high"]
    assert 0.02 < some["high"] - some["low"] < 0.5


def test_samples_with_vectors_of_their_own_are_matched_by_key_and_ready_vectors_by_row(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    vectors, keys = rng.standard_normal((40, 8)).astype(np.float32), [f"{number:03}" for number in range(40)]
    sides = []
    for name, order in (("a", np.arange(40)), ("b", np.arange(40)[::-1])):
        (tmp_path / name / "vectors").mkdir(parents=True)
        np.save(tmp_path / name / "vectors/0.npy", vectors[order])
        with tarfile.open(tmp_path / name / "0.tar", "w") as archive:
            for at in order:
                info = tarfile.TarInfo(f"{keys[at]}.txt")
                info.size = len(b"the same text")
                archive.addfile(info, io.BytesIO(b"the same text"))
        embed = Embed(shards=str(tmp_path / name / "0.tar"), vectors=str(tmp_path / name / "vectors"))
        sides.append(built(embed, tmp_path / name / "store"))
    ready = of_vectors(tmp_path / "ready", vectors)
    for one, other, by in ((*sides, "key"), (ready, ready, "row")):
        found = compared(one, other)
        assert (found["matched"]["by"], found["matched"]["nodes"]) == (by, 40)
        assert found["overlap_at_k"]["mean"] == found["rbo"]["mean"] == pytest.approx(1)
        assert max(row["forward"] for row in found["kl"]) == pytest.approx(0, abs=1e-3)
    with pytest.raises(ConfigError, match="have 0 keys in common"):
        write_report(Store(str(sides[0])), None, Store(str(ready)))


# -- images


def test_pictures_are_those_of_the_captions_beside_them_and_the_page_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    colors = rng.integers(0, 2, (260, 3)) * 160 + 40
    captions = [f"group {at % 40} of {at}" if at < 240 else "one caption of all" for at in range(260)]
    names = list(dict.fromkeys(captions))
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for at, (color, caption) in enumerate(zip(colors, captions, strict=True)):
            noise = np.clip(color + rng.integers(-40, 41, (200, 200, 3)), 0, 255).astype(np.uint8)
            content = io.BytesIO()
            Image.fromarray(noise).save(content, "JPEG", quality=95)
            for extension, data in (("jpg", content.getvalue()), ("cls", f"{names.index(caption)}".encode())):
                info = tarfile.TarInfo(f"{at:04}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    centres = rng.standard_normal((41, 16))
    vectors = np.array(
        [centres[at % 40 if at < 240 else 40] + rng.standard_normal(16) * 0.05 for at in range(len(names))]
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(tmp_path / "matrix.npy", vectors @ vectors.T)
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in names))
    embed = Embed(
        shards=str(tmp_path / "0.tar"),
        caption_member="cls",
        class_names=str(tmp_path / "names.txt"),
        encoder=f"matrix:{tmp_path / 'matrix.npy'}",
    )
    page = Path(write_report(Store(str(built(embed, tmp_path / "store"))))).read_text()
    assert len(page) < 1_500_000
    shown = re.findall(
        r'<li>(?:<img src="data:image/jpeg;base64,([^"]+)" alt="">)<span dir="auto">([^<]+)</span>', page
    )
    assert len(shown) == 6 * 6 + 10
    for encoded, caption in shown:
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
        assert picture.shape == (96, 96, 3)
        assert np.abs(picture.mean(axis=(0, 1)) - colors[captions.index(caption)]).max() < 15
    row = re.search(r'<td class="row">((?:<img [^>]+>)+)</td><td class="text" dir="auto">one caption of all', page)
    assert row is not None
    assert row[1].count("<img") == 3
    (tmp_path / "0.tar").unlink()
    page = Path(write_report(Store(str(tmp_path / "store")))).read_text()
    assert "Some images could not be read: " in page
    assert f"{tmp_path}/0.tar" in page
    assert "<img" not in page
