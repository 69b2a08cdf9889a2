# Each target makes .venv first if it is missing. Needs Python 3.11 or later; nothing else has to be installed.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test faults lint bench gpu install settings

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: expected Python 3.11 or later, found " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# All of it on 5,000 real digits; run again, it skips what is finished and resumes what is not.
demo: install
	$(BIN)/python pipelines/run.py --config configs/digits.yaml
	$(BIN)/python pipelines/summary.py --config configs/digits.yaml

# Workers share the cores: a worker per core, a thread each, and none that waits by spinning. Files in conftest.py's order: the longest
# first.
test: install lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder \
		--numprocesses $$($(BIN)/python -c 'import os; print(min(4, os.cpu_count() or 1))')

# Fifty steps by one process and two; kills, damage, full disks: what was tried and what survived, as a table. FAULTS=1000 SEED=1 tries others.
faults: install
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive STEPS=50 $(BIN)/python -m pytest -q -s tests/test_ranks.py tests/faults/many.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Write docs/settings.md, the reference of all settings, from the code.
settings: install
	$(BIN)/python -c 'from configs.reference import write_page; write_page()'

# Check and benchmark this machine's GPU: correctness first, then speed, as one table; about ten minutes.
gpu: install
	$(BIN)/python -m benchmarks.gpu.check

bench: install
	$(BIN)/python benchmarks/priors.py
	$(BIN)/python benchmarks/quantizer_layer.py
