# `make demo` and `make test` set up everything they need on a fresh machine, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
# The interpreters of the environments of release-check.
OLDEST ?= $(PYTHON)
NEWEST ?= $(PYTHON)

.PHONY: demo test pytest test-slow test-opacus check-extras release-check lint format bench gpu-check docs docs-serve clean help

help:
	@echo "make demo          train on real digits (2 minutes), evaluate, write a report page"
	@echo "make test          lint and all tests but the slow ones"
	@echo "make test-slow     the slow tests (accuracy over three seeds, ...)"
	@echo "make test-opacus   the tests that need Opacus, which is no part of the environment"
	@echo "make check-extras  install the wheel with each extra into a fresh environment and try it there"
	@echo "make release-check  build the release and try it with the oldest and the newest PyTorch (OLDEST=, NEWEST=python3.x)"
	@echo "make lint          ruff and mypy            make format     let ruff format the code"
	@echo "make bench         time layers and models   make gpu-check  tests and timings on a CUDA device"
	@echo "make docs          build the documentation into site/   make docs-serve   show it at http://127.0.0.1:8000"

demo: $(VENV)/.installed
	$(BIN)/cbsa train --config digits --model.args step certified --output runs/demo --overwrite
	$(BIN)/cbsa report --checkpoint runs/demo

test: lint pytest

pytest: $(VENV)/.installed-dev
	$(PYTEST)

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow

# Opacus brings packages called examples and benchmarks, which would hide ours: a folder of its own, without them.
OPACUS := $(CURDIR)/$(VENV)/opacus
test-opacus: $(VENV)/.installed-dev
	$(PIP) install --quiet --no-deps --upgrade --target $(OPACUS) opacus opt_einsum
	rm -rf $(OPACUS)/examples $(OPACUS)/benchmarks
	PYTHONPATH=$(OPACUS) $(BIN)/python -c "import opacus"
	PYTHONPATH=$(OPACUS) $(BIN)/python -m pytest -k opacus tests/nn/test_adapters.py tests/models/test_adapters.py

check-extras: $(VENV)/.installed-dev
	$(BIN)/python scripts/check_extras.py

release-check: $(VENV)/.installed-dev
	$(BIN)/python scripts/release_check.py $(if $(TAG),--tag $(TAG)) oldest=$(OLDEST) newest=$(NEWEST)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	$(BIN)/cbsa bench layers
	$(BIN)/cbsa bench models

gpu-check: $(VENV)/.installed-dev
	@$(BIN)/python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'gpu-check: torch sees no CUDA device')"
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/gpu_check.py

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/pip:
	@$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 10) else 'cbsa-torch needs Python 3.10 or newer; set PYTHON=...')"
	$(PYTHON) -m venv $(VENV)

# The stamps are written last: an interrupted installation is taken up again.
$(VENV)/.installed: pyproject.toml | $(BIN)/pip
	$(PIP) install -e ".[all]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/pip
	$(PIP) install -e ".[dev]"
	@touch $(VENV)/.installed $@
