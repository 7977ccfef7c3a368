# Each target sets up what it needs: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
VERSION ?= 2.11.0
TRITON ?= 3.6.0

.PHONY: demo test test-all test-fast test-torch lint format bench gpu clean

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

build/torch-%/.ready: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --extra-index-url https://download.pytorch.org/whl/cpu \
		-e '.[demo,test]' 'torch==$*' 'triton==$(TRITON)' 'numpy<2.4'  # numpy 2.4 ends what Triton 3.6's interpreter does with it
	touch $@

test-torch: build/torch-$(VERSION)/.ready  ## the inner loop with another torch: by default the oldest that moecomm takes
	build/torch-$(VERSION)/bin/python -m pytest -m "not slow" -W ignore::DeprecationWarning $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && mkdir -p build/typed && cp -r moecomm build/typed/ && cp -r ops compile build/typed/moecomm/
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml  # it does not follow the package-dir mapping

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## ratios to floors and to other ways of the same layer, into benchmarks/results and docs/benchmarks.md: under 10 minutes on 2 cores
	for each in floors layer experts sweep links figures; do $(BIN)/python -m benchmarks.$$each || exit 1; done

gpu: $(READY)  ## the same on a GPU, on one process
	for each in floors layer experts sweep; do $(BIN)/python -m benchmarks.$$each --device cuda || exit 1; done
	$(BIN)/python -m benchmarks.figures

clean:
	rm -rf $(VENV) build dist *.egg-info runs
