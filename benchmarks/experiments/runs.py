"""One run of an experiment: its data, its training or timing, its evaluation on frozen features.

Costs what the training costs, and on two cores 2 to 20 s of probes. An interrupted training goes on from its
checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import platform
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from config import Config, Place
from data import EpochBatches, training_samples
from evaluate import features_of, probes, zero_shot
from models import Model
from train import load_run, new_model, train

from benchmarks.experiments.cost import step_seconds
from benchmarks.experiments.plan import Run
from benchmarks.experiments.retrieval import retrieval
from benchmarks.experiments.sources import Prepared, prepare


@contextmanager
def claimed(name: str, work: Path, wait: bool = False) -> Iterator[bool]:
    """Whether `name`, a run, its data or the results, is this process's alone until the block ends.

    So several processes can share a work folder. The claim is a lock (flock), which ends with the process however that
    ends; where a file system has no locks, everybody gets it. wait: until another's has ended.
    """
    path = work / "claims" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        mine = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            mine = False
        except OSError:
            pass
        yield mine


def finish(
    run: Run,
    work: Path,
    device: torch.device,
    cifar: Path | None,
    captions: Path | None = None,
    icons: Path | None = None,
) -> tuple[dict[str, float], float]:
    """Prepare, train or go on, and evaluate: the run's metrics, and its seconds of training and evaluation."""
    with claimed(run.data.fingerprint, work, wait=True):
        prepared = prepare(run.data, work / "data", cifar, captions, icons)
    started = time.perf_counter()
    if run.kind == "cost":
        return step_seconds(run, prepared, device), time.perf_counter() - started
    config, model, training, before = trained(run, prepared, work, device)
    metrics = {**training, **evaluated(config, model, run, prepared, device)}
    return metrics, before + time.perf_counter() - started


def trained(
    run: Run, prepared: Prepared, work: Path, device: torch.device
) -> tuple[Config, Model, dict[str, float], float]:
    """The trained model, what its training tells, seconds of earlier sessions. No epochs: the model at its start."""
    if run.settings["epochs"] == 0:
        config = run.config(prepared.store)
        return config, new_model(config, 1).to(device), {}, 0.0
    folder = work / "runs" / run.name
    before = sum(line["seconds"] for line in epochs_of(folder))
    train(run.config(prepared.store), folder, Place(0, 1, device))
    config, model = load_run(folder, device)
    epochs = epochs_of(folder)
    means = {
        name.replace("_", " "): sum(line[name] for line in epochs) / len(epochs)
        for name in ("images_per_second", "share_waiting_for_data")
    }
    steps = [line for line in lines_of(folder) if "step" in line]
    targets = {
        f"target's {name.replace('_', ' ')}": sum(line[name] for line in steps) / len(steps)
        for name in ("other_view", "perplexity")
        if name in steps[-1]
    }
    if "tau" in steps[-1]:
        targets["learned tau"] = steps[-1]["tau"]
    return config, model, {"loss": epochs[-1]["mean_loss"], **means, **targets, **edges_of(config)}, before


def lines_of(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # a crash may have cut the last line
    return [json.loads(line) for line in whole.splitlines()]


def epochs_of(folder: Path) -> list[dict[str, float]]:
    """The lines of the finished epochs of a run, with their seconds."""
    lines = lines_of(folder)
    steps = Counter(line["epoch"] for line in lines if "step" in line)
    return [
        {**line, "seconds": line["seconds_per_step"] * steps[line["epoch"]]} for line in lines if "mean_loss" in line
    ]


def edges_of(config: Config) -> dict[str, float]:
    """Of the batches of the first epoch: how many of its own k neighbours an image finds in its batch, on average."""
    samples = training_samples(config)
    edges = []
    for batch in EpochBatches(config, samples.graph, samples.nodes, Place(0, 1, torch.device("cpu"))):
        nodes = samples.nodes[batch]
        edges.append(np.isin(samples.graph.neighbors(nodes)[0], nodes).sum(1).mean())
    return {"edges per anchor": float(np.mean(edges))}


def evaluated(config: Config, model: Model, run: Run, prepared: Prepared, device: torch.device) -> dict[str, float]:
    """All probes of the frozen encoder, retrieval where there is a gallery, and zero-shot where the model has a text
    side on frozen embeddings."""
    labelled = prepared.labelled()
    features = {name: features_of(model.encoder, part.images, device) for name, part in labelled.items()}
    labels = {("train" if name == "probe" else name): part.labels for name, part in labelled.items()}
    main = run.data.main_label
    tests = {name: part for name, part in features.items() if name != "probe"}
    metrics = probes(features["probe"], tests, labels, main)
    if gallery := prepared.gallery():
        found = features_of(model.encoder, gallery.images, device)
        metrics |= retrieval(found, gallery.labels["class"], gallery.labels["author"])
    if run.settings["epochs"] and config.reads_texts and config.text == "projection":
        assert model.text_projection is not None
        prompts = prepared.prompts()
        with torch.inference_mode():
            texts = model.text_projection(torch.stack(list(prompts.values())).to(device)).cpu()
            for name, part in tests.items():
                images = model.image_projection(part.to(device)).cpu()
                accuracy = zero_shot(images, texts, list(prompts), labels[name][main])
                metrics[f"zero-shot {main}" + (f" {name}" if name != "test" else "")] = accuracy
    return metrics


def torch_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The GPU's name; or the processor's, with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
