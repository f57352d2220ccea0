"""Tables that help to choose an encoder, an engine, a temperature and a method: docs/how-to/choosing.md.

The words are those of choosing.md beside this script, the numbers those of `benchmarks/results`;
`tests/benchmarks/test_choose.py` holds the page to both. The last two append a line to results/choose_*.jsonl.

    python benchmarks/choose.py page
    python benchmarks/choose.py encoders captions.txt --name NAME --ratings pairs.csv
    graphbuild report STORE && python benchmarks/choose.py targets STORE --name NAME
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "how-to" / "choosing.md"
TEMPLATE = Path(__file__).with_name("choosing.md")  # the page's words, with a name for each table
Line = dict[str, Any]
TAU_S, BATCH, NEAREST = 0.1, 256, 10
FLOORS = (0.95, 0.99, 0.9999)  # of recall; the last one stands for exact
# Experiment, group, measure in percent, what is asked of the data; the methods in order.
METHODS = (
    ("a", "all images", "linear class", "classes and no captions: ten classes of CIFAR-10, their prompts as captions"),
    ("b", "30,000 scenes, twice as long", "linear kind", "captions name the object: its kind"),
    ("b", "30,000 scenes, twice as long", "linear kind swapped", "the same, where the background misleads"),
    ("b", "30,000 scenes, twice as long", "linear texture", "what captions seldom say: the texture"),
    ("b", "1,000 scenes", "linear kind", "few images: the kind, 1,000 scenes"),
    ("f", "p = 1", "linear class", "photos, all with a found caption that mentions the class (p = 1): the class"),
    ("f", "p = 0.3", "linear class", "the same, 30% of the captions mention it (p = 0.3)"),
    ("f", "p = 0.1", "linear class", "the same, 10% of the captions mention it (p = 0.1)"),
    ("i", "shared names", "linear class", "icons with their authors' names: the 64 most frequent names"),
    (
        "i",
        "shared names",
        "mean reciprocal rank",
        "the same: 100 times the mean reciprocal rank of equal names",
    ),
)
NAMES = ("SimCLR", "SupCon", "X-Sample", "CLIP", "CLIP, soft targets")
BATCHES = (
    ("batches of 128, dense targets", "random", "random batches, dense targets"),
    ("batches of 128, dense targets", "windows, all", "batches of neighbours, dense targets"),
    ("batches of 128, sparse targets", "random, sketch", "random batches, targets from edges and sketches"),
    ("batches of 128, sparse targets", "random, background", "random batches, targets from edges alone"),
    ("batches of 128, sparse targets", "windows, background", "batches of neighbours, targets from edges alone"),
)


def lines(name: str) -> list[Line]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    written = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(written)


# -- the page


def page() -> str:
    """docs/how-to/choosing.md as it has to be."""
    tables = {made.__name__: made for made in (speeds, encoders, engines, targets, masses, methods, batches)}
    return re.sub(r"<<(\w+)>>", lambda name: tables[name[1]](), TEMPLATE.read_text())


def speeds() -> str:
    """The default encoder's rates by precision and machine, from embed_epyc.jsonl and the table of embed_xeon.md."""
    rows = []
    for line in lines("embed_epyc.jsonl"):
        if line["encoder"].startswith("graphbuild") or line["encoder"] == "encode, defaults":
            rate = line["captions"] / statistics.median(line["seconds"])
            rows.append((_named(line["encoder"]), "EPYC, AVX-512 BF16", f"{rate:,.0f}", f"{line['mean_cosine']:.5f}"))
    for text in (RESULTS / "embed_xeon.md").read_text().splitlines():
        cells = [cell.strip() for cell in text.strip("| ").split(" | ")]
        if cells[0] in ("graphbuild", "graphbuild, int8", "encode, defaults"):
            rows.append((_named(cells[0]), "Xeon, AMX", cells[1], f"{float(cells[4].split(',')[0]):.5f}"))
    return table(("all-MiniLM-L6-v2, 384 numbers", "machine", "captions/s", "cosine"), rows)


