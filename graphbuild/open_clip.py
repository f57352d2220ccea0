"""open_clip's own training, with one flag more: `python -m graphbuild.open_clip <its flags> --graph STORE`.

open_clip_train's main runs as it is installed; its files are not touched. With --graph two of its functions are
exchanged in this process: `get_data` gives the training batches of graphbuild's loaders (images through open_clip's own
transforms, captions as the store embedded them through its tokenizer), and `create_loss` a loss that knows the batch's
similarities. open_clip calls its loss with the model's outputs alone, so the loss keeps the batches that were handed
out since the last step: one, or as many as --accum-freq joins. Without --graph nothing is exchanged.

Costs beside open_clip: the similarities of a batch, [B, N] on each rank, and an all-gather of the embeddings.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from graphbuild.errors import ConfigError, GraphbuildError, InputError, ShardError
from graphbuild.export.sidecar import read_columns
from graphbuild.graph.sample_graph import SampleGraph
from graphbuild.machine.terminal import say_error
from graphbuild.store.checksum import file_sha256
from graphbuild.store.remote import READERS
from graphbuild.store.shards import present_shards
from graphbuild.store.store import Store
from graphbuild.torch import CLIPLoss, GraphDataset, NeighborBatchSampler, SigLIPLoss, Targets
from graphbuild.torch.calibration import OTHER_VIEW
from graphbuild.torch.gather import Ranks
from graphbuild.torch.loader import GraphWebDataset
from graphbuild.torch.shards import Shard, check_tar_size, find_shards
from graphbuild.torch.targets import self_columns

logger = logging.getLogger("graphbuild.open_clip")
VERSIONS = "3.0.0 to 3.3.0"
HOOKS = {  # of open_clip_train.main: what is exchanged, or called with what was exchanged
    "get_data": "args preprocess_fns epoch tokenizer",
    "create_loss": "args",
    "train_one_epoch": "model data loss epoch optimizer scaler scheduler dist_model args tb_writer",
}
SHUFFLE = 5000  # samples, as open_clip's
FALSE_NEGATIVE, ALIKE = 0.9, 0.5  # similarities


def main(arguments: Sequence[str]) -> Any:
    """open_clip_train's main with these arguments, of which those that begin with --graph are not its own.

    Raises:
        ConfigError: open_clip is not installed, or not of VERSIONS; flags that exclude each other.
        InputError, ShardError: tars that are not the store's, or have changed since they were embedded.
    """
    options, stock_arguments = _parser().parse_known_args(arguments)
    train, parse_args = _open_clip()
    if options.graph is None:
        given = [word for word in arguments if word.startswith("--graph-")]
        if given:
            raise ConfigError(f"{given[0]} needs --graph", "name the store by --graph, or leave it out")
        return train.main(stock_arguments)
    _check_hooks(train)
    if not any(word.split("=")[0] == "--train-data" for word in stock_arguments):
        stock_arguments = [*stock_arguments, "--train-data", _tars_of(options.graph)]
    _check_flags(parse_args(stock_arguments), options)
    batches = _Batches(options)
    stock = {name: getattr(train, name) for name in ("get_data", "create_loss")}
    train.get_data = lambda *args, **named: batches.open(stock["get_data"], *args, **named)
    train.create_loss = lambda args: GraphLoss(stock["create_loss"](args), batches, options, siglip=args.siglip)
    try:
        return train.main(stock_arguments)
    finally:
        for name, function in stock.items():
            setattr(train, name, function)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--graph", metavar="STORE")
    parser.add_argument("--graph-targets", choices=["dense", "edges", "mask", "positives", "hard"], default="dense")
    parser.add_argument("--graph-tau-s", type=lambda text: text if text == "calibrated" else float(text), default=0.1)
    parser.add_argument("--graph-other-view", type=float, default=OTHER_VIEW)
    parser.add_argument("--graph-threshold", type=float)
    parser.add_argument("--graph-batches", choices=["random", "window", "walk"], default="random")
    parser.add_argument("--graph-captions", choices=["first", "draw"], default="first")
    parser.add_argument("--graph-selection", metavar="PARQUET")
    return parser


class GraphLoss(nn.Module):
    """In the place of open_clip's ClipLoss or SigLipLoss: the same logits, by its own flags, with the graph's targets.

    dense: `CLIPLoss` at --graph-tau-s, which may be calibrated to --graph-other-view, or `SigLIPLoss` from
    --graph-threshold on. edges: the same, from the graph's lists. mask: one-hot, without pairs of similarity
    --graph-threshold or more; positives: these are positives too; hard: these are hard negatives, with HELIP's margin
    loss (not with --siglip).
    """

    def __init__(self, stock: nn.Module, batches: _Batches, options: argparse.Namespace, *, siglip: bool) -> None:
        super().__init__()
        self.stock: Any = stock
        self.batches = batches
        kind, least = options.graph_targets, options.graph_threshold
        name = {"mask": "mask", "positives": "positive", "hard": "hard"}.get(kind, "threshold" if siglip else "tau_s")
        if name == "tau_s":
            least = options.graph_tau_s
        elif least is None:
            least = ALIKE if name in ("threshold", "hard") else FALSE_NEGATIVE
        self.siglip = SigLIPLoss(**{name: least}) if siglip else None
        self.clip = CLIPLoss(**({} if siglip else {name: least}), other_view=options.graph_other_view)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """As open_clip's: features [B, p] of unit norm, B the joined batches of --accum-freq."""
        targets = self.batches.targets(len(image_features)).to(image_features.device)
        if self.siglip is not None:
            self.siglip.scale, self.siglip.bias = logit_scale, logit_bias  # type: ignore[assignment]
            loss = self.siglip(image_features, text_features, targets)
        else:
            logits = self.stock.get_logits(image_features, text_features, logit_scale, logit_bias)
            with torch.autocast(image_features.device.type, enabled=False):
                loss = self._clip((logits[0].float(), logits[1].float()), targets, logit_scale)
        return {"contrastive_loss": loss} if output_dict else loss

    def _clip(self, logits: tuple[Tensor, Tensor], targets: Targets, scale: Tensor) -> Tensor:
        ranks, clip = Ranks.of_process_group(), self.clip
        tau_s: float | Tensor = 1.0
        if clip.tau_s is not None:
            targets, tau_s = targets.tempered(clip.tau_s, clip.other_view, logits[0].shape[1], slots=1)
        block = targets.block(ranks).div_(tau_s)
        first = ranks.rank * len(block)
        if len(logits[0]) > len(block):  # without --local-loss each rank has all rows
            block, first = ranks.concatenate(block), 0
        pairs = self_columns(len(block), block.shape[1], first, 1, block.device)
        return clip.of_logits(iter(logits), pairs, block, scale)


