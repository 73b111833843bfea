# Two commands for a fresh machine: `make demo` and `make test`. Both need git, make and Python 3.11 or 3.12.

# the first interpreter that starts and is of a supported version
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
UV_VERSION := 0.13.8
VENV := .venv
RUN := $(VENV)/bin
ENVIRONMENT := $(VENV)/.ready

export UV_PROJECT_ENVIRONMENT := $(VENV)
export UV_COMPILE_BYTECODE := 1
export UV_LINK_MODE := copy
export DO_NOT_TRACK := 1

.PHONY: help demo test test-slow bench-convert bench-live bench-data bench-checkpoints check lock clean

help:                   ## show the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

demo: $(ENVIRONMENT)    ## run the main job on a small model: fetch, import, train, verify, export, publish
	$(RUN)/bridgeworks demo

test: $(ENVIRONMENT)    ## run the tests (those marked slow or gpu are left out)
	$(RUN)/pytest -m "not slow and not gpu"

test-slow: $(ENVIRONMENT)  ## run the slow tests
	$(RUN)/pytest -m "slow and not gpu"

bench-convert: $(ENVIRONMENT)  ## measure conversions of a model of 3 GB against a copy of its files
	$(RUN)/python -m flows.benchmark_conversion

bench-live: $(ENVIRONMENT)  ## measure loading and exporting of live models against the ordinary ways
	$(RUN)/python -W ignore -m bridge.benchmark_live

bench-data: $(ENVIRONMENT)  ## measure building datasets of tokens against a plain loop
	$(RUN)/python -W ignore -m training.benchmark_data $(ARGUMENTS)

# without ARGUMENTS, a model of 82 million parameters
bench-checkpoints: ARGUMENTS ?= recipes.llama:llama32_1b_pretrain_config --layers 4 --seq-length 64 \
	--micro-batch-size 1 --global-batch-size 1 --steps 3 --warmup 1 model.hidden_size=768 \
	model.ffn_hidden_size=3072 model.num_attention_heads=12 model.num_query_groups=12 model.kv_channels=64 \
	model.vocab_size=32000
bench-checkpoints: $(ENVIRONMENT)  ## measure how long saving holds training up, asynchronously and not
	$(RUN)/python -W ignore -m training.benchmark_checkpoints $(ARGUMENTS)

check: $(ENVIRONMENT)   ## format, lint, import contracts, types
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/lint-imports
	$(RUN)/mypy

lock: .uv/bin/uv        ## renew uv.lock
	.uv/bin/uv lock

clean:                  ## remove the environment and the demo's workspace
	rm -rf $(VENV) .uv work

$(ENVIRONMENT): pyproject.toml uv.lock .uv/bin/uv
	.uv/bin/uv sync --frozen --python $(PYTHON)
	@touch $@

.uv/bin/uv:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found: install one, or name it with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
