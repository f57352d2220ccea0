"""What each view of a batch should find similar: `Targets`, which every loss takes, and X-Sample's soft target.

Whatever targets are given as, a loss reads them as one block: the similarities [B, N] of this rank's B images to all N
of the joint batch. Float32 whatever the autocast state, no gradient; costs one [B, N] product, and the soft target one
matrix of 4 (V B)(V N) bytes. How to choose tau_s, or have it calibrated: docs/explanation/targets.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graphbuild.errors import ConfigError, InputError
from graphbuild.torch.batch_edges import BatchEdges
from graphbuild.torch.calibration import OTHER_VIEW, TauS, calibrated, check_tau_s
from graphbuild.torch.gather import Ranks

SOURCES = ("embeddings", "similarities", "labels", "edges")
STORED = ("node", "neighbors", "similarities", "background")
ALONE = Ranks()


@dataclass(frozen=True, eq=False)
class Targets:
    """What the losses may know of a batch's B images besides z; each loss says what it reads. No gradient flows.

    Args:
        embeddings: [B, d] of the captions, any float type or int8; they are scaled to unit norm inside, so only
            directions count. Similarity is the cosine.
        similarities: [B, B], such as torch.from_numpy(values), values the first of `SampleGraph.block`'s two results,
            and not a finished target: losses with tau_s take the softmax themselves. Row i belongs to anchor i and is
            read as it is, so a directed graph stays directed. Under W ranks that gather:
            [B, W B], this rank's rows against the images of all ranks in rank order, as a [B, B] block knows nothing of
            other ranks' images.
        labels: [B], any integer type, 0 or above: similarity is 1 between equal labels, 0 otherwise. A batch's node
            is one: equal for equal captions or classes, but not the class number.
        edges: a `BatchEdges`: the graph's own lists, completed by sketches or background values.
        class_priors: [B] in [0, 1): the share of the samples that are of an anchor's class, for `DebiasedLoss`.
        calibration: what losses with tau_s="calibrated" read beside embeddings or similarities: a `BatchEdges` with its
            node_count. With edges it is these.
        keep_diagonal: read the block's own diagonal as the similarity of an image to its other view, or to its own
            text. By default that is 1, and the diagonal is not read.

    Raises:
        ConfigError: more than one of embeddings, similarities, labels and edges.
        InputError: what is no Tensor (or `BatchEdges`), a wrong shape or dtype.
    """

    embeddings: Tensor | None = None
    similarities: Tensor | None = None
    labels: Tensor | None = None
    edges: BatchEdges | None = None
    class_priors: Tensor | None = None
    calibration: BatchEdges | None = None
    keep_diagonal: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"targets have both {' and '.join(given)}", "pass one of them")
        if self.embeddings is not None:
            _check_embeddings(self.embeddings)
        if self.similarities is not None and self.similarities.ndim != 2:
            raise InputError(f"similarities have shape {list(self.similarities.shape)}", "pass a block [B, B]")
        for name in ("labels", "class_priors"):
            tensor = getattr(self, name)
            if tensor is not None and (tensor.ndim != 1 or tensor.is_floating_point() != (name == "class_priors")):
                kind = "int64" if name == "labels" else "float32"
                raise InputError(f"{name} are {tensor.dtype} {list(tensor.shape)}", f"pass one {kind} an image: [B]")

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any], tau_s: TauS = 0.1) -> Targets:
        """The best that a loader's batch allows: embeddings; else edges and sketches; else edges and background.

        With its calibration where the batch has `node_count`. tau_s: the target's temperature, by which background
        values stand for absent edges; calibrated ones go by the loss.

        Raises:
            InputError: fields are missing, or are no Tensors.
        """
        missing = [name for name in STORED if name not in batch]
        if missing and "embedding" in batch:
            return cls(embeddings=batch["embedding"])
        if missing:
            raise InputError(
                f"the batch has no embedding, and no {', '.join(missing)}",
                "pass a batch of graph_webdataset or GraphDataset: without embeddings it takes all of "
                + ", ".join(STORED),
            )
        stored = {name: batch[name] for name in STORED}
        stored |= {name: batch.get(name) for name in ("sketch", "node_count")}
        edges = BatchEdges(**stored, tau_s=0.1 if isinstance(tau_s, str) else tau_s)
        return cls(embeddings=batch["embedding"], calibration=edges) if "embedding" in batch else cls(edges=edges)

    def tensors(self) -> dict[str, Tensor]:
        """The given tensors by name."""
        given = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        stored = self.calibration.tensors() if self.calibration is not None else {}
        given |= {f"calibration's {name}": value for name, value in stored.items()}
        return given | (self.edges.tensors() if self.edges is not None else {})

    def to(self, device: torch.device) -> Targets:
        """The same targets on a device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor | BatchEdges)
        }
        return replace(self, **moved)

    def block(self, ranks: Ranks = ALONE) -> Tensor:
        """Similarities [B, N] of this rank's images to those of all `ranks`: float32 (float64 stays), detached.

        Raises:
            ConfigError: no embeddings, similarities or labels.
            InputError: a block that does not fit the joint batch; zero or non-finite embeddings, negative labels, NaN
                or infinity among the similarities, on every rank and naming rows of the joint batch.
        """
        if self.embeddings is not None:
            own = unit_embeddings(self.embeddings)
            every = ranks.concatenate(own)
            usable = (torch.linalg.vector_norm(every, dim=1) - 1).abs() < 0.01  # False for NaN
            fix = "skip samples without a caption (node < 0), and check the store with `graphbuild verify`"
            _check_rows(usable, "embeddings are zero or not finite", fix)
            block = own @ every.T
        elif self.labels is not None:
            labels = self.labels.long()  # some integers no backend gathers: NCCL and gloo no int16
            every = ranks.concatenate(labels)
            _check_rows(every >= 0, "labels are negative", "skip samples without a class or node")
            block = (labels[:, None] == every).float()
        elif self.edges is not None:
            block = self.edges.block(ranks)
        elif self.similarities is not None:
            _check_columns(self.similarities, ranks)
            block = self.similarities.detach().to(compute_dtype(self.similarities), copy=True)
        else:
            raise ConfigError(
                "targets have no embeddings, similarities, labels or edges", "pass one: docs/reference/losses.md"
            )
        if not self.keep_diagonal:
            own = torch.arange(len(block), device=block.device)
            block[own, own + ranks.rank * len(block)] = 1
        if self.similarities is not None:
            finite = ranks.concatenate(torch.isfinite(block).all(dim=1))
            fix = "fill absent edges before the call: see SampleGraph.block"
            _check_rows(finite, "images have NaN or infinity among their similarities", fix)
        return block

    def tempered(self, tau_s: TauS, other_view: float, images: int, slots: float) -> tuple[Targets, float | Tensor]:
        """These targets at a temperature, and that: a number, or where it is calibrated that of each row, [B, 1].
        images, slots: as for `calibrated`. ConfigError: there is no calibration for it, or the own diagonal is kept."""
        if not isinstance(tau_s, str):
            return self, tau_s
        stored = self.edges or self.calibration
        if stored is None or stored.node_count is None or self.keep_diagonal:
            raise ConfigError(
                'tau_s = "calibrated", and the targets have no calibration with a node_count, or keep their diagonal',
                "pass Targets.from_batch(batch) of a batch with node_count: GraphDataset(graph=...) gives it, and"
                " sidecars do once older *.graph.parquet are deleted and `graphbuild export` has run; not with"
                ' captions="mean"',
            )
        temperatures, absent = calibrated(stored, images=images, other_view=other_view, slots=slots)
        edges = self.edges and replace(self.edges, absent=absent[:, 0])
        return replace(self, edges=edges), temperatures

    def priors(self, ranks: Ranks = ALONE) -> Tensor:
        """class_priors [B], detached; ConfigError where there are none, InputError (on every rank) outside [0, 1)."""
        if self.class_priors is None:
            raise ConfigError("targets have no class_priors", "pass Targets(class_priors=...), or a constant tau_plus")
        every = ranks.concatenate(self.class_priors.detach())
        _check_rows((every >= 0) & (every < 1), "class priors are outside [0, 1)", "pass shares of the data set")
        return self.class_priors.detach()