class _Batches:
    """Training batches as open_clip's loop takes them, (images, texts), and what the graph says of the last ones.

    It is the loop's data and its dataloader in one: `dataloader`, `set_epoch`, `num_batches`, `num_samples`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._pending: list[Mapping[str, Tensor]] = []

    def open(
        self, stock: Callable[..., dict[str, Any]], args: Any, preprocess_fns: Any, *, epoch: int, tokenizer: Any
    ) -> dict[str, Any]:
        """open_clip's get_data: what is not for training is its own."""
        tars, args.train_data = args.train_data, None
        data = stock(args, preprocess_fns, epoch=epoch, tokenizer=tokenizer)
        args.train_data = tars
        options, graph = self._options, SampleGraph.open(self._options.graph)
        shards, sidecars = _checked_shards(tars.split("::"), graph)
        urls, given = [shard.tar for shard in shards], {"sidecars": sidecars, "transform": preprocess_fns[0]}
        common: dict[str, Any] = {"bad_images": "replace", "captions": options.graph_captions, "seed": args.seed}
        common["selection"] = options.graph_selection
        loading: dict[str, Any] = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
        loading["pin_memory"] = str(args.device).startswith("cuda")
        self._set_epochs: list[Any]
        if options.graph_batches == "random":
            stream = GraphWebDataset(
                urls, batch_size=args.batch_size, shuffle=SHUFFLE, partial=False, equal_ranks=True, **given, **common
            )
            if options.graph_targets == "dense" and stream.header.embeddings not in ("int8", "float16"):
                raise ConfigError(
                    f"--graph-targets dense needs embeddings, and the sidecars carry {stream.header.embeddings}",
                    "run `graphbuild export --embeddings int8` on the store, or take --graph-targets edges",
                )
            counts = []
            for number in range(max(args.epochs, 1)):
                stream.set_epoch(number)
                counts.append(stream.batches_per_epoch(args.workers))
            self._set_epochs, batches = [stream], min(counts)
            self._loader = DataLoader(_Tokenized(stream, tokenizer), batch_size=None, **loading)
        else:
            dataset = GraphDataset(urls, graph=graph, **given, **common)
            sampler = NeighborBatchSampler(
                graph,
                args.batch_size,
                nodes=dataset.nodes,
                neighbors=options.graph_batches,
                seed=args.seed,
                drop_last=True,
                rank=args.rank,
                ranks=args.world_size,
            )
            collate = _Collate(dataset, tokenizer)
            self._set_epochs, batches = [dataset, sampler], len(sampler)
            self._loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, **loading)
        joint = args.batch_size * args.world_size
        if args.train_num_samples is not None:
            batches = min(batches, max(args.train_num_samples // joint, 1))
        if batches < args.accum_freq:
            raise ConfigError(
                f"an epoch has {batches} batches of {joint}, fewer than --accum-freq {args.accum_freq}",
                "take a smaller --batch-size or --accum-freq",
            )
        self.num_batches, self.num_samples = batches, batches * joint
        self._accumulated, self.dataloader = args.accum_freq, self
        logger.info("graph: %s, %d tars, %d batches of %d an epoch", graph.url, len(urls), batches, joint)
        return {**data, "train": self}

    def set_epoch(self, epoch: int) -> None:
        for each in self._set_epochs:
            each.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in zip(range(self.num_batches), self._loader, strict=False):
            if number % self._accumulated == 0:
                self._pending.clear()
            images, texts = batch.pop("image"), batch.pop("text")
            self._pending.append(batch)
            yield images, texts

    def targets(self, samples: int) -> Targets:
        """Of the batches that were handed out since the last step."""
        joined = {name: torch.cat([batch[name] for batch in self._pending]) for name in self._pending[0]}
        if len(joined["node"]) != samples:
            raise InputError(
                f"open_clip's loss has {samples} pairs, of batches with {len(joined['node'])}",
                f"use open_clip_torch {VERSIONS}",
            )
        left_out = ("sketch", "embedding") if self._options.graph_targets == "edges" else ("sketch",)
        fields = {name: value for name, value in joined.items() if name not in left_out}
        return Targets.from_batch(fields, self._options.graph_tau_s)


def _with_text(batch: dict[str, Any], tokenizer: Callable[[list[str]], Tensor]) -> dict[str, Tensor]:
    """A loader's batch with its captions' tokens, and no strings."""
    tokens = tokenizer(batch["caption"])
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)} | {"text": tokens}


