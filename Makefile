# make demo [SEED=n] [DEVICE=cpu|cuda] [RUNS=dir]   train the toy reasoner from scratch and plot what it learned
#           [ROLLOUT=embedded|sglang]               ... with the real SGLang as the engine
# make test                                        lint, import layers and the tests of every commit
#           [R1MEGA_EXTENDED=1]                     ... and those that take minutes each: hours
# make sglang-cpu                                  the environment of the real SGLang on a machine without a GPU
# make slurm-test-env                              Slurm for its tests, where this is root on Debian or Ubuntu
# make lint | venv | sandbox | snapshots | clean
# Each makes its virtual environment first where there is none. PY=/path/to/python uses an environment of yours instead.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.ONESHELL:
# Both environments are made at the same time.
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += --jobs=2
endif

SEED ?= 0
DEVICE ?= cpu
RUNS ?= runs
ROLLOUT ?= embedded
PYTHON ?= python3

# PyPI's Linux torch is a CUDA build; the CPU build is a tenth of its size and comes from torch's own index.
ifeq ($(DEVICE),cuda)
VENV ?= .venv-cuda
TORCH_PIP_ARGS ?=
# NCCL wants a GPU for each process: one process here, more with e.g. LAYOUT='parallel.tp=2 parallel.ep=2'.
LAYOUT ?= parallel=single
ENGINES ?= 1
else
VENV ?= .venv
TORCH_PIP_ARGS ?= --extra-index-url https://download.pytorch.org/whl/cpu
LAYOUT ?= parallel=tp2_pp2_ep2
ENGINES ?= 2
endif

ifeq ($(origin PY),undefined)
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
endif
R1MEGA := $(PY) -m r1mega.cli

.PHONY: demo test lint venv sglang-cpu slurm-test-env sandbox system-packages snapshots clean
.DEFAULT_GOAL := test

venv: $(STAMP)

$(VENV)/.stamp: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "r1mega needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	# Alone and first: nothing else shall be looked up in torch's index. The version stands in setup.cfg.
	$(VENV)/bin/python -m pip install --no-deps "$$(sed -n 's/^ *\(torch==.*\)$$/\1/p' setup.cfg)" $(TORCH_PIP_ARGS)
	$(VENV)/bin/python -m pip install -e '.[cpu,test]'
	touch $@

# SGLang pins what it needs, and not what we need: it gets an environment of its own. About 2 minutes and 2 GB.
SGLANG_VENV ?= .venv-sglang

sglang-cpu: $(SGLANG_VENV)/.stamp

$(SGLANG_VENV)/.stamp: setup.cfg $(wildcard tools/sglang_cpu/*.* tools/sglang_cpu/*/*.py)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "SGLang's environment needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(SGLANG_VENV)/bin/python || $(PYTHON) -m venv $(SGLANG_VENV)
	# As above: alone and first, then held by the constraint. SGLang itself would bring its CUDA build.
	torch="$$(sed -n 's/^ *\(torch==.*\)$$/\1/p' setup.cfg)"
	$(SGLANG_VENV)/bin/python -m pip install --no-deps "$$torch" $(TORCH_PIP_ARGS)
	$(SGLANG_VENV)/bin/python -m pip install -r tools/sglang_cpu/requirements.txt -c <(echo "$$torch")
	$(SGLANG_VENV)/bin/python -m pip install --no-deps -r tools/sglang_cpu/no-deps.txt
	# Its version does not change with its text.
	$(SGLANG_VENV)/bin/python -m pip install --no-deps --force-reinstall ./tools/sglang_cpu
	touch $@

# The base model is trained anew as well, so that the seed decides everything. The run before is kept once, as NAME.previous.
demo: $(STAMP) $(if $(filter sglang-cpu,$(ROLLOUT)-$(DEVICE)),sglang-cpu)
	@for name in toy_base demo; do
	    if [ -e "$(RUNS)/$$name" ]; then
	        rm -rf "$(RUNS)/$$name.previous"
	        mv "$(RUNS)/$$name" "$(RUNS)/$$name.previous"
	        echo "kept the run before as $(RUNS)/$$name.previous"
	    fi
	done
	$(PY) tools/make_toy.py --out "$(RUNS)/toy"
	$(R1MEGA) train experiment=toy_base device=$(DEVICE) $(LAYOUT) run.seed=$(SEED) run.dir="$(RUNS)/toy_base" \
	    model.hf="$(RUNS)/toy/base_config" data.train="$(RUNS)/toy/sft.jsonl"
	$(R1MEGA) train experiment=toy device=$(DEVICE) $(LAYOUT) rollout=$(ROLLOUT) rollout.engines=$(ENGINES) \
	    sglang.python=$(SGLANG_VENV)/bin/python run.seed=$(SEED) run.dir="$(RUNS)/demo" \
	    model.hf="$(RUNS)/toy_base/hf" data.train="$(RUNS)/toy/train.jsonl" data.eval="$(RUNS)/toy/eval.jsonl"
	echo "curves, samples and summary: $(RUNS)/demo"

# The tests start a Slurm of their own, and say so where they cannot. Nothing is installed where it is there already.
slurm-test-env:
	@if command -v slurmctld slurmd munged sbatch >/dev/null; then
	    exit 0
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	    apt-get update -qq || true
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge \
	        || echo "Slurm cannot be installed here: its tests will be skipped"
	else
	    echo "Slurm is not installed, and this is not root with apt-get: its tests will be skipped"
	fi

# Programs under test run in bubblewrap; their tests are skipped, and say so, where it is neither there nor to be had.
sandbox:
	@if ! command -v bwrap > /dev/null; then
	    if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
	        { apt-get install -y -q bubblewrap || { apt-get update -q && apt-get install -y -q bubblewrap; }; } > /dev/null \
	            || echo "bubblewrap cannot be installed: the tests of the sandbox will be skipped"
	    else
	        echo "no bwrap on PATH (Debian: apt-get install bubblewrap): the tests of the sandbox will be skipped"
	    fi
	fi

# One after the other: two cannot run apt-get at once.
system-packages:
	@$(MAKE) --no-print-directory slurm-test-env
	$(MAKE) --no-print-directory sandbox

# Three tests at a time, since many wait for other processes, each file's one after another (tests/conftest.py), what takes
# longest first. Then those with a real Slurm, which mostly wait, beside those with real servers, whose processes need both
# cores: trainer and servers wait for each other in every step.
TEST_FOLDERS := $(addprefix tests/,e2e dist parity gpu unit config)

test: lint sglang-cpu system-packages
	@failed=0
	export OMP_NUM_THREADS=1 R1MEGA_SGLANG_PYTHON="$(abspath $(SGLANG_VENV))/bin/python"
	$(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(TEST_FOLDERS) || failed=1
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/slurm tests/engine || failed=1
	exit $$failed

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()' --no-logo

# Write what every file of conf/ resolves to; review the difference before committing it.
snapshots: $(STAMP)
	R1MEGA_WRITE_SNAPSHOTS=1 $(PY) -m pytest -q tests/config

clean:
	rm -rf .venv .venv-cuda .venv-sglang build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