def similarity_targets(
    embeddings: Tensor | None = None,
    *,
    tau_s: TauS,
    views: int = 2,
    similarities: Tensor | None = None,
    keep_self: bool = False,
    other_view: float = OTHER_VIEW,
    calibration: BatchEdges | None = None,
) -> Tensor:
    """The X-Sample target of a batch (Sobal et al., arXiv 2407.18134).

    With G_ij the cosine of the captions of views i and j, 1 between views of the same image, the target is
    s_ij = exp(G_ij / tau_s) / sum over j' != i of exp(G_ij' / tau_s), and s_ii = 0. Views are ordered
    view-major: all B of view 1, then all B of view 2, and so on.

    Args:
        embeddings: [B, d], any float type or int8; only directions count.
        tau_s: temperature of the target, above 0; or "calibrated": for each anchor the one at which its other views
            (with keep_self and one view: its own slot) keep `other_view` of its target, in the mean over random batches
            of this size. Where many samples share a caption, as class prompts do, they keep less: use labels there.
        views: V, views of each image.
        similarities: [B, B], given instead of embeddings, such as torch.from_numpy(values), values the first of
            `SampleGraph.block`'s two results. The diagonal is not read.
        keep_self: leave the self slot in, at G_ii = 1. With views=1 this is the target of `CLIPLoss(tau_s)`: the own
            text, and similar ones. With two views some public code does so; it takes mass from the other view.
        other_view, calibration: that share, and what the graph stores of the images, as for `Targets`: of a loader's
            batch `Targets.from_batch(batch).calibration`.

    Returns:
        [V B, V B] float32 (float64 for float64 input), rows sum to 1, detached, on the input's device.

    Raises:
        ConfigError: a number out of range, no calibration or nothing to calibrate, or not exactly one of embeddings and
            similarities.
        InputError: a wrong shape or dtype, a zero or non-finite embedding, a non-finite similarity.
    """
    check_tau_s(tau_s, other_view)
    if isinstance(tau_s, str) and views == 1 and not keep_self:
        raise ConfigError(
            'tau_s = "calibrated" with one view: no slot of its own whose share could be kept',
            "use two views, or keep_self=True",
        )
    targets = Targets(embeddings=embeddings, similarities=similarities, calibration=calibration)
    given = embeddings if embeddings is not None else similarities
    with torch.autocast(given.device.type if given is not None else "cpu", enabled=False):
        images = 1 if given is None else len(given)
        targets, temperature = targets.tempered(tau_s, other_view, images, views / max(views - 1, 1))
        return softmax_targets(targets.block(), first=0, tau_s=temperature, views=views, keep_self=keep_self)