class _Tokenized(IterableDataset[dict[str, Tensor]]):
    def __init__(self, stream: GraphWebDataset, tokenizer: Callable[[list[str]], Tensor]) -> None:
        self._stream, self._tokenizer = stream, tokenizer

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (_with_text(batch, self._tokenizer) for batch in self._stream)


class _Collate:
    def __init__(self, dataset: GraphDataset, tokenizer: Callable[[list[str]], Tensor]) -> None:
        self._dataset, self._tokenizer = dataset, tokenizer

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return _with_text(self._dataset.collate(samples), self._tokenizer)


# -- what is checked before the first step


def _open_clip() -> tuple[Any, Callable[[Sequence[str]], Any]]:
    try:
        import open_clip_train.main as train
        from open_clip_train.params import parse_args
    except ImportError as error:
        raise ConfigError(
            f"open_clip_train cannot be imported ({error})", "pip install 'open_clip_torch[training]==3.3.0'"
        ) from None
    return train, parse_args


def _check_hooks(train: Any) -> None:
    import open_clip

    for name, parameters in HOOKS.items():
        function = getattr(train, name, None)
        found = " ".join(inspect.signature(function).parameters) if function is not None else "is not there"
        if found != parameters or hasattr(train, "create_task"):
            raise ConfigError(
                f"open_clip_torch {open_clip.__version__}: open_clip_train.main.{name}({found}) is not"
                f" {name}({parameters}), or training has moved into tasks",
                f"--graph works with open_clip_torch {VERSIONS}: pip install 'open_clip_torch[training]==3.3.0'",
            )