def _named(encoder: str) -> str:
    known = {"graphbuild": "graphbuild, bfloat16", "encode, defaults": "sentence-transformers, float32"}
    return known.get(encoder, encoder)


def encoders() -> str:
    parts = []
    for name, rows in _grouped(lines("choose_encoders.jsonl"), "name"):
        cells = [
            (
                row["encoder"],
                f"{row['captions_per_cpu_second']:,.0f}",
                str(row["dim"]),
                str(2 * row["dim"]),
                f"{row['same_neighbors']:.1%}",
                f"{row['divergence']:.2g}",
                f"{row['spearman']:.3f}" if "spearman" in row else "-",
            )
            for row in rows
        ]
        head = ("encoder", "captions / CPU s", "d", "bytes a node", "same neighbours", "target", "ratings")
        parts.append(f"{name}, {rows[0]['captions']:,} captions, {rows[0]['machine']}:\n\n{table(head, cells)}")
    return "\n\n".join(parts)


def engines() -> str:
    """A row for each set of vectors and recall: graphbuild's engine, and the quickest peer, by machine."""
    found = [row for file in ("knn.jsonl", "knn_epyc.jsonl") for row in lines(file) if "seconds" in row]
    sizes = {"minilm_50k": "50,000 captions", "captions": "251,610 captions"}
    machines = {"Intel(R) Xeon(R) Processor": "Xeon (AMX)", "AMD EPYC": "EPYC"}
    rows = []
    for (vectors, k), group in sorted(_by(found, "vectors", "k").items(), key=lambda item: _nodes(item[0][0])):
        name = sizes.get(vectors.removesuffix(".npy")) or f"{_nodes(vectors):,} mixed"
        for floor in FLOORS:
            cells = []
            for machine in machines:
                here = [row for row in group if row["machine"].startswith(machine)]
                cells += [_quickest(here, floor, own=True), _quickest(here, floor, own=False)]
            if cells != ["-"] * 4:
                rows.append((f"{name}, k = {k}", "exact" if floor > 0.999 else f"{floor}", *cells))
    head = [
        "vectors of 384",
        "recall",
        *(f"{name}: {who}" for name in machines.values() for who in ("graphbuild", "others")),
    ]
    return table(head, rows)


def _nodes(vectors: str) -> int:
    return {"minilm_50k": 50_000, "captions": 251_610}.get(vectors.removesuffix(".npy")) or int(
        vectors.removesuffix(".npy").split("_")[1]
    )


def _quickest(rows: list[Line], floor: float, *, own: bool) -> str:
    options = []
    for (name, _), runs in _by([{**row, "how": json.dumps(row["settings"])} for row in rows], "name", "how").items():
        if (name in ("exact", "partition")) == own and statistics.median(run["recall"] for run in runs) >= floor:
            options.append((statistics.median(run["seconds"] for run in runs), name))
    return f"{min(options)[0]:.3g} s, {min(options)[1]}" if options else "-"


def targets() -> str:
    rows = []
    for name, group in _grouped(lines("choose_targets.jsonl"), "name"):
        (line,) = group
        sizes = sorted({each["batch"] for each in line["two_views"]})
        for batch in sizes:
            at = {each["asked"]: each for each in line["two_views"] if each["batch"] == batch}
            fixed, own = at[None], at[0.6]
            rows.append(
                (
                    f"{name}, {line['nodes']:,} nodes",
                    f"{batch:,}",
                    *(f"{fixed['share']:.2f}, {fixed['perplexity']:,.0f} alike",),
                    f"{own['share']:.2f} ({own['tau_s']:.3f}), {own['perplexity']:,.0f} alike",
                )
            )
    return table(("captions", "batch", "tau_s = 0.1: other view", "calibrated: other view"), rows)


def masses() -> str:
    rows, ks = [], (0, 8, 16, 32, 64)
    for line in lines("choose_targets.jsonl"):
        mass = line["mass"]
        for tau_s in (0.03, 0.05, 0.1):
            held = dict(zip(mass["ranks"], mass["share"][mass["tau_s"].index(tau_s)], strict=True))
            rows.append((line["name"], str(tau_s), *(f"{held[k]:.0%}" if k in held else "-" for k in ks)))
    return table(("captions", "tau_s", "itself", *(f"k = {k}" for k in ks[1:])), rows)


