"""What the report's numbers recommend, in sentences that hold the number each rests on."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from graphbuild.look.report.targets import LOW
from graphbuild.store.store import Json

ENOUGH = 0.95  # of what the stored neighbours hold, at which fewer would do
WELL_HELD = 0.9  # share of a target over all nodes that lists hold where they suffice alone
HUBS = 2.0  # skewness of in-degrees
MANY = 0.1  # share of nodes with a near-duplicate, and of nodes whose list ends among random pairs
MISSED = 0.05  # by which the share that was got may differ from what was asked for
CUT = 0.01  # share of texts that the encoder does not read to the end


def advice(n: Json) -> list[Json]:
    """Each: about, says, number (the one it rests on, or recommends), and whether it warns. n: report.json's other
    numbers. First the share to train with, then k, then the similarities; one sentence at least of each."""
    edges, near = n["edges"], n["edges"]["near_duplicate"]
    total, similar = edges["nodes"], edges["similar"]
    found = [*_shares(n["two_views"], similar), _neighbors(n), _similarities(edges)]
    skewness, orphans = edges["indegree_skewness"], edges["no_indegree"] / total
    cut, twins = n["embeddings"].get("truncated", 0) / total, edges["near_duplicate_nodes"] / total
    asked = [row for row in n["two_views"] if row["asked"]]
    worst = max(asked, key=lambda row: abs(row["share"] - row["asked"]), default={"asked": 0, "share": 0, "batch": 0})
    warnings: tuple[tuple[bool, str, float, str], ...] = (
        (
            abs(worst["share"] - worst["asked"]) > MISSED,
            "share",
            worst["share"],
            f"Asked for a share of {worst['asked']}, calibrated targets of random batches of {worst['batch']:,} keep "
            f"{worst['share']:.2f}: the similarities are of several kinds, as those of two sources or of one large "
            "cluster are, and calibration assumes one. The table below has the share that each batch size got.",
        ),
        (
            cut > CUT,
            "encoder",
            cut,
            f"{cut:.1%} of the texts are longer than the {n['embeddings'].get('max_tokens')} tokens that the encoder "
            "reads: what stands behind counts for nothing. Choose one with a longer window, or shorten the captions.",
        ),
        (
            skewness > HUBS,
            "hubs",
            skewness,
            f"The skewness of in-degrees is {skewness:.1f}, and {orphans:.0%} of the nodes are in no list: a few "
            "hubs are everybody's neighbours. Look at them below, or use mutual neighbours.",
        ),
        (
            twins > MANY,
            "duplicates",
            twins,
            f"{twins:.0%} of the nodes have a neighbour at {near} or more: without them the lists would reach further. "
            "`graphbuild mine STORE --what duplicates` lists the groups, `select --drop` leaves them out.",
        ),
    )
    return found + [_warning(about, number, says) for holds, about, number, says in warnings if holds]


def _warning(about: str, number: float, says: str) -> Json:
    return {"about": about, "number": number, "warns": True, "says": says}


def _shares(rows: list[Json], similar: float) -> list[Json]:
    """The share to ask for by batch size, with the median tau_s that it comes to; where none does, the nearest."""
    good = {row["batch"]: row for row in rows if row["recommended"]}
    found = []
    for asked in sorted({row["asked"] for row in good.values()}):
        same = [row for row in good.values() if row["asked"] == asked]
        says = (
            f"{_ask(same)}. At most {max(row['low'] for row in same):.0%} of what other images get then goes to "
            f"similarities below {similar:.2f}."
        )
        found.append({"about": "share", "number": asked, "warns": False, "says": says})
    last = [row for row in rows if row["batch"] not in good and row["asked"] == rows[-1]["asked"]]
    if last:
        low = min(row["low"] for row in last)
        says = (
            f"{_ask(last)}, or hard targets: even so {low:.0%} or more of what other images get goes to similarities "
            f"below {similar:.2f}, and smaller shares give such images more. Larger batches, or neighbour-aware ones, "
            "have more that is similar."
        )
        found.append(_warning("share", last[0]["asked"], says))
    return found


def _ask(rows: list[Json]) -> str:
    sizes, taus = [f"{row['batch']:,}" for row in rows], [f"{row['tau_s']:.3f}" for row in rows]
    fixed = f"a fixed tau_s of {_listed(taus)}" + (", in this order" if len(rows) > 1 else "")
    return f'In batches of {_listed(sizes)}: `tau_s="calibrated", other_view={rows[0]["asked"]}`, or {fixed}'


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _neighbors(n: Json) -> Json:
    """The k to keep: how many of the stored neighbours a target needs, at the tau_s of the table that is nearest in
    ratio to the one recommended for the largest batch; and what speaks against more of them, or for more."""
    edges, mass, rows = n["edges"], n["mass"], n["two_views"]
    recommended = [row for row in rows if row["recommended"]] or rows
    tau_s = recommended[-1]["tau_s"] if recommended else mass["tau_s"][0]
    at = int(np.abs(np.log(np.array(mass["tau_s"]) / tau_s)).argmin())
    share, ranks, k = mass["share"][at], mass["ranks"], mass["ranks"][-1]
    counts, bins = np.array(edges["last_similarity"]), np.array(edges["bins"])
    lost = float(counts[bins[1:] <= edges["random_limit"]].sum() / counts.sum())
    need = bisect_left(share, share[0] + ENOUGH * (share[-1] - share[0]))
    held = f"at tau_s = {mass['tau_s'][at]:g} the sample and its nearest {k} hold {share[-1]:.1%} of a target over all"
    number = k
    if share[-1] < WELL_HELD:
        says = (
            f"Keep k = {k}, and train with the embeddings or sketches that the sidecars carry, not with the lists "
            f"alone: {held} nodes, {share[-1] - share[-2]:.1%} of it in the farther half of them."
        )
    elif need < len(ranks) - 1:
        number = max(ranks[need], 1)
        says = f"k = {number} is enough: {held} nodes, and the nearest {ranks[need]} already {share[need]:.1%}."
    else:
        says = f"Keep k = {k}: {held} nodes; {ranks[-2]} would hold {share[-2]:.1%}."
    if lost > MANY:
        says += (
            f" More would be noise for {lost:.0%} of the nodes, whose k-th neighbour is no nearer than random pairs "
            f"({edges['random_limit']:.2f}, their mean and two deviations)."
        )
    if whole := n["groups"]["truncated"]:
        says += (
            f" Only to see the groups of near-duplicates whole, k is too small for {whole:,} nodes, whose {k} "
            f"neighbours are all at {edges['near_duplicate']} or more."
        )
    return {"about": "k", "number": number, "warns": lost > MANY, "says": says}


def _similarities(edges: Json) -> Json:
    """How alike any two captions are, and whether that is the encoder's doing or theirs."""
    mean, deviation, near, similar = (
        edges[name] for name in ("random_mean", "random_deviation", "near_duplicate", "similar")
    )
    says = (
        f"Random pairs have a similarity of {mean:.2f} in the mean, with a deviation of {deviation:.2f}: what lies "
        f"below {similar:.2f} says little here, and {near} is {(near - mean) / max(deviation, 1e-9):.0f} deviations "
        "above the mean. "
    )
    shares = np.cumsum(edges["random_similarity"]) / edges["random_pairs"]
    lowest = edges["bins"][int(np.searchsorted(shares, 0.01)) + 1]
    if mean > LOW / 2 >= lowest:
        says += (
            f"One pair in a hundred lies below {lowest:.2f}: the encoder does tell captions apart, so it is the "
            "captions that are alike."
        )
    elif mean > LOW / 2:
        says += (
            f"Only one pair in a hundred lies below {lowest:.2f}: either the encoder uses a narrow range, or all "
            "captions are alike. A report on the same captions with another encoder tells which."
        )
    return {"about": "similarity", "number": mean, "warns": mean > LOW, "says": says.strip()}
