# One command each. Every target sets the machine up first: a virtual environment inside the clone, safe to repeat.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
MODEL  := bundled/code-llama-5m
OUT    := out

.DEFAULT_GOAL := help
.PHONY: help demo test slow check format bench clean

help:           ## what can be made
	@grep -E '^[a-z]+: .*##|^[a-z]+:  *##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "regauge needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,check]'
	@touch $@

demo: $(READY)  ## make the bundled model smaller, measure it, write the report page
	$(BIN)/python scripts/stdlib_text.py $(OUT)/text
	$(BIN)/regauge fit $(MODEL) --budget memory=0.30x \
		--calibration $(OUT)/text/train --eval $(OUT)/text/heldout --time 5m -o $(OUT)/demo --force
	@echo "The report: $(OUT)/demo/regauge/report.html"
	@echo "The model:  $(BIN)/python -c 'import regauge as rg; print(rg.load(\"$(OUT)/demo\"))'"

test: $(READY)  ## the default suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

check: $(READY) ## format, lint, types, imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## rewrite the sources as `check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) ## the benchmarks, one after another
	$(BIN)/python benchmarks/run_all.py

clean:          ## remove what was made here
	rm -rf $(OUT) build dist $(VENV)
