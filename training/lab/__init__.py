"""The parts of `training/experiments.py`, over the trainer's own modules; the trainer needs none of them.

plan: a recipe to a list of runs. sources, labelled: the data of a run. runs: one run, from its data to its metrics.
cost: the run that times steps instead. work: many runs, also at once. forecast: what they will take. results:
finished runs, their tables and plots.
"""