def methods() -> str:
    rows = []
    for experiment, group, measure, what in METHODS:
        cells = []
        for name in NAMES:
            cells.append(_accuracy(experiment, group, name, measure))
        rows.append((what, *cells))
    return table(("data", *(name.replace("CLIP, soft targets", "CLIP, soft") for name in NAMES)), rows)


def batches() -> str:
    measures = ("linear kind", "linear kind swapped")
    rows = [(what, *(_accuracy("c", group, variant, m) for m in measures)) for group, variant, what in BATCHES]
    return table(("30,000 scenes, X-Sample, batches of 128", "kind", "kind, backgrounds exchanged"), rows)


def _accuracy(experiment: str, group: str, variant: str, measure: str) -> str:
    """A cell of an experiment's own page, which knows the runs that experiments share; without the number of seeds."""
    page = (RESULTS / "experiments" / f"{experiment}.md").read_text()
    section = page.split(f"\n## {group}\n")[1].split("\n## ")[0].split("\nDifferences of paired runs")[0]
    head, _, *rows = [line.strip("| ").split(" | ") for line in section.strip().splitlines() if line.startswith("|")]
    cells = {row[0]: dict(zip(["", *head], row, strict=False)) for row in rows}
    row = cells.get(variant) or cells.get(variant.removesuffix(" targets"), {})
    return row.get(measure, "").partition(" (")[0] or "-"


def _grouped(rows: list[Line], key: str) -> Iterator[tuple[str, list[Line]]]:
    for (name,), group in _by(rows, key).items():
        yield name, group


