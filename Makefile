# make demo     the main job: train, attribute three ways, report (digits, about two minutes)
# make test     lint, types, tests
# make test-all the same with the slow tests: every combination of every table of cases (hours)
# make docs     the site, in site/
# make setup    only the environment

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# What Python has compiled is kept: the tests start dozens of processes, and compiling torch and
# lightning anew takes each of them 10 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test pytest test-all docs setup lint format clean

demo: setup
	$(BIN)/python experiments/demo.py

test: setup
	$(MAKE) --jobs 2 lint pytest

pytest: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

test-all: setup lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The site: site/index.html. With its search: $(BIN)/mkdocs serve"

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(STAMP)

# torch goes first and alone: later packages then keep the pinned build. Python compiles what it
# imports, which is a small part of what is installed.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, %s is %s. Try: make PYTHON=python3.12" % (sys.executable, sys.version.split()[0]))'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[demo,dev]"
	touch $@

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist site runs/demo .pytest_cache .mypy_cache .ruff_cache
