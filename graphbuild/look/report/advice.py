"""What the report's numbers recommend, in sentences that hold the number each rests on."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from graphbuild.look.report.targets import LOW
from graphbuild.store.store import Json

ENOUGH = 0.95  # of what the stored lists hold, at which fewer neighbours would do
WELL_HELD = 0.9  # share of a target over all nodes that lists hold where they suffice alone
FIXED = 0.1  # tau_s where no share is recommended
HUBS = 2.0  # skewness of in-degrees
MANY = 0.1  # share of nodes with a near-duplicate, and of nodes whose list ends among random pairs
MISSED = 0.05  # by which the share that was got may differ from what was asked for
CUT = 0.01  # share of texts that the encoder does not read to the end


def advice(n: Json) -> list[Json]:
    """Each: about, says, number (the one it rests on), and whether it warns. n: report.json's other numbers."""
    edges, near = n["edges"], n["edges"]["near_duplicate"]
    mean, deviation, total = edges["random_mean"], edges["random_deviation"], edges["nodes"]
    found, tau_s = _shares(n["two_views"])
    if mean > LOW:  # which the shares rest on
        found = [
            _warning(
                "encoder",
                mean,
                f"Random pairs have a similarity of {mean:.2f} in the mean: this encoder uses a narrow range. "
                f"Thresholds and tau_s that suit another do not suit here, and no share can be recommended. {near} "
                f"is {(near - mean) / max(deviation, 1e-9):.0f} deviations above random. Choose tau_s by the spread "
                "below.",
            )
        ]
    found.append(_neighbors(n["mass"], tau_s))
    counts, bins = np.array(edges["last_similarity"]), np.array(edges["bins"])
    lost = float(counts[bins[1:] <= mean + 2 * deviation].sum() / counts.sum())
    skewness, orphans = edges["indegree_skewness"], edges["no_indegree"] / total
    cut, twins = n["embeddings"].get("truncated", 0) / total, edges["near_duplicate_nodes"] / total
    whole = n["groups"]["truncated"]
    asked = [row for row in n["two_views"] if row["asked"]]
    worst = max(asked, key=lambda row: abs(row["share"] - row["asked"]), default={"asked": 0, "share": 0, "batch": 0})
    warnings = (
        (
            mean <= LOW and abs(worst["share"] - worst["asked"]) > MISSED,
            *("share", worst["share"]),
            f"Asked for a share of {worst['asked']}, calibrated targets of random batches of {worst['batch']:,} keep "
            f"{worst['share']:.2f}: the similarities are of several kinds, as those of two sources or of one large "
            "cluster are, and calibration assumes one. Choose by the share that was got, in the table below.",
        ),
        (
            lost > MANY,
            *("encoder", lost),
            f"The k-th neighbour of {lost:.0%} of the nodes is no nearer than random pairs (mean {mean:.2f} and two "
            "deviations): the ends of their lists say nothing. Use fewer neighbours, or a threshold.",
        ),
        (
            cut > CUT,
            *("encoder", cut),
            f"{cut:.1%} of the texts are longer than the {n['embeddings'].get('max_tokens')} tokens that the encoder "
            "reads: what stands behind counts for nothing. Choose one with a longer window, or shorten the captions.",
        ),
        (
            skewness > HUBS,
            *("hubs", skewness),
            f"The skewness of in-degrees is {skewness:.1f}, and {orphans:.0%} of the nodes are in no list: a few "
            "hubs are everybody's neighbours. Look at them below, or use mutual neighbours.",
        ),
        (
            twins > MANY,
            *("duplicates", twins),
            f"{twins:.0%} of the nodes have a neighbour at {near} or more: without them the lists would reach further. "
            "`graphbuild mine STORE --what duplicates` lists the groups, `select --drop` leaves them out.",
        ),
        (
            whole > 0,
            *("k", whole),
            f"{whole:,} nodes have {edges['k']} neighbours at {near} or more, and perhaps others: only a larger k "
            "shows such groups whole.",
        ),
    )
    found += [_warning(*what) for holds, *what in warnings if holds]
    if not any(one["warns"] for one in found):
        says = (
            f"Nothing speaks against the encoder: random pairs lie at {mean:.2f} with a deviation of "
            f"{deviation:.2f}, the k-th neighbour of {1 - lost:.0%} of the nodes above two deviations; in-degrees "
            f"have a skewness of {skewness:.1f}."
        )
        found.append({"about": "encoder", "number": mean, "warns": False, "says": says})
    return found


def _warning(about: str, number: float, says: str) -> Json:
    return {"about": about, "number": number, "warns": True, "says": says}


def _shares(rows: list[Json]) -> tuple[list[Json], float]:
    """The share to ask for by batch size, and the median tau_s of the largest that is recommended."""
    good = {row["batch"]: row for row in rows if row["recommended"]}
    rest = [row for row in rows if row["batch"] not in good]
    found, tau_s = [], FIXED
    for asked in sorted({row["asked"] for row in good.values()}):
        same = [row for row in good.values() if row["asked"] == asked]
        tau_s = float(np.median([row["tau_s"] for row in same]))
        says = (
            f'In batches of {_listed(same)}: `tau_s="calibrated", other_view={asked}`. The median temperature is then '
            f"{tau_s:.3f}, and at most {max(row['low'] for row in same):.0%} of what other images get goes to "
            f"similarities below {LOW}."
        )
        found.append({"about": "share", "number": asked, "warns": False, "says": says})
    if rest:
        last = [row for row in rest if row["asked"] == rest[-1]["asked"]]
        low = min(row["low"] for row in last)
        says = (
            f"In batches of {_listed(last)} no share does: even at other_view={last[0]['asked']}, {low:.0%} or more "
            f"of what other images get goes to similarities below {LOW}. Take larger batches, neighbour-aware ones, "
            "or hard targets."
        )
        found.append(_warning("share", low, says))
    return found, tau_s


def _listed(rows: list[Json]) -> str:
    return " and ".join(f"{row['batch']:,}" for row in rows)


def _neighbors(mass: Json, tau_s: float) -> Json:
    """How many of the stored neighbours a target needs, at the tau_s of the table that is nearest in ratio."""
    at = int(np.abs(np.log(np.array(mass["tau_s"]) / tau_s)).argmin())
    share, ranks = mass["share"][at], mass["ranks"]
    need = bisect_left(share, ENOUGH * share[-1])
    number = ranks[need]
    says = (
        f"at tau_s = {mass['tau_s'][at]:g} the sample and its nearest {ranks[-1]} hold {share[-1]:.0%} of a target "
        "over all nodes"
    )
    if share[-1] < WELL_HELD:
        number = share[-1]
        says = (
            f"The stored lists are not enough alone: {says}. Train with embeddings or sketches, which the sidecars "
            "carry, or with a smaller tau_s."
        )
    elif need < len(ranks) - 1:
        says = f"k = {max(number, 1)} would do: {says}, and the nearest {number} already {share[need]:.0%}."
    else:
        says = f"Keep k = {number}: {says}; {ranks[-2]} would hold {share[-2]:.0%}."
    return {"about": "k", "number": number, "warns": False, "says": says}