def _check_flags(args: Any, options: argparse.Namespace) -> None:
    if args.siglip and options.graph_targets == "hard":
        raise ConfigError("--graph-targets hard is of CLIP's loss, not SigLIP's", "leave one of the two flags out")
    excluded = {
        "--distill-model": args.distill_model,
        "--horovod": args.horovod,
        "--dataset-resampled": args.dataset_resampled,
        "--train-data-upsampling-factors": args.train_data_upsampling_factors,
        "--dataset-type": args.dataset_type if args.dataset_type in ("csv", "synthetic") else None,
        "--model": args.model if "coca" in args.model.lower() else None,
    }
    for flag, value in excluded.items():
        if value:
            said = flag if value is True else f"{flag} {value}"
            raise ConfigError(f"{said} cannot be combined with --graph", "leave one of them out")


def _tars_of(store: str) -> str:
    opened = Store(store)
    urls = present_shards(opened, opened.manifest()).table["tar_url"].to_pylist()
    if None in urls or not urls:
        raise ConfigError(f"{store} holds no tars: its samples came from a list", "name tars by --train-data")
    return "{" + ",".join(opened.resolve(url) for url in urls) + "}" if len(urls) > 1 else opened.resolve(urls[0])


def _checked_shards(tars: list[str], graph: SampleGraph) -> tuple[list[Shard], str | None]:
    """The tars with their sidecars, beside them or in the store, which must be of this graph and these bytes."""
    sidecars = None
    try:
        shards = find_shards(tars, None)
    except ShardError:
        sidecars = f"{graph.url.rstrip('/')}/shards"
        shards = find_shards(tars, sidecars)
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(lambda shard: _check_tar(shard, graph), shards))
    return shards, sidecars


def _check_tar(shard: Shard, graph: SampleGraph) -> None:
    header, _ = read_columns(shard.sidecar, ["row"])
    if header.graph != graph.fingerprint:
        raise InputError(
            f"{shard.sidecar} was exported from another graph than that of {graph.url}",
            f"name the store of these tars by --graph, or run `graphbuild export {graph.url}` again",
        )
    check_tar_size(shard, header)
    tar, sidecar = Path(shard.tar), Path(shard.sidecar)
    if header.tar is None or not (tar.is_file() and sidecar.is_file()):
        return
    # A tar of the same size that was written after its sidecar may have other captions; to read it tells.
    if tar.stat().st_mtime > sidecar.stat().st_mtime and file_sha256(tar) != header.tar.sha256:
        raise InputError(
            f"{shard.tar} has changed since it was embedded: its captions or images may be others",
            "restore it, or run `graphbuild embed`, `index` and `export` again",
        )


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except GraphbuildError as error:
        say_error(f"graphbuild.open_clip: {error}")
        sys.exit(error.exit_code)
