"""The page of measured tables is what its script writes from the results that are kept."""

from __future__ import annotations

import json
import re
import statistics

from benchmarks import choose


def test_the_page_is_what_the_script_writes() -> None:
    assert choose.PAGE.read_text() == choose.page(), "python benchmarks/choose.py page"


def test_its_numbers_are_those_of_the_results() -> None:
    """A number of each table, found again by other means."""
    page = choose.page()
    times = [
        row["seconds"]
        for row in map(json.loads, (choose.RESULTS / "knn_epyc.jsonl").read_text().splitlines())
        if row["vectors"] == "captions.npy" and row["name"] == "exact" and "seconds" in row
    ]
    row = re.search(r"^\| 251,610 captions, k = 32 \| exact \|.*$", page, re.M)
    assert row
    assert row[0].split(" | ")[-2] == f"{statistics.median(times):.3g} s, exact"
    kinds = [
        100 * line["metrics"]["linear kind"]
        for line in map(json.loads, (choose.RESULTS / "experiments" / "b.jsonl").read_text().splitlines())
        if (line["group"], line["variant"]) == ("30,000 scenes, twice as long", "CLIP, soft targets")
    ]
    row = re.search(r"^\| captions name the object.*$", page, re.M)
    assert row
    assert f"| {statistics.mean(kinds):.1f} ± {statistics.stdev(kinds):.1f} |" in row[0]
    photos = [
        100 * line["metrics"]["linear class"]
        for line in map(json.loads, (choose.RESULTS / "experiments" / "f.jsonl").read_text().splitlines())
        if (line["group"], line["variant"]) == ("p = 0.1", "CLIP, soft")
    ]
    row = re.search(r"^\|.*\(p = 0\.1\) \|.*$", page, re.M)
    assert row
    assert row[0].endswith(f"| {statistics.mean(photos):.1f} ± {statistics.stdev(photos):.1f} |")
    (line,) = [each for each in choose.lines("choose_targets.jsonl") if each["name"].startswith("CC3M")]
    (fixed,) = [each for each in line["two_views"] if each["batch"] == 256 and each["asked"] is None]
    assert f"| CC3M's validation list, {line['nodes']:,} nodes | 256 | {fixed['share']:.2f}, " in page
    first = choose.lines("choose_encoders.jsonl")[0]
    assert (first["same_neighbors"], first["divergence"]) == (1.0, 0.0), "others are compared with the first"
    assert "| - | - | - | - |" not in page
