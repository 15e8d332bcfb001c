# Two commands matter: `make demo` and `make test`. Each makes .venv, installs what it needs and runs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CONSTRAINTS := constraints/ci.txt
WORKERS ?= 2

# Bytecode makes the many processes of the tests start quickly, whatever the caller prefers.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test check format bench claims constraints browser

demo: $(INSTALLED)
	$(BIN)/unpoison demo

test: $(INSTALLED) browser
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python tools/claims.py --check

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)
	$(BIN)/python benchmarks/scan.py
	$(BIN)/python benchmarks/cgd.py run --until ablations

claims: $(INSTALLED)
	$(BIN)/python tools/claims.py

browser: $(INSTALLED)
	PYTHON=$(BIN)/python sh tools/browser.sh

# torch first and by its exact version: anything else that asks for it then finds it there.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

constraints:
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > $(CONSTRAINTS)
