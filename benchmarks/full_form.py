"""What the full form of the experiments takes on a GPU that is not at hand, from operations counted on a CPU.

A training step of each run is made once, on noise: its floating-point operations (torch's counter) and its calls of
tensor operations but for views, each of which launches about one kernel. A step takes a process the launches, and the
device the arithmetic; P processes at once share the device, so all runs together take the longer of launches / P and
arithmetic. Probes run on CPU cores and are timed here, on one. Assumed, not measured: LAUNCH seconds an operation,
and the share of the data sheet's bfloat16 peak that convolutions this small reach. Where there is a GPU, time it:
`python training/experiments.py run --all --form full --dry-run`.

    OMP_NUM_THREADS=1 python benchmarks/full_form.py [--processes 8]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "training"))

from config import Config  # noqa: E402
from lab.forecast import noisy_step, probe_shape, seconds_of_probes, step_shape, steps_of  # noqa: E402
from lab.plan import Run, in_turn, read_experiment  # noqa: E402

LAUNCH = 10e-6  # seconds of Python, dispatcher and driver for an operation of eager PyTorch
PEAK, SHARE = 989e12, 0.04  # H100 and H200, bfloat16, dense
CPU = torch.device("cpu")


class Calls(TorchDispatchMode):
    """Counts operations that make or change a tensor's values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        self.count += not view
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Step:
    flops: float
    calls: int

    @classmethod
    def of(cls, config: Config) -> Step:
        step = noisy_step(config, CPU)
        step()  # the optimizer makes its state
        with Calls() as calls:
            step()
        with FlopCounterMode(display=False) as flops:
            step()
        return cls(flops.get_total_flops(), calls.count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=8)
    processes = parser.parse_args().processes
    if processes < 1:
        parser.error("--processes must be at least 1")
    experiments = [read_experiment(path, "full") for path in sorted((ROOT / "pipelines/experiments").glob("*.yaml"))]
    steps: dict[tuple[Any, ...], Step] = {}
    probes: dict[tuple[Any, ...], float] = {}
    done: set[str] = set()
    totals = {experiment.name: Total() for experiment in experiments}
    for run in in_turn(experiments):
        if run.name in done:  # experiments may share a run
            continue
        done.add(run.name)
        totals[run.experiment].add(run, steps, probes)
    print(f"{processes} processes, {1e6 * LAUNCH:.0f} us an operation, {SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s\n")
    print("| | runs | steps | operations a step | TFLOP | launches | arithmetic | probes | in all, minutes |")
    print("|---" * 9 + "|")
    for name, total in totals.items():
        print(total.row(name.upper(), processes))
    every = sum(totals.values(), Total())
    print(every.row("all", processes))
    print(f"\none process: {every.minutes(1)[-1]:.0f} minutes")


@dataclass
class Total:
    runs: int = 0
    steps: int = 0
    calls: float = 0
    flops: float = 0
    probes: float = 0

    def __add__(self, other: Total) -> Total:
        return Total(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))

    def add(self, run: Run, steps: dict[tuple[Any, ...], Step], probes: dict[tuple[Any, ...], float]) -> None:
        config, count = run.config(Path()), steps_of(run)
        key = step_shape(config)
        if key not in steps:
            steps[key] = Step.of(config)
        self.runs += 1
        self.steps += count
        self.calls += count * steps[key].calls
        self.flops += count * steps[key].flops
        if run.kind == "training":
            shape = (config.width, *probe_shape(run))
            if shape not in probes:
                probes[shape] = seconds_of_probes(config, CPU, *probe_shape(run))
            self.probes += probes[shape]

    def minutes(self, processes: int) -> tuple[float, float, float, float]:
        """Of launches, arithmetic, probes, and in all."""
        launches = self.calls * LAUNCH / processes / 60
        arithmetic = self.flops / (PEAK * SHARE) / 60
        probes = self.probes / processes / 60
        return launches, arithmetic, probes, max(launches, arithmetic) + probes

    def row(self, name: str, processes: int) -> str:
        cells = [f"{self.runs}", f"{self.steps:,}", f"{self.calls / self.steps:.0f}", f"{self.flops / 1e12:,.0f}"]
        return f"| {name} | {' | '.join(cells + [f'{one:.1f}' for one in self.minutes(processes)])} |"


if __name__ == "__main__":
    main()
