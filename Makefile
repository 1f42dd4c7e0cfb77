# make demo      the recipe on a laptop: data, inherit, train, grow, a control, samples
# make test      ruff and the tests that take seconds; make test TORCH=2.9.1: with that torch, in .venv-2.9.1
# make test-all  the same with coverage, and the tests that take minutes
# make torture   a quarter of an hour of kills, full disks and damaged files, with a tally
# make mutants   mutmut changes the code: do the tests notice? Hours; a part: make mutants MUTANTS='model.*'
# make bench     speed and memory as ratios, into results/bench.csv (some 25 minutes, on an otherwise idle machine)
# make gpu       what only a GPU can show, into results/gpu.md: half an hour; make gpu PYTHON=python3 installs nothing

PYTHON ?= python3
TESTED := $(shell sed -n 's/^torch.*tested: \([0-9.]*\).*/\1/p' requirements.txt)
TORCH ?= $(TESTED)
VENV := .venv$(if $(filter-out $(TESTED),$(TORCH)),-$(TORCH))
BIN := $(VENV)/bin
SIDE_BY_SIDE := -n auto --maxprocesses 4

.PHONY: demo test test-all lint torture mutants bench gpu clean

# One folder for everything installed; a changed requirements file installs again.
$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "make: python3 has no venv module: install it first (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt torch==$(TORCH)
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: $(VENV)/installed
	PYTHON=$(BIN)/python bash runs/demo.sh

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/python -c 'import torch; print("torch", torch.__version__)'

test: lint
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --dist loadfile

test-all: lint
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest $(SIDE_BY_SIDE) --dist loadfile
	-$(BIN)/python -m coverage combine --quiet 2>/dev/null  # (what a killed process left cannot be read)
	$(BIN)/python -m coverage report --fail-under=95
	@echo "not counted:"; grep -rn "# needs \(a GPU\|the hub\|an extra package\)" *.py inheritune
	$(BIN)/python -m pytest -m slow $(SIDE_BY_SIDE)

torture: $(VENV)/installed-dev
	$(BIN)/python -m tests.stress.torture --seconds 900

mutants: $(VENV)/installed-dev
	$(BIN)/mutmut run $(MUTANTS)

bench: $(VENV)/installed-dev
	$(BIN)/python bench/step.py small
	$(BIN)/python bench/step.py gpt2
	for name in sampling inheriting loading saving memory preparation; do $(BIN)/python bench/$$name.py || exit 1; done
	@echo; $(BIN)/python bench/harness.py

# A Python that is named is taken as it is: it has the torch that knows the card.
NAMED := $(filter-out file,$(origin PYTHON))
gpu: $(if $(NAMED),,$(VENV)/installed)
	$(if $(NAMED),$(PYTHON),$(BIN)/python) bench/gpu.py $(STEPS)

clean:
	rm -rf .venv .venv-* mutants
