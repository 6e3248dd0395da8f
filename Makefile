# make demo    convert the example model, build it for two ranks, generate text with them
# make test    linters, type checker, tests
# make lint    the first two of these
# make bench   speed at Qwen2.5-0.5B's shapes
# make test-gpu, make bench-gpu   the cuda target, on a machine with an NVIDIA GPU
# make sanitize-gpu   its kernels under compute-sanitizer
# make clean   remove what these made
#
# Nothing but Python 3.11 is assumed: the environment is made in .venv, and MPI comes from pip.

SHELL := /bin/bash

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Who speaks first in `make demo`.
PROMPT ?= ROMEO:
WORK := workdir/demo
MODEL := examples/drama-3m
PYTEST_ARGS ?=

# mpirun refuses to run as root unless told twice.
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif

SOURCES := $(shell find src -name '*.py' -o -name '*.cu' -o -name '*.cuh')
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench test-gpu bench-gpu sanitize-gpu clean
.DELETE_ON_ERROR:

demo: $(WORK)/engine/engine.yaml
	$(BIN)/mpirun -n 2 --bind-to none --map-by :OVERSUBSCRIBE $(BIN)/llmforge run $(WORK)/engine \
	  --prompt $$'$(PROMPT)\n' --max-new-tokens 200 --temperature 0.7 --seed 7 --stream

$(WORK)/checkpoint/manifest.yaml: $(VENV)/.demo $(SOURCES) $(wildcard $(MODEL)/*)
	$(BIN)/llmforge convert $(MODEL) -o $(WORK)/checkpoint --overwrite

$(WORK)/engine/engine.yaml: $(WORK)/checkpoint/manifest.yaml
	$(BIN)/llmforge build $(WORK)/checkpoint -o $(WORK)/engine --tensor-parallel 2 --overwrite

test: lint
	$(BIN)/python -m pytest -q -m "not slow and not gpu" $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini

bench: $(VENV)/.demo
	$(BIN)/llmforge convert -c configs/bench-qwen2.5-0.5b.yaml
	$(BIN)/llmforge build -c configs/bench-qwen2.5-0.5b.yaml
	$(BIN)/llmforge bench -c configs/bench-qwen2.5-0.5b.yaml

# On a machine with an NVIDIA GPU, in an environment that has torch with CUDA and llmforge[cuda,dev].
test-gpu:
	python3 -m pytest -q -n 8 tests/cuda --ignore tests/cuda/test_cuda_ranks.py
	python3 -m pytest -q tests/cuda/test_cuda_ranks.py

sanitize-gpu:
	python3 tests/cuda/sanitize.py

# Whether what torch says of the GPUs is true, in Python's words.
GPUS = python3 -c 'import sys, torch; sys.exit(not eval(sys.argv[1]))'
RESULTS := benchmarks/results

bench-gpu:
	python3 benchmarks/cuda_speed.py --json $(RESULTS)/cuda.json
	python3 benchmarks/cuda_serving.py --json $(RESULTS)/cuda_serving.json
	@if $(GPUS) 'torch.cuda.get_device_capability() == (9, 0)'; then set -x; \
	  python3 benchmarks/cuda_prompts.py --json $(RESULTS)/cuda_prompts.json; \
	else echo "left out: cuda_prompts.py, which wants compute capability 9.0"; fi
	@if $(GPUS) 'torch.cuda.device_count() > 1'; then set -x; \
	  mpirun -n 2 --bind-to none python3 benchmarks/cuda_ranks.py --json $(RESULTS)/cuda_ranks.json; \
	else echo "left out: cuda_ranks.py, which wants two GPUs"; fi

clean:
	rm -rf $(VENV) workdir .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps say that the environment holds what pyproject.toml and constraints.txt ask for.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -e '.[mpi,torch]'
	touch $@

$(VENV)/.test: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -e '.[mpi,torch,cuda,tensorrt-rtx,verify,dev]'
	touch $@ $(VENV)/.demo
