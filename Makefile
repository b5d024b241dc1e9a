# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# On a machine that is shared, spinning OpenMP threads slow each other down; a passive wait does not.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint format audit lock clean install

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/distill-nlp run configs/quickstart.yaml --output_dir runs/quickstart
	$(BIN)/distill-nlp export runs/quickstart/student/seed-0 --quantize int8 --data synthetic \
		--teacher runs/quickstart/teacher
	$(BIN)/distill-nlp report runs/quickstart

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Known vulnerabilities of what is installed; the tool has an environment of its own.
audit: install
	test -x $(VENV)-audit/bin/pip-audit || $(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet 'pip-audit>=2.7'
	.ci/audit $(BIN)/python $(VENV)-audit/bin/pip-audit

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
