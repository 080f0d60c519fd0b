# `make train` and `make test` are all a newcomer needs: both make .venv when it is not there.
#
#   make train ARGS="model=k2_micro schedule.max_steps=20"
#   make test  ARGS="tests/optim -k clip"
#   make PYTHON=/path/to/python ...     the Python that .venv is made from
#
# If that Python already has a torch (a CUDA image, say), .venv sees its packages and keeps that
# torch; otherwise TORCH is installed: make TORCH="torch==2.13.0 --index-url URL" says which.
#
# On PyPI torch is a CUDA build of gigabytes. Where there is no nvidia-smi, torch's own index of CPU
# builds is asked too; out of reach, it costs pip a warning. --no-deps: it is asked for torch alone,
# whose dependencies come with those of kimi_pretrain from wherever pip takes its packages.

PYTHON ?= python3
CPU    := --no-deps --extra-index-url https://download.pytorch.org/whl/cpu
TORCH  ?= torch==2.13.0 $(if $(shell which nvidia-smi 2>/dev/null),,$(CPU))
ARGS   ?=

VENV      := .venv
READERS   := .venv-readers
BIN       := $(VENV)/bin
PIP       := $(BIN)/python -m pip --disable-pip-version-check -q install
CSRC      := $(shell find csrc -type f -not -name '*.pyc')
HAS_TORCH := -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-slurm test-megatron docker-check system dry-run-presets presets lint format bench gpu-check clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

train: $(VENV)/core  ## pretrain the default model (ARGS: Hydra overrides)
	@$(BIN)/kimi-pretrain train $(ARGS)

test: $(VENV)/dev  ## run the tests (ARGS: pytest arguments)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" $(ARGS)

test-slow: $(VENV)/dev $(VENV)/megatron  ## run the tests that take minutes
	@OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/megatron $(BIN)/python -m pytest -q -m slow $(ARGS)

test-slurm: system $(VENV)/dev  ## run the tests on a real Slurm, and on two hosts one of which is lost
	@$(PIP) hydra-submitit-launcher
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/distributed/test_slurm.py \
	    tests/distributed/test_two_hosts.py $(ARGS)

test-megatron: $(VENV)/dev $(VENV)/megatron  ## hold our token files against those of Megatron's own code
	@OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/megatron $(BIN)/python -m pytest -q \
	    tests/data/test_indexed.py -k megatron $(ARGS)

docker-check:  ## build the CPU image and train in it (root, buildah, debootstrap; docs/docker.md)
	@docker/check.sh $(ARGS)

system:  ## Debian packages of the launchers' tests (root; without them those are skipped)
	@if ! which slurmctld munged ip ssh sshd >/dev/null; then apt-get -qq update && \
	    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
	    slurm-wlm munge iproute2 openssh-client openssh-server >/dev/null; fi

dry-run-presets: $(VENV)/dev  ## run whole steps of the presets on some ranks, without memory (minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python docs/presets/pages.py --dry-run

presets: $(VENV)/dev  ## write the plans and pictures of docs/presets anew
	@OMP_NUM_THREADS=1 $(BIN)/python docs/presets/pages.py

lint: $(VENV)/dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev  ## rewrite the sources in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/bench $(READERS)/made  ## every benchmark, each printing a ratio against a named peer
	@for name in optimizer_step training_throughput loss_at_equal_tokens sharded_optimizer \
	    wire_bytes zero1_deepspeed executor_overhead pipeline_bubble simulator_truth \
	    hidden_communication native_kernels activation_memory watching_cost; do $(BIN)/python -m benchmarks.$$name || exit 1; done
	@$(READERS)/bin/python -m benchmarks.data_reading

gpu-check: $(VENV)/dev  ## on a machine with a GPU: kernels, bandwidth, streams, NCCL; writes gpu-check.md
	@$(BIN)/python -m benchmarks.gpu_check $(ARGS)

clean:  ## remove what building and testing left behind (runs/ stays)
	rm -rf kimi_pretrain/ops/native/_kernels.so $(VENV) $(READERS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# --- the environment: one stamp for each set of requirements ---------------------------------

$(VENV)/made:
	@echo "making $(VENV) from $$($(PYTHON) --version)"
	@if $(PYTHON) $(HAS_TORCH); then $(PYTHON) -m venv --system-site-packages $(VENV); \
	    else $(PYTHON) -m venv $(VENV); fi
	@$(PIP) 'setuptools>=77'
	@$(BIN)/python $(HAS_TORCH) || $(PIP) --retries 2 $(TORCH)
	@touch $@

# Without build isolation: csrc/ is compiled against the torch that is installed, with its setuptools.
$(VENV)/core: $(VENV)/made setup.py $(CSRC)
	@echo "installing kimi_pretrain, its kernels compiled"
	@$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/dev: $(VENV)/made setup.py $(CSRC)
	@echo "installing kimi_pretrain with the tools for tests, its kernels compiled"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $(VENV)/core $@

# Beside the environment, not in it; the torch that it asks for is there.
$(VENV)/megatron: | $(VENV)/dev
	@$(PIP) --no-deps --target $@ megatron-core==0.16.1

$(VENV)/bench: $(VENV)/dev
	@echo "installing the benchmarks' peers"
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP) --no-build-isolation 'deepspeed>=0.19.8'
	@touch $@

# These readers pin other versions of torch and transformers than the tests need.
$(READERS)/made: setup.py
	@echo "making $(READERS)"
	@$(PYTHON) -m venv $(READERS)
	@$(READERS)/bin/python -m pip --disable-pip-version-check -q install -e '.[readers]'
	@touch $@
