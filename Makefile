# make demo, make test: each sets up .venv first, with vLLM's CUDA build where there is a GPU,
# else with its CPU build.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint setup clean check-python

PYTHON ?= python3
PYTEST_ARGS ?=
# Processes that run the tests of the CPU build, each a file at a time: most of them use one core.
WORKERS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := .venv/.installed
LOCK := requirements-cpu.txt
TORCH_INDEX := https://download.pytorch.org/whl/cpu
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)

# pip tells of every package; every 20th is enough to see that it moves.
PROGRESS := awk '/^(Collecting|Processing|Requirement already)/ && ++n % 20 == 0 \
	{ print "  " n " packages" } /^Installing collected/ { print "  unpacking" } { fflush() }'
# A machine may have package mirrors that lack some packages; that is no news.
QUIET := 2> >(grep -v "is neither a file nor a directory" >&2 || true)

help:
	@echo "make demo    serve a small adapted model, offline and over the API (first run: minutes)"
	@echo "make test    run the tests; PYTEST_ARGS='-k routing -x' is passed on to pytest"
	@echo "make lint    ruff and mypy, of the versions that pyproject.toml pins"
	@echo "make setup   only make the environment in .venv (PYTHON=python3.11 chooses the interpreter)"
	@echo "make clean   remove .venv, demo/ and caches"

setup: $(STAMP)

demo: $(STAMP)
	@$(BIN)/python -m vllm_adafuse.demo

test: $(STAMP)
	$(BIN)/pytest -q $(if $(GPU),,-n $(WORKERS) --dist loadfile --no-loadscope-reorder) $(PYTEST_ARGS)

# An environment of its own: neither needs torch, so that it is there in seconds.
lint: .lint/.installed
	.lint/bin/ruff check .
	.lint/bin/mypy

.lint/.installed: pyproject.toml | check-python
	@test -x .lint/bin/pip || $(PYTHON) -m venv .lint
	@.lint/bin/python -m pip --disable-pip-version-check install -q \
		$$(sed -n 's/^lint = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d '",') $(QUIET)
	@touch $@

clean:
	rm -rf .venv .lint demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

check-python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "$(PYTHON) not found: install Python 3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, $(if $(GPU),10,11)))' || { \
		echo "$$($(PYTHON) --version) is too old: vllm-adafuse needs Python 3.10 or newer (the" \
			"pinned CPU environment 3.11). Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "$(PYTHON) lacks its module venv: apt install python3-venv (or your system's name" \
			"for it)" >&2; exit 1; }

$(STAMP): $(LOCK) pyproject.toml | check-python
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
ifeq ($(GPU),yes)
	@echo "Installing vLLM's CUDA build and what it needs ..."
	@$(PIP) install -e '.[test]' $(QUIET) | $(PROGRESS)
else
	@echo "Installing torch (CPU build, 190 MB) ..."
	@$(PIP) install --no-deps --no-compile -q "$$(grep '^torch==' $(LOCK))" 2>/dev/null || \
		$(PIP) install --no-deps --no-compile --extra-index-url $(TORCH_INDEX) \
			"$$(grep '^torch==' $(LOCK))"
	@echo "Installing the $$(grep -c == $(LOCK)) packages of $(LOCK) ..."
	@grep == $(LOCK) | xargs -P 2 -n 40 $(PIP) install --no-deps --no-compile $(QUIET) | $(PROGRESS)
	@echo "Compiling them ..."
	@$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true  # some hold templates
	@echo "Installing vllm-adafuse from this directory ..."
	@$(PIP) install --no-deps --no-build-isolation -q -e .
	@$(BIN)/python -m vllm_adafuse.cpu_metadata
endif
	@touch $@
	@echo "The environment is ready: source .venv/bin/activate"
