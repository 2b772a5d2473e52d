# One command each. Every target sets the machine up first: a virtual environment inside the clone, safe to repeat.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
NATIVE := $(VENV)/.native
SOURCE := CMakeLists.txt $(wildcard src/regauge/kernels/cpu/native/*)
CXX    ?= c++
# Both pip's own and its older way of holding what a build fetches to the same pins.
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
MODEL  := bundled/code-llama-5m
OUT    := out

.DEFAULT_GOAL := help
.PHONY: help native demo test telling slow sanitize arm check format bench clean

help:           ## what can be made
	@grep -E '^[a-z]+: .*##|^[a-z]+:  *##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 12

# Editable, and without the kernels: those have a rule of their own, which builds only what changed and fails aloud.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "regauge needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || echo 'Installing, once: PyTorch for CPUs, transformers and what the tests want, about 2 GB in $(VENV); some minutes.'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PINNED) $(BIN)/python -m pip install --disable-pip-version-check \
		--config-settings=wheel.cmake=false --editable '.[test,check]'
	@touch $@

$(NATIVE): $(READY) $(SOURCE)
	@echo 'Building the C++ kernels, once: one to three minutes.'
	@if command -v $(CXX) >/dev/null; then scripts/build_native.sh $(BIN)/python build/native; \
	else echo 'no C++ compiler ($(CXX)): the kernels are not built, the reference in torch computes'; fi
	@touch $@

native: $(NATIVE) ## build the C++ kernels (the targets below do so themselves)

# A minute of a machine to itself; of a busy one, where a minute is refused (code 2), as much more as it takes.
TIMES := 60s 3m 10m 30m

demo: $(NATIVE)  ## make the bundled model smaller, measure it, write the report page
	$(BIN)/python scripts/stdlib_text.py $(OUT)/text
	@for most in $(TIMES); do \
		echo "$(BIN)/regauge fit $(MODEL) --budget memory=0.30x --time $$most -o $(OUT)/demo"; \
		$(BIN)/regauge fit $(MODEL) --budget memory=0.30x --calibration $(OUT)/text/train --eval $(OUT)/text/heldout \
			--time $$most -o $(OUT)/demo --force; \
		code=$$?; test $$code -eq 2 || exit $$code; \
		echo "Refused, as it says: a busy machine takes longer than one to itself."; \
	done; exit 2
	@echo "The report: $(OUT)/demo/regauge/report.html"
	@echo "The model:  $(BIN)/python -c 'import regauge as rg; print(rg.load(\"$(OUT)/demo\"))'"

# What Python compiles is kept for the suite's many processes, also where the shell's environment says not to. Two tests
# at a time, each on one thread; where one asks for two threads, none spins while it waits for the other.
TWO := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(NATIVE)  ## the default suite
	$(TWO)

telling: $(NATIVE) ## the slow tests that say most: ten kills, a search for a floor, the wheel without a compiler, a server
	$(TWO) -m telling $$(grep -rl --include='test_*.py' 'mark\.telling' tests)

slow: $(NATIVE)  ## every test that is left out of `make test`, those of `make telling` too
	$(BIN)/python -m pytest -m slow

sanitize: $(NATIVE) ## the kernel tests under the sanitisers for addresses, undefined behaviour and threads
	scripts/sanitize.sh $(BIN)/python

arm:            ## the kernels' self-test on 64-bit ARM, under an emulator
	scripts/check_arm.sh 40

check: $(READY) ## format, lint, types, imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## rewrite the sources as `check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(NATIVE) ## the benchmarks, one after another
	$(BIN)/python benchmarks/run_all.py

clean:          ## remove what was made here
	rm -rf $(OUT) build dist $(VENV)
