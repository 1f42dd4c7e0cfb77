# make demo   the whole recipe on a laptop: data, reference, inherit, train, grow, controls, a sample
# make test   ruff and the tests that take seconds; make test-all adds those that take minutes
# make torture   a quarter of an hour of kills, full disks and damaged files, with a tally
# make mutants   faults put into the code: do the tests notice? (under 45 minutes)
# make bench   speed and memory as ratios, into results/bench.csv (under 25 minutes, on an otherwise idle machine);
#              make bench-long adds what trains (Muon) and 2 GB of text

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all torture mutants bench bench-long clean

# One folder for everything installed; a changed requirements file installs again.
.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "make: python3 has no venv module: install it first (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: .venv/installed
	$(BIN)/python prepare.py
	$(BIN)/python grow.py config/demo.py
	@echo; echo "A sample from the grown model:"
	$(BIN)/python sample.py --ckpt out/demo/final --max_new_tokens 300
	@echo; echo "The picture: out/demo/loss.png"

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

test-all: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest
	-$(BIN)/python -m coverage combine --quiet 2>/dev/null  # (what a killed process left cannot be read)
	$(BIN)/python -m coverage report --fail-under=95
	@echo "not counted:"; grep -n "# needs \(a GPU\|the hub\|an extra package\)" *.py
	$(BIN)/python -m pytest -m slow

torture: .venv/installed-dev
	$(BIN)/python bench/torture.py --seconds 900

mutants: .venv/installed-dev
	$(BIN)/python bench/mutants.py --out results/mutants.md

bench: .venv/installed-dev
	$(BIN)/python bench/step.py small
	$(BIN)/python bench/step.py gpt2
	$(BIN)/python bench/sampling.py
	$(BIN)/python bench/preparation.py
	$(BIN)/python bench/inheriting.py
	$(BIN)/python bench/loading.py
	$(BIN)/python bench/saving.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/scaling.py
	@echo; $(BIN)/python bench/harness.py

bench-long: bench
	$(BIN)/python bench/preparation.py --long
	$(BIN)/python bench/muon.py

clean:
	rm -rf .venv
