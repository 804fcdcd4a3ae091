# make evaluate   convert the embedded model, evaluate it against the original, write results/report.html
# make test       the whole CPU test suite
# make test-long  long tests, hours: writes benchmarks/results/reliability and docs/reliability.md
# make test-oldest the same with the oldest versions that pyproject.toml allows, in .venv-oldest
# make check      lint, format, types, import contracts, tests
# Each does its own set-up in .venv. On Linux the default wheel of torch brings CUDA along; for the small CPU one:
#   make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" test
PYTHON ?= python3
TORCH ?= torch==2.13.0
OLDEST_TORCH ?= torch==2.9.*
# torchao says nothing of the torch it needs, and peft wants one of these
OLDEST := transformers==5.10.* torchao==0.16.*
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
OUTPUT ?= results
WORKERS ?= 2
LONG ?= numerics selection gradients lengths poison causality isolation faults \
  kills disk_full damage bad_input headers browser replays dependencies memory ragged soak

.PHONY: evaluate test test-long test-oldest check lint lock setup setup-dev clean

evaluate: setup
	$(BIN)/bsbr evaluate --output $(OUTPUT)

test: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-long: setup-dev
	for name in $(LONG); do OMP_NUM_THREADS=1 WORKERS=$(WORKERS) $(BIN)/python -m tests.long.$$name || exit 1; done
	$(BIN)/python -m benchmarks.reliability_page

test-oldest:
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip --disable-pip-version-check install --quiet $(OLDEST_TORCH)
	$(VENV)-oldest/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[dev]' $(OLDEST)
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n $(WORKERS)

check: setup-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(VENV)/.evaluate
setup-dev: $(VENV)/.dev

# Everything but torch comes with the hash of its file; torch, whose wheels differ by index, by version, and its CUDA
# libraries as it names them. setuptools, which builds the few packages without a wheel, is pinned in constraints.txt.
define install
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(PIP) --no-deps --require-hashes --requirement requirements/$(1).txt
	$(PIP) $(TORCH)
	$(PIP) --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip --disable-pip-version-check check
	@touch $@
endef

$(VENV)/.evaluate: requirements/evaluate.txt pyproject.toml
	@echo "Setting up $(VENV): bsbr (once, some minutes)"
	$(call install,evaluate)

$(VENV)/.dev: requirements/dev.txt pyproject.toml
	@echo "Setting up $(VENV): bsbr and what its tests need (once, some minutes)"
	$(call install,dev)

CUDA := $(shell sed -n 's/^# cuda: /--no-emit-package /p' constraints.txt)
LOCK := uv pip compile pyproject.toml - --universal --python-version 3.11 --constraint constraints.txt --generate-hashes \
  --quiet --custom-compile-command "make lock" --no-emit-package torch $(CUDA)

lock:
	printf 'hatchling\neditables\n' | $(LOCK) --extra dev --extra datasets --output-file requirements/dev.txt
	printf 'hatchling\neditables\n' | $(LOCK) --extra evaluate --constraint requirements/dev.txt --no-emit-package triton \
	  --output-file requirements/evaluate.txt

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