def _by(rows: list[Line], *keys: str) -> dict[Any, list[Line]]:
    found: dict[Any, list[Line]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


# -- what is measured


def measure_encoders(texts: list[str], name: str, ratings: str | None) -> None:
    """A line for the default encoder in float32, int8 and at smaller widths, and for the means of its input vectors.

    ratings: a CSV without a header, of two sentences and how alike people rated them, 0 to 5.
    """
    import numpy as np
    from fidelity import divergence, target
    from knn import machine
    from scipy.stats import spearmanr
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    from graphbuild.machine.threads import torch_threads
    from graphbuild.nodes.encoder import DEFAULT_ENCODER, find_encoder, open_model

    encoder = find_encoder(DEFAULT_ENCODER)
    random = np.random.default_rng(0)
    drawn = [random.choice(len(texts), min(BATCH, len(texts)), replace=False) for _ in range(4)]
    truth: dict[str, Any] = {}
    pairs = list(csv.reader(Path(ratings).read_text().splitlines())) if ratings else []
    rated = [text for column in (0, 1) for text in (pair[column] for pair in pairs)]
    scores_by_people = [float(pair[2]) for pair in pairs]

    def vectors_of(model: Any) -> tuple[Any, float]:
        """The vectors of all captions and then of all rated sentences; captions a second."""
        model.encode(texts[:64])
        begin = time.process_time()
        vectors = np.asarray(model.encode(texts).vectors, np.float32)
        rate = len(texts) / (time.process_time() - begin)
        more = np.asarray(model.encode(rated).vectors, np.float32) if rated else vectors[:0]
        return np.concatenate([vectors, more]), rate

    def add(label: str, vectors: Any, rate: float) -> None:
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        (first, second), vectors = np.split(vectors[len(texts) :], 2), vectors[: len(texts)]
        scores = vectors @ vectors.T
        np.fill_diagonal(scores, -2)
        near = np.argpartition(-scores, NEAREST)[:, :NEAREST]
        own = [target(vectors[rows] @ vectors[rows].T) for rows in drawn]
        if not truth:
            truth.update(near=near, targets=own)
        same = np.mean([len(np.intersect1d(a, b)) / NEAREST for a, b in zip(near, truth["near"], strict=True)])
        distances = [divergence(a, b) for a, b in zip(truth["targets"], own, strict=True)]
        line = {
            "name": name,
            "encoder": label,
            "dim": vectors.shape[1],
            "captions": len(texts),
            "captions_per_cpu_second": round(rate, 1),
            "same_neighbors": round(float(same), 4),
            "divergence": float(f"{np.mean(distances):.3g}"),
            "machine": machine().replace(",", "").replace(f" {os.cpu_count()} cores", ""),
        }
        if rated:
            line["spearman"] = round(float(spearmanr((first * second).sum(axis=1), scores_by_people).statistic), 4)
        print(json.dumps(line), flush=True)
        with (RESULTS / "choose_encoders.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    with torch_threads(1), tempfile.TemporaryDirectory() as folder:
        vectors, rate = vectors_of(open_model(encoder, "cpu", "float32"))
        add("MiniLM, float32", vectors, rate)
        for dim in (256, 128, 64):  # as --dim does
            add(f"MiniLM, float32, `--dim {dim}`", vectors[:, :dim], rate)
        add("MiniLM, `--precision int8`", *vectors_of(open_model(encoder, "cpu", "int8")))
        whole = SentenceTransformer(str(encoder.folder), device="cpu")
        of_words = whole[0].auto_model.get_input_embeddings().weight.detach().numpy()
        words = Tokenizer.from_str(whole.tokenizer.backend_tokenizer.to_str())
        static = StaticEmbedding(words, embedding_weights=of_words)
        SentenceTransformer(modules=[static], device="cpu").save(folder)
        add("word vectors, static", *vectors_of(open_model(find_encoder(folder), "cpu", "float32")))


def add_targets(store: str, name: str) -> None:
    """A line with what a target over all nodes holds, as `graphbuild report` found, and targets of many batches."""
    from graphbuild import SampleGraph

    report = json.loads((Path(store) / "report" / "report.json").read_text())
    graph = SampleGraph.open(store)
    views = [row for batch in (64, 256, 1_024, 4_096) if batch + 256 <= len(graph) for row in two_views(graph, batch)]
    line = {"name": name, "nodes": len(graph), "k": graph.k, "two_views": _rounded(views)}
    line["mass"] = _rounded(report["mass"])
    with (RESULTS / "choose_targets.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def two_views(graph: Any, batch: int) -> list[Line]:
    """Share of the other view and perplexity of X-Sample's targets, a mean over 256 anchors in many random batches."""
    import numpy as np
    from calibrated import ANCHORS, SPREAD, shares, stored

    from graphbuild.torch.calibration import calibrated

    rows = []
    for asked in (None, 0.6):
        random = np.random.default_rng(batch)
        anchors = np.sort(random.choice(len(graph), ANCHORS, replace=False))
        rest, queries = np.setdiff1d(np.arange(len(graph)), anchors), graph.embeddings(anchors)
        tau = np.full((ANCHORS, 1), 0.1)
        if asked is not None:
            tau = calibrated(stored(graph, anchors), images=batch, other_view=asked, slots=2)[0].double().numpy()
        others = (random.choice(rest, batch - 1, replace=False) for _ in range(max(4, SPREAD // batch)))
        share, perplexity, _ = np.mean([shares(queries @ graph.embeddings(each).T, tau) for each in others], (0, 2))
        tau_s = float(np.median(tau))
        rows.append(
            {"batch": batch, "asked": asked, "tau_s": tau_s, "share": float(share), "perplexity": float(perplexity)}
        )
    return rows


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return {name: _rounded(each) for name, each in value.items()} if isinstance(value, dict) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("page", "encoders", "targets"))
    parser.add_argument("source", nargs="?")
    parser.add_argument("--name")
    parser.add_argument("--ratings", help="of encoders: CSV of two sentences and people's score from 0 to 5")
    options = parser.parse_args()
    if options.what == "page":
        PAGE.write_text(page())
    elif options.source is None or options.name is None:
        parser.error(f"{options.what} takes a source and --name")
    elif options.what == "encoders":
        texts = [line.strip() for line in Path(options.source).read_text().splitlines() if line.strip()]
        measure_encoders(list(dict.fromkeys(texts)), options.name, options.ratings)
    else:
        add_targets(options.source, options.name)


if __name__ == "__main__":
    main()
