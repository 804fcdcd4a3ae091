# make evaluate   convert the embedded model, evaluate it against the original, write results/report.html
# make test       the whole CPU test suite
# make test-long  long tests, hours: writes benchmarks/results/reliability and docs/reliability.md
# make check      lint, format, types, import contracts, tests
# Each does its own set-up in .venv. On Linux the default wheel of torch brings CUDA along; for the small CPU one:
#   make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" test
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
OUTPUT ?= results
WORKERS ?= 2
LONG ?= numerics selection gradients lengths poison causality isolation faults \
  kills disk_full damage bad_input headers browser replays dependencies ragged soak

.PHONY: evaluate test test-long check lint setup setup-dev clean

evaluate: setup
	$(BIN)/bsbr evaluate --output $(OUTPUT)

test: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-long: setup-dev
	for name in $(LONG); do OMP_NUM_THREADS=1 WORKERS=$(WORKERS) $(BIN)/python -m tests.long.$$name || exit 1; done
	$(BIN)/python -m benchmarks.reliability_page

check: setup-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(VENV)/.evaluate
setup-dev: $(VENV)/.dev

$(VENV)/.torch: constraints.txt
	@echo "Setting up $(VENV): torch (once, some minutes)"
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.evaluate: $(VENV)/.torch pyproject.toml
	@echo "Setting up $(VENV): bsbr"
	$(PIP) --constraint constraints.txt --editable '.[evaluate]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "Setting up $(VENV): bsbr and what its tests need"
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