def softmax_targets(block: Tensor, *, first: int, tau_s: float | Tensor, views: int, keep_self: bool = False) -> Tensor:
    """The rows of the soft target that belong to A anchors out of a joint batch of N images.

    Args:
        block: [A, N] similarities, to be changed in place; anchor a is image `first` + a.
        tau_s: one temperature, or [A, 1].

    Returns:
        [V A, V N], columns view-major over the joint batch, rows view-major over the anchors.

    Raises:
        ConfigError: views below 1, or no other view left to find.
    """
    anchors, images = block.shape
    if views < 1 or views * images < 2:
        raise ConfigError(
            f"{views} view(s) of {images} image(s) leave an anchor nothing to find",
            "use two or more views, or a larger batch",
        )
    logits = block.div_(tau_s).repeat(views, views)
    own = self_columns(anchors, images, first, views, logits.device)
    kept = 1 / tau_s if keep_self else -torch.inf
    if isinstance(kept, Tensor):
        return softmax_(logits.scatter_(1, own[:, None], kept.to(logits).repeat(views, 1)))
    return softmax_(logits.scatter_(1, own[:, None], kept))


def softmax_(logits: Tensor) -> Tensor:
    """The softmax of rows [n, m], in place and so without gradient."""
    logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
    return logits.div_(logits.sum(dim=1, keepdim=True))


