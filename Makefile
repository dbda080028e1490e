# From a bare machine: Python 3.9 or newer with venv, and nothing else.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin/python
SETUP = "$(PYTHON)" tools/bootstrap.py --venv "$(VENV)"

.PHONY: demo gpu-report test test-quick test-numerics docs setup lint format clean

# Continues a demo that was stopped; a finished one is evaluated and drawn again.
demo: setup
	DETECTRON2_DATASETS=datasets "$(BIN)" -W ignore tools/demo.py

# With the packages of PYTHON if they can use a GPU, nothing is fetched; or else as the others.
SEES_GPU = import torch, nonlocal_det.cli.benchmark; exit(not torch.cuda.is_available())
GPU_REPORT = DETECTRON2_DATASETS=datasets "$$python" -W ignore tools/benchmark.py --gpu-report
gpu-report:
	@export PYTHONPATH=.; python="$(PYTHON)"; \
	if ! "$$python" -W ignore -c "$(SEES_GPU)" 2>/dev/null; then \
		$(SETUP) || exit; python="$(BIN)"; \
	fi; \
	$(GPU_REPORT)

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
	@$(SETUP)

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
