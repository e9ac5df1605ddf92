# make demo     install, then train a two-stage model on this machine's own Python source
# make test     install, then run the tests, but for those of the next four
# make test-kernels  fetch Triton (190 MB), run the GPU kernels in its interpreter and build them; Linux on x86 or ARM
# make test-lm-eval  fetch lm-evaluation-harness (340 MB) and let it measure an exported model; no network afterwards
# make test-cluster  on a cluster that it brings up: SLURM, hosts that fail; Debian and root, see tests/cluster/install.sh
# make test-image  build the container image and let docker/smoke.sh work in it; root, buildah and mmdebstrap
# make lint     ruff, format, mypy, and whether docs/configuration.md is what the schema says
# make bench    layer, training step, data, generation, start and saving, each against its peers (benchmarks/README.md)
# make format   let ruff write the format
#
# Needs Python 3.11 or newer, nothing else: no compiler, no MPI library. The first target that runs makes .venv.
#
#   PYTHON=/opt/python3.12/bin/python3   which interpreter .venv is made from
#   TORCH="torch==2.13.0 --index-url URL"  which torch to install; PyPI's Linux build is the one for NVIDIA GPUs
#   WORKERS=2                            how many processes share the tests, a file of them at a time, in their order:
#                                        xdist would leave files of few tests to the end, which are the longest
#   ARGS="-m 'not slow'"                 passed on to pytest, or to `stablemoe demo` (ARGS=schedule.steps=600)

PYTHON ?= $(or $(shell command -v python3.11),python3)
TORCH  ?= torch==2.13.0
TRITON ?= triton>=3.6
WORKERS ?= 2
ARGS   ?=

BIN       := .venv/bin
INSTALLED := .venv/.installed
PIP       := $(BIN)/python -m pip --disable-pip-version-check install
REFERENCE := $(BIN)/python -m stablemoe_ds.config.reference

# Launchers start what they find on PATH: it has to be what .venv holds.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-kernels test-lm-eval test-cluster test-image lint bench format install
.DEFAULT_GOAL := demo

demo: install
	@stablemoe demo $(ARGS)

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-kernels: install .venv/.triton
	PYTHONPATH=.venv/triton $(BIN)/python -m pytest tests/ops $(ARGS)

test-lm-eval: install .venv/.lm-eval
	$(BIN)/python -m pytest tests/export/test_lm_eval.py -rs $(ARGS)

test-cluster: install
	sh tests/cluster/install.sh
	$(BIN)/python -m pytest tests/cluster -rs --timeout 600 $(ARGS)

test-image: install
	$(BIN)/python -m pytest tests/docker/image -rs $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(REFERENCE) | diff docs/configuration.md - >&2 \
	  || { echo "docs/configuration.md is not current: run '$(REFERENCE) > docs/configuration.md'" >&2; exit 1; }

bench: install
	for name in moe_layer overlap step zero_stages long_sequence data generation resident_experts startup checkpoint; do \
	  $(BIN)/python -m benchmarks.$$name --output benchmarks/results/$$name.json $(ARGS) || exit 1; \
	done

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

# torch first and exact, so that nothing later chooses another build of it. pip would compile on one core, for minutes,
# and leave out this package, which every process would then compile for itself. Models of transformers and tests of
# libraries are a third of all, and not used; a few files are not for this Python.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is not Python 3.11 or newer: name one that is with 'make PYTHON=...'" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'installing into .venv, which takes some minutes'
	$(PIP) -q --no-compile $(TORCH)
	$(PIP) -q --no-compile -e '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests/|/transformers/models/[^a]' .venv/lib stablemoe_ds || true
	@$(BIN)/python -m compileall -qq -j 0 tests
	@touch $@

.venv/.lm-eval: $(INSTALLED)
	$(PIP) -q -e '.[lm-eval]'
	@touch $@

# In a folder of its own: what other libraries do depends on whether they find Triton.
.venv/.triton: $(INSTALLED)
	$(PIP) -q --no-deps --upgrade --target .venv/triton "$(TRITON)"
	@touch $@
