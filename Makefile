# `make demo` and `make test` do all the set-up themselves, into .venv, from pinned versions (constraints.txt).
# A name that only a version manager's shim has does not run: so each is tried.
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c "" 2> /dev/null && echo $$p && break; done)
endif
VENV := .venv
BIN := $(VENV)/bin
# Tests side by side, a process a core.
JOBS := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
export NO_ALBUMENTATIONS_UPDATE := 1
unexport PYTHONDONTWRITEBYTECODE  # else every process compiles all it imports, and pytest all tests

.PHONY: demo notebooks test test-all test-oldest test-open-clip pytest lint docs docs-version wheel resolve clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call environment,$(VENV))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch || $(PYTHON) preflight.py failed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,download,int8,offline,s3,dev]' \
		|| $(PYTHON) preflight.py failed
	touch $@

# A virtual environment with pip, unless it is there; one without pip is what a failed attempt leaves.
define environment
$(if $(PYTHON),,$(error there is no Python 3 here: install one, for instance apt install python3.11 python3.11-venv))
@$(1)/bin/python -m pip --version > /dev/null 2>&1 || { $(PYTHON) preflight.py && $(PYTHON) -m venv --clear $(1); }
endef

demo: $(VENV)/.installed
	$(BIN)/graphbuild demo demo
	$(BIN)/python training/train.py demo --config training/demo.yaml --labels kind,colour,count,background --run-dir runs/demo
	@echo; echo "Now open demo/report/index.html, or search and walk the graph:"
	@echo "    source $(BIN)/activate && graphbuild explore demo"

# The notebooks of docs/, run from the top, with what they show kept in them.
notebooks: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/jupyter execute --inplace docs/notebooks/*.ipynb

test: $(VENV)/.installed
	$(MAKE) -j2 lint pytest

# One after the other: slow tests measure what the whole machine does.
test-all: $(VENV)/.installed
	$(MAKE) -j2 lint pytest MARKS="-m ''" JOBS=

# What readers, loaders and the command line do with the oldest versions that pyproject.toml allows. The constraints are
# those of `uv pip compile pyproject.toml --extra cpu --extra download --extra offline --extra s3 --resolution lowest-direct`.
OLDEST := .venv-oldest
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest $(JOBS) tests/torch tests/sources tests/export tests/test_recipe.py tests/e2e/test_advice.py \
		--ignore tests/sources/test_fuzz.py --ignore tests/torch/test_costs.py

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(call environment,$(OLDEST))
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check uv || $(PYTHON) preflight.py failed
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST) -r constraints-oldest.txt \
		pytest pytest-timeout pytest-xdist hypothesis || $(PYTHON) preflight.py failed
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST) --no-deps -e .
	touch $@

# open_clip's own training with the graph: several GB, so in an environment of its own. Its zero-shot evaluation fails with
# numpy 2.4: float() of an array of one number.
OPEN_CLIP := .venv-open-clip
test-open-clip: $(OPEN_CLIP)/.installed
	$(OPEN_CLIP)/bin/python -m pytest tests/open_clip
	$(OPEN_CLIP)/bin/python -m pytest -m '' tests/test_tutorials.py -k open-clip

$(OPEN_CLIP)/.installed: pyproject.toml constraints.txt
	$(call environment,$(OPEN_CLIP))
	$(OPEN_CLIP)/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==2.14.1 torchvision==0.29.1 'open_clip_torch[training]==3.3.0' 'numpy<2.4' pytest pytest-timeout -e '.[offline]' \
		|| $(PYTHON) preflight.py failed
	touch $@

pytest: $(VENV)/.installed
	$(BIN)/python -m pytest $(JOBS) $(MARKS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of docs/, in site/. A warning is an error, and so is a link that leads nowhere. Only the installation needs a
# network. To read it: python -m http.server --directory site
DOCS := .venv-docs
SITE := site
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet --site-dir $(abspath $(SITE))

# The site of this version beside those of earlier ones, as a commit of the branch gh-pages, for readers to choose from.
# PUSH=--push sends it to `origin`.
docs-version: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(DOCS))/bin:$$PATH" $(DOCS)/bin/mike deploy $(PUSH) --update-aliases \
	  $$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) latest
	$(DOCS)/bin/mike set-default $(PUSH) latest

$(DOCS)/.installed: constraints-docs.txt
	$(call environment,$(DOCS))
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-docs.txt \
		|| $(PYTHON) preflight.py failed
	touch $@

# What a release holds: dist/ with the sdist, and the wheel that is built from it. The wheel is tried in an empty environment,
# beside the two packages that the command line starts with.
RELEASE := .venv-release
DIST := dist
wheel: $(RELEASE)/.installed
	rm -rf $(DIST)
	$(RELEASE)/bin/python -m build --outdir $(DIST) .
	$(RELEASE)/bin/twine check --strict $(DIST)/*
	$(RELEASE)/bin/python -m venv --clear $(RELEASE)/empty
	$(RELEASE)/empty/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt pydantic typer \
		|| $(PYTHON) preflight.py failed
	$(RELEASE)/empty/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(DIST)/*.whl
	cd $(RELEASE)/empty && bin/graphbuild --version && bin/graphbuild --help

# Do all extras go together, in the newest versions and in the pinned ones? Only asked, nothing is installed.
resolve: $(RELEASE)/.installed
	@for python in 3.11 3.12 3.13; do for pins in /dev/null constraints.txt; do \
		echo "Python $$python, all extras, constraints: $$pins"; \
		$(RELEASE)/bin/uv pip compile --quiet --all-extras --python-version $$python --constraints $$pins pyproject.toml \
			> /dev/null || exit 1; \
	done; done

$(RELEASE)/.installed:
	$(call environment,$(RELEASE))
	$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check build twine uv || $(PYTHON) preflight.py failed
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(OPEN_CLIP) $(DOCS) $(RELEASE) dist site demo runs
