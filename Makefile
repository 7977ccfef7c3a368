# Each target sets up what it needs: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

.PHONY: demo test test-all test-fast lint format bench clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moecomm needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,lint,test]'
	touch $@

demo: $(READY)  ## train a small Mixture-of-Experts language model on 4 processes; make demo ARGS="--help"
	$(BIN)/python -m tutorials.demo $(ARGS)

test: $(READY)  ## the suite
	$(BIN)/python -m pytest -m "not exhaustive" $(ARGS)

test-all: $(READY)  ## with every one of very many like cases, too
	$(BIN)/python -m pytest $(ARGS)

test-fast: $(READY)  ## the inner loop: under two minutes
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && mkdir -p build/typed && cp -r moecomm build/typed/ && cp -r ops compile build/typed/moecomm/
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml  # it does not follow the package-dir mapping

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## ratios to a copy of the same bytes, into benchmarks/results
	$(BIN)/python -m benchmarks.floors $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info runs
