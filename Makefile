# `make demo` and `make test` do all their set-up in a fresh virtual environment; they need Python >= 3.11 and a package index.
#
#   make demo                     the bundled model answers questions about what is in examples/
#   make test                     the whole test suite
#   make lint                     formatting, linting and types, as pre-commit does
#   make test PYTHON=python3.12   with another interpreter

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(VENV)/bin/mm demo

# One thread each: several processes that all use every core are slower than one.
test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n $(WORKERS)

lint: $(VENV)/dev.stamp
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV)

# A stamp is younger than pyproject.toml once its packages are installed, so a second call is quick.
$(VENV)/demo.stamp: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/pip install --disable-pip-version-check --editable ".[voice]"
	touch $@

$(VENV)/dev.stamp: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/pip install --disable-pip-version-check --editable ".[dev]"
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
