"""The probes at the end of a run: its encoder beside an untrained one, on held-out shards of its store or of another.

Features lie in files in the run directory while this lasts: 4 bytes a feature, image and encoder.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from config import Config, Probing
from data import Batch, sidecars_of, split_shards, unchanged
from evaluate import evaluate, extract, members_of, table, values_of
from folders import read_tests
from torch import nn
from torch.utils.data import DataLoader

from graphbuild.errors import ConfigError, InputError, ShardError
from graphbuild.torch import graph_webdataset


def probe(
    config: Config, probing: Probing, encoders: dict[str, nn.Module], run_dir: Path, device: torch.device
) -> None:
    """Compare encoders, and add a line of each label and test to metrics.jsonl."""
    config, labels, tests = probed(config, probing), probing.names, read_tests(probing.tests, config.pixels)
    train, held_out = (labelled(config, tars, labels) for tars in split_shards(config))
    others = (DataLoader(test, config.batch_size, collate_fn=unchanged, num_workers=config.workers) for test in tests)
    for test in tests:
        if test.left_out:
            print(f"{test.asked.name}: {len(test.left_out)} class folders have no class here, as {test.left_out[0]}")
    with tempfile.TemporaryDirectory(dir=run_dir) as folder:
        places = [Path(folder, name) for name in ("train", "test")]
        for place in places:
            place.mkdir()
        parts = (
            extract(encoders, batches, labels, device, place)
            for batches, place in zip((train, chain(held_out, *others)), places, strict=True)
        )
        rows = evaluate(*parts, [test.asked for test in tests], device)  # type: ignore[misc]
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    of = f" of {probing.probe}" if probing.probe else ""
    print(f"\naccuracy on {config.held_out} held-out shard(s){of}, percent:\n{table(rows)}")


def check_probing(config: Config, probing: Probing) -> None:
    """Look before the training for what the probes need after it: ConfigError or InputError where it is not there."""
    if not probing.names:
        return
    config = probed(config, probing)
    option = "--probe-held-out" if probing.probe else "--held-out"
    if not config.held_out:
        raise ConfigError("--labels needs shards to test on", f"set {option} to 1 or more")
    read_tests(probing.tests, config.pixels)
    for tars in split_shards(config):
        try:
            batch = next(iter(labelled(config, tars, probing.names)), None)
        except (InputError, ShardError) as error:
            fix = "labels are fields of the samples' json members, or members of their own, as .cls"
            raise ConfigError(f"--labels: {error.cause}", fix) from error
        if batch is None:
            raise ConfigError(f"--labels: no sample in {tars[0]} or the other shards with it", f"set {option} higher")
        for label in probing.names:
            values_of(batch, label)


def probed(config: Config, probing: Probing) -> Config:
    """The Config whose store and held-out shards are probed."""
    if not probing.probe:
        return config
    return replace(config, store=probing.probe, train_shards="", held_out=probing.probe_held_out)


def labelled(config: Config, tars: Sequence[str], labels: Sequence[str]) -> Iterable[Batch]:
    """Batches of all samples of some tars, with the members that hold their labels."""
    dataset = graph_webdataset(
        tars,
        sidecars=sidecars_of(config.store, tars),
        batch_size=config.batch_size,
        image_pixels=config.pixels,
        shuffle=0,
        extra=members_of(labels),
        split_by_rank=False,
    )
    return DataLoader(dataset, batch_size=None, num_workers=config.workers)
