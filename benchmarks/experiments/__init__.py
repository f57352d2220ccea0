"""What the graph is worth, asked in experiments: a.yaml to e.yaml, run by `python -m benchmarks.experiments`.

plan: a recipe to a list of runs. sources, labelled: the data of a run. runs: one run, from its data to its metrics.
cost: the run that times steps instead. work: many runs, also at once. results: finished runs, their tables and plots.
All over the trainer's own modules, which know nothing of these.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))  # as `python training/train.py` finds its modules
