"""What the graph is worth, asked in experiments: a.yaml to i.yaml, run by `python -m benchmarks.experiments`.

plan: a recipe to a list of runs. sources, photos, icons, labelled: the data of a run.
runs: one run, from data to metrics; retrieval: some of these.
cost: the run that times steps instead. work: many runs, also at once. results: finished runs, their tables and plots.
photos_gpu: F for ten minutes of one GPU, a program of its own.
All over the trainer's own modules, which know nothing of these.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))  # as `python training/train.py` finds its modules
