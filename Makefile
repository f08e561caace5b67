# Two commands: `make demo` runs the main job on the images in examples/, `make test` passes the tests.
# Both make their own environment in .venv, with uv where it is installed; PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
PYTHON_FLOOR ?= python3.10
BIN := .venv/bin
DEMO_FLAGS ?=
PARALLEL := --numprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast test-floor lint docs dist clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	uv pip install --quiet --python $(BIN)/python --editable '.[dev]' 2> /dev/null || \
		($(BIN)/pip install --quiet --upgrade pip && $(BIN)/pip install --quiet --editable '.[dev]')
	touch $@

demo: .venv/installed
	$(BIN)/python examples/demo.py $(DEMO_FLAGS)

# Tests wait for processes some of the time: with two at a time on each of two cores, a file's together, none is idle.
# Those that launch come first, as conftest.py sorts them.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

# What needs no launched process: two minutes on two cores.
test-fast: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m 'not launches'

# The suite on the oldest versions that are meant to work, in an environment of their own.
.venv-floor/installed: pyproject.toml tests/floor.txt
	$(PYTHON_FLOOR) -m venv .venv-floor
	.venv-floor/bin/pip install --quiet --constraint tests/floor.txt --editable '.[export,jpeg,plots,s3,tracking]' \
		'moto[s3,server]>=5.2' 'pytest>=9.2' 'pytest-xdist>=3.8'
	touch $@

test-floor: .venv-floor/installed
	OMP_NUM_THREADS=1 .venv-floor/bin/python -m pytest $(PARALLEL)

lint: .venv/installed
	$(BIN)/ruff check .

# The pages in docs/ as a site, in site/; a broken link or an undocumented argument fails.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# What a release uploads: the source archive and the wheel, as the package index wants them.
dist: .venv/installed
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf .venv .venv-floor runs build dist site *.egg-info
