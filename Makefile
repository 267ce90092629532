# make demo: serve the shipped model and watch branching prompts share what they have in common.
# make check: lint, type-check and the core tests. make test: every test that needs no GPU.
# All make .venv first; nothing outside it is touched. PYTHON=python3.12 make demo picks the interpreter.

PYTHON ?= python3
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := .ci/constraints.txt
OPENAI_2 := .ci/openai-2.txt
PACKAGES := radix kernels runtime frontend
FAST := tests/test_layout.py tests/radix tests/runtime/scheduler tests/runtime/executor tests/runtime/tokenizer
# torch's threads must not spin where tests and servers share two cores (runtime/executor/torch_environment.py has the measurement)
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo check test lint test-gpu bench bench-gpu soak fuzz install clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.installed ## install, start a server on the shipped model, run examples/quickstart.py against it, stop
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

test: lint ## install with the test extras, lint, type-check, then every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile --no-loadscope-reorder

check: lint ## lint, types and the core tests, two to four minutes: the loop to work in
	$(BIN)/python -m pytest -m "not gpu" $(FAST)

lint: $(VENV)/.installed-test ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy $(PACKAGES)

test-gpu: $(VENV)/.installed-gpu ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

bench: $(VENV)/.installed-test ## tree, planner, BranchBench and transformers on this machine; figures under .bench/
	env -u OMP_WAIT_POLICY $(BIN)/python tests/benchmarks/run.py

bench-gpu: $(VENV)/.installed-gpu ## BranchBench on a GPU beside vLLM's and SGLang's figures, and where a step's time goes
	$(BIN)/python tests/benchmarks/bench_gpu.py

soak: $(VENV)/.installed-test ## hostile and leaving clients, killed and stopped processes: MINUTES=60
	nice -n 10 $(BIN)/python tests/soak/soak.py --minutes $(or $(MINUTES),60)

fuzz: $(VENV)/.installed-test ## the property tests and state machines with new draws, ROUNDS=5 times
	for round in $$(seq $(or $(ROUNDS),5)); do \
	  HYPOTHESIS_PROFILE=new $(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile \
	    $$(grep -rl '^from hypothesis' tests --include='test_*.py') || exit 1; done

install: $(VENV)/.installed ## .venv with the package, nothing else

clean: ## caches and build outputs (not .venv)
	rm -rf build dist *.egg-info .bench .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -print | xargs rm -rf

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Branchwise needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Could not make $(VENV). On Debian: apt-get install python3-venv"; exit 1; }

# On Linux, PyPI's torch brings gigabytes of CUDA libraries. Where there is no NVIDIA device the CPU build is taken
# instead: from the configured indexes if they hold it, then from PyTorch's own index, and only then PyPI's.
$(VENV)/.torch: $(PINS) | $(BIN)/python
	@version=$$(sed -n 's/^torch==//p' $(PINS)); \
	if [ "$$(uname -s)" != Linux ] || [ -e /dev/nvidiactl ]; then touch $@; exit 0; fi; \
	echo "installing torch $$version (CPU build)"; \
	$(PIP) install -q --no-deps "torch==$$version+cpu" 2>/dev/null || \
	$(PIP) install -q --no-deps --retries 1 --timeout 60 --index-url $(CPU_INDEX) "torch==$$version+cpu" || \
	echo "no CPU build of torch $$version to be had from $(CPU_INDEX); taking the default one"; \
	touch $@

$(VENV)/.installed: pyproject.toml $(PINS) $(VENV)/.torch
	@echo "installing branchwise into $(VENV)"
	@$(PIP) install -q -c $(PINS) -e .
	@touch $@

# openai's two majors cannot be installed together: the older one goes into a folder that only its tests look into.
$(VENV)/.installed-test: $(VENV)/.installed $(OPENAI_2)
	@echo "installing the test extras"
	@$(PIP) install -q -c $(PINS) -e '.[test]'
	@rm -rf $(VENV)/openai-2
	@$(PIP) install -q --no-deps --target $(VENV)/openai-2 -r $(OPENAI_2)
	@touch $@

$(VENV)/.installed-gpu: $(VENV)/.installed-test
	@echo "installing the GPU extras"
	@$(PIP) install -q -c $(PINS) -e '.[gpu,test]'
	@touch $@
