# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# On a machine that is shared, spinning OpenMP threads slow each other down; a passive wait does not.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint format audit lock reliability clean install

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifdef LOCKED
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps torch
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement .ci/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
else
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
endif
	touch $@

demo: install
	$(BIN)/distill-nlp run configs/quickstart.yaml --output_dir runs/quickstart
	$(BIN)/distill-nlp export runs/quickstart/student/seed-0 --quantize int8 --data synthetic \
		--teacher runs/quickstart/teacher
	$(BIN)/distill-nlp report runs/quickstart

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Known vulnerabilities of what is installed; the tool has an environment of its own.
audit: install $(VENV)-audit/bin/pip-audit
	.ci/audit $(BIN)/python $(VENV)-audit/bin/pip-audit

$(VENV)-audit/bin/pip-audit:
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet 'pip-audit>=2.7'

# What CI installs, with hashes; after a change of dependencies, by CPython 3.11 on Linux x86_64.
lock:
	$(PYTHON) -m venv --clear $(VENV)-lock
	$(VENV)-lock/bin/python .ci/lock
	rm -rf $(VENV)-lock

# All faults and all bad inputs, and the two tables of docs/reliability.md.
reliability: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/faults.py --seed 11
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bad_inputs

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