@torch.no_grad()
def target_facts(weights: Tensor, own: Tensor) -> dict[str, Tensor]:
    """Of targets [n, m], means over the rows: the share of each row's own column [n], and the perplexity, the
    exponential of the entropy. One pass over the targets."""
    perplexity = torch.special.entr(weights).sum(dim=1).exp_().mean()
    return {"other_view": weights.gather(1, own[:, None]).mean(), "perplexity": perplexity}


def self_columns(anchors: int, images: int, first: int, views: int, device: torch.device) -> Tensor:
    """int64 [V A]: of each row the column of V N that is the same view of the same image."""
    image = torch.arange(first, first + anchors, device=device)
    view = torch.arange(views, device=device)[:, None]
    return (view * images + image).flatten()


def unit_embeddings(embeddings: Tensor) -> Tensor:
    """[B, d] embeddings as detached float32 (float64 stays) of unit norm; zero rows stay zero, NaN stays."""
    # The largest entry goes first: squares of tiny or huge float16 and int8 values stay in range.
    exact = embeddings.detach().to(compute_dtype(embeddings))
    exact = exact / exact.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(exact.dtype).tiny)
    return torch.nn.functional.normalize(exact, dim=1)


def check_temperature(name: str, value: float) -> None:
    """Raise ConfigError unless a temperature is above 0 and finite."""
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} = {value}", f"set {name} above 0")


def _check_types(targets: Targets) -> None:
    for name, value in vars(targets).items():
        if value is None or name == "keep_diagonal":
            continue
        if name in ("edges", "calibration"):
            if not isinstance(value, BatchEdges):
                raise InputError(
                    f"{name} are a {type(value).__name__}", "pass a BatchEdges, or Targets.from_batch(batch)"
                )
        elif not isinstance(value, Tensor):
            raise InputError(f"{name} are a {type(value).__name__}, not a Tensor", _tensor_of(value))


def _tensor_of(value: Any) -> str:
    """What to pass instead of a value that is no Tensor."""
    if isinstance(value, tuple):
        return "of SampleGraph.block's two results pass the first, as torch.from_numpy(values)"
    if isinstance(value, Mapping):
        return "pass Targets.from_batch(batch)"
    return "pass torch.from_numpy(array), or torch.tensor(list)"


def _check_embeddings(embeddings: Tensor) -> None:
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise InputError(f"embeddings have shape {list(embeddings.shape)}", "pass one embedding per image: [B, d]")
    if not (embeddings.is_floating_point() or embeddings.dtype == torch.int8):
        raise InputError(f"embeddings are {embeddings.dtype}", "pass float32, float16, bfloat16 or int8")


def _check_rows(usable: Tensor, problem: str, fix: str) -> None:
    """Raise InputError, naming the rows, unless all of the joint batch's rows are usable, bool [N]."""
    if not bool(usable.all()):
        rows = torch.nonzero(~usable).flatten().tolist()
        raise InputError(f"{len(rows)} of the batch's {len(usable)} {problem}: rows {rows[:5]}", fix)


def _check_columns(similarities: Tensor, ranks: Ranks) -> None:
    rows, columns = similarities.shape
    if columns != rows * ranks.count:
        expected = "a square block [B, B]" if ranks.count == 1 else f"[{rows}, {rows * ranks.count}]"
        raise InputError(
            f"similarities have shape {[rows, columns]} on {ranks.count} gathering rank(s)",
            f"pass {expected}: this rank's images against those of all ranks, in rank order",
        )


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What is computed in, of what is given: float64 of float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
