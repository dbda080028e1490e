# From a bare machine: Python 3.9 or newer with venv, and nothing else.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin/python

.PHONY: demo test docs setup lint format clean

demo: setup
	DETECTRON2_DATASETS=datasets "$(BIN)" -W ignore tools/demo.py

# A file's tests share models: they stay in one process.
test: lint
	"$(BIN)" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# The documentation as a site, in site/. A broken link is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 "$(BIN)" -m mkdocs build --strict

# Makes the environment, repairs one whose making was interrupted, passes through a finished one.
setup:
	@"$(PYTHON)" tools/bootstrap.py --venv "$(VENV)"

lint: setup
	"$(BIN)" -m ruff check .
	"$(BIN)" -m ruff format --check .

format: setup
	"$(BIN)" -m ruff check --fix .
	"$(BIN)" -m ruff format .

# Datasets and outputs stay; so does an environment that `setup` did not make.
clean:
	rm -rf build site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
	test ! -e "$(VENV)/nonlocal_det.stamp" || rm -rf "$(VENV)" "$(VENV).lock"
