# From a bare machine: Python 3.9 or newer with venv, and nothing else.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin/python

.PHONY: demo test test-quick test-numerics docs setup lint format clean

# Continues a demo that was stopped; a finished one is evaluated and drawn again.
demo: setup
	DETECTRON2_DATASETS=datasets "$(BIN)" -W ignore tools/demo.py

# Neighboring tests share models and stay together, until a process has nothing left to do.
PYTEST = "$(BIN)" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST)

# For each commit.
test-quick: lint
	$(PYTEST) -m "not slow"

# Numbers must not depend on a CPU's instructions, nor on the number of threads.
NUMERIC = -m "numeric and not slow"
AVX2 = ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
test-numerics: setup
	$(AVX2) $(PYTEST) $(NUMERIC)
	OMP_NUM_THREADS=2 $(PYTEST) $(NUMERIC) --numprocesses 0 tests/test_layers.py

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
