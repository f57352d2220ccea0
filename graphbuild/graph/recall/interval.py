"""The 95% interval of a recall that is measured node by node, and may be looked at, and stopped, at any time.

Somebody stakes, node after node, the share f of his money on a ticket that pays a node's recall and costs what the mean
of the nodes not yet drawn would be if the mean of all were m. If the mean of all is m or less, no ticket is worth its
price, and the chance that he ever owns 40 times what he began with is at most 1 in 40 (Ville 1939). So all m at which
he does are ruled out; from above by the same of what recall lacks. He divides his money among several f, as the best
depends on how much nodes differ. (Waudby-Smith and Ramdas 2024, JRSS B 86, section 5; without replacement: NeurIPS
2020.) Nothing is assumed of how recalls are distributed. numpy alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
STAKES = 0.9 / 2.0 ** np.arange(8)
HALVINGS = 30


def interval(shares: Array, nodes: int, error: float = 0.05) -> tuple[float, float]:
    """The interval of the mean over all nodes, of shares [n] in [0, 1] of some, in the order of their draw without
    replacement. With chance 1 - error the true mean is in it however often one looks as n grows."""
    return least_mean(shares, nodes, error / 2), 1 - least_mean(1 - shares, nodes, error / 2)


def least_mean(shares: Array, nodes: int, error: float) -> float:
    """The smallest mean over all nodes that is not ruled out with that error; that of all, where all are drawn."""
    low, high = float(shares.sum()) / nodes, float(shares.mean())  # the others may have none
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if capital(shares, nodes, middle) >= 1 / error else (low, middle)
    return low


def capital(shares: Array, nodes: int, mean: float) -> float:
    """What 1 has become after n tickets, if that is the mean over all nodes. It falls with the mean."""
    price = (nodes * mean - (np.cumsum(shares) - shares)) / (nodes - np.arange(len(shares)))
    if price.min() <= 0:  # more was drawn than there would be
        return np.inf
    with np.errstate(over="ignore"):
        return float(np.exp(np.log1p(STAKES[:, None] * (shares / price - 1)).sum(axis=1)).mean())
