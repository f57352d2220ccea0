# `make demo` and `make test` do all the set-up themselves, into .venv, from pinned versions (constraints.txt).
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Test files side by side, on two cores.
JOBS := -n 2 --dist loadfile --no-loadscope-reorder
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: demo test test-all pytest lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,download,int8,offline,s3,dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/graphbuild demo demo
	$(BIN)/python training/train.py demo --labels kind,colour,count,background --run-dir runs/demo

test: $(VENV)/.installed
	$(MAKE) -j2 lint pytest

# One after the other: slow tests measure what the whole machine does.
test-all: $(VENV)/.installed
	$(MAKE) -j2 lint pytest MARKS="-m ''" JOBS=

pytest: $(VENV)/.installed
	$(BIN)/python -m pytest $(JOBS) $(MARKS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo runs
