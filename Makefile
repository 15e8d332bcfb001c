# Two commands matter: `make demo` and `make test`. Each makes .venv, installs what it needs and runs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CONSTRAINTS := constraints/ci.txt
OPEN_CLIP := .venv-open-clip
OPEN_CLIP_INSTALLED := $(OPEN_CLIP)/.installed
ART := .venv-art
ART_INSTALLED := $(ART)/.installed
OPEN_CLIP_RECIPE := tests/recipes/test_clip_victims.py::test_a_resnet_is_trained_and_stored_in_its_own_format
WORKERS ?= 2

# Bytecode makes the many processes of the tests start quickly, whatever the caller prefers.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-open-clip open-clip check format bench claims constraints browser art

demo: $(INSTALLED)
	$(BIN)/unpoison demo

test: $(INSTALLED) $(OPEN_CLIP_INSTALLED) browser
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
	$(MAKE) --no-print-directory test-open-clip

# The adapter of open_clip, with the library itself: it needs torchvision, which the other environment must not have.
test-open-clip: $(OPEN_CLIP_INSTALLED)
	PYTHONPATH=tools/open_clip_start:src $(OPEN_CLIP)/bin/python -m pytest tests/open_clip $(OPEN_CLIP_RECIPE)

open-clip: $(OPEN_CLIP_INSTALLED)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python tools/claims.py --check
	$(BIN)/python benchmarks/grid.py --check claims
	$(BIN)/python benchmarks/grid.py --check tables

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

# A layer over .venv: torch and the rest are found there, only open_clip and what it needs is installed here.
$(OPEN_CLIP_INSTALLED): $(INSTALLED) constraints/open-clip.txt tools/layer.py
	$(PYTHON) -m venv --clear $(OPEN_CLIP)
	$(OPEN_CLIP)/bin/python tools/layer.py $(VENV)
	$(OPEN_CLIP)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c $(CONSTRAINTS) -c constraints/open-clip.txt open_clip_torch torchvision
	touch $@

# What benchmarks/detectors.py compares with, over .venv in the same way.
art: $(ART_INSTALLED)

$(ART_INSTALLED): $(INSTALLED) constraints/art.txt tools/layer.py
	$(PYTHON) -m venv --clear $(ART)
	$(ART)/bin/python tools/layer.py $(VENV)
	$(ART)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c $(CONSTRAINTS) -c constraints/art.txt adversarial-robustness-toolbox
	touch $@

constraints:
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > $(CONSTRAINTS)
