# Each target sets up what it needs: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
# how many tests run side by side: a core each, or more, since some run several ranks
JOBS ?= 2
SIDE_BY_SIDE = -n $(JOBS) --dist worksteal
PYTEST = python -m pytest $(SIDE_BY_SIDE)
VERSION ?= 2.11.0
TRITON ?= 3.6.0
TORCHTITAN ?= 0.3.0
TRANSFORMERS ?= 5.17.0

.PHONY: demo test test-all test-fast test-torch test-transformers test-torchtitan test-gpu lint format docs bench gpu fuzz soak sanitize lock audit \
	dist clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moecomm needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,docs,lint,test]'
	touch $@

demo: $(READY)  ## train a small Mixture-of-Experts language model on 4 processes; make demo ARGS="--help"
	$(BIN)/python -m tutorials.demo $(ARGS)

test: $(READY)  ## the suite
	$(BIN)/$(PYTEST) -m "not exhaustive" $(ARGS)

test-all: $(READY)  ## with every one of very many like cases, too
	$(BIN)/$(PYTEST) $(ARGS)

test-fast: $(READY)  ## the inner loop
	$(BIN)/$(PYTEST) -m "not slow and not exhaustive" $(ARGS)

build/torch-%/.ready: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --extra-index-url https://download.pytorch.org/whl/cpu \
		-e '.[demo,test]' 'torch==$*' 'triton==$(TRITON)' 'numpy<2.4'  # numpy 2.4 ends what Triton 3.6's interpreter does with it
	touch $@

test-torch: build/torch-$(VERSION)/.ready  ## the inner loop with another torch: by default the oldest that moecomm takes
	build/torch-$(VERSION)/bin/$(PYTEST) -m "not slow and not exhaustive" -W ignore::DeprecationWarning $(ARGS)

build/torchtitan/.ready: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[torchtitan]' 'torchtitan==$(TORCHTITAN)' \
		$$(grep -E '^(torch|triton|numpy|pytest|expecttest|hypothesis)==' constraints.txt)
	touch $@

test-torchtitan: build/torchtitan/.ready  ## the integration of torchtitan, in an environment of its own: its datasets wants other versions
	build/torchtitan/bin/python -m pytest tests/integrations/test_torchtitan.py tests/benchmarks/test_titan.py $(ARGS)

build/transformers-%/.ready: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check 'transformers==$*'  # and what it demands in place of the tested
	touch $@

test-transformers: build/transformers-$(TRANSFORMERS)/.ready  ## all tests with another transformers: by default the oldest with the experts function
	build/transformers-$(TRANSFORMERS)/bin/$(PYTEST) tests/integrations/test_transformers.py $(ARGS)

# The tests that put tensors on a GPU, if there is one. With PYTHON=..., by that Python and what is installed in it; nothing is downloaded.
ON_GPU := tests/ops tests/layer/test_static_gpu.py tests/faults/test_threads.py tests/compile/test_report.py
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),$(BIN)/python,$(PYTHON))

test-gpu: JOBS = 8
test-gpu: $(if $(filter file,$(origin PYTHON)),$(READY))  ## what a GPU can show: under 5 minutes on 16 cores
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
		|| { echo "nothing was tested: torch of $(GPU_PYTHON) finds no GPU here"; exit 2; }
	$(GPU_PYTHON) -m pytest $(ON_GPU) -m "not exhaustive" -p no:benchmark -W ignore::DeprecationWarning \
		$$($(GPU_PYTHON) -c 'from importlib.util import find_spec; print("$(SIDE_BY_SIDE)" if find_spec("xdist") else "")') $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && mkdir -p build/typed && cp -r moecomm build/typed/ && cp -r ops compile build/typed/moecomm/
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml  # it does not follow the package-dir mapping

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## the documentation site, into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(READY)  ## ratios to floors and to other ways of the same layer, into benchmarks/results and docs/benchmarks.md: under 10 minutes on 2 cores
	for each in floors host layer cpu_time experts kept sweep links figures; do $(BIN)/python -m benchmarks.$$each || exit 1; done

gpu: $(READY)  ## the same on a GPU, on one process
	for each in floors host layer experts kept sweep; do $(BIN)/python -m benchmarks.$$each --device cuda || exit 1; done
	$(BIN)/python -m benchmarks.figures

fuzz: $(READY)  ## very many random cases, other ones each time, against their definitions: 20 minutes
	FUZZ=1 $(BIN)/python -m pytest tests/fuzz $(ARGS)

soak: $(READY)  ## does anything grow? 30 minutes, into benchmarks/results; make soak ARGS="--minutes 5"
	$(BIN)/python -m benchmarks.soak $(ARGS)

sanitize: $(READY)  ## the ops' tests under compute-sanitizer, where there are a GPU and that
	@command -v compute-sanitizer > /dev/null && $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
		|| { echo "nothing was sanitized: there is no GPU here, or no compute-sanitizer"; exit 2; }
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --target-processes all --error-exitcode 1 \
		$(BIN)/python -m pytest tests/ops $(ARGS)

build/tools/.ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check pip-tools==7.6.2 pip-audit==2.10.1 build==1.6.1 twine==7.0.0
	touch $@

lock: build/tools/.ready  ## write requirements.lock anew, from pyproject.toml and constraints.txt
	CUSTOM_COMPILE_COMMAND="make lock" $(<D)/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras \
		--no-emit-find-links --no-emit-index-url --no-emit-trusted-host --extra demo --extra docs --extra lint --extra test \
		--constraint constraints.txt --output-file requirements.lock pyproject.toml

audit: build/tools/.ready  ## known vulnerabilities of what is locked: ends with 1 for some, with 2 where nobody can be asked
	$(<D)/bin/python .ci/audit.py requirements.lock

dist: build/tools/.ready  ## a wheel and an sdist in dist/; each is installed in a clean environment and trains a layer there
	rm -rf dist build/clean
	$(<D)/bin/python -m build --outdir dist .
	$(<D)/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/clean
	for each in dist/*; do \
		build/clean/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $$each \
			&& (cd build/clean && bin/python -I ../../.ci/installed.py && bin/python -I -m moecomm.info) \
			&& build/clean/bin/python -m pip uninstall --quiet --yes moecomm \
			&& ! build/clean/bin/python -I -c 'import moecomm' 2> /dev/null || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info runs
