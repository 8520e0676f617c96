# SPDX-License-Identifier: Apache-2.0
# SGLANG: the version of SGLang to run with, as in `make test SGLANG=0.5.23`.
# ARGS: more arguments of the command that a target starts.
SGLANG ?= 0.5.17
ARGS ?=
BIN := .venv/bin

# Everything comes from this checkout; without it, loading a local folder may still ask a hub.
export HF_HUB_OFFLINE := 1
# OpenMP's waiting threads sleep: spinning costs ten times the time where processes share few cores.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help env demo serve test lint

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Options: SGLANG=$(SGLANG) (its version), ARGS='...' (more arguments), PYTHON=... (3.11 or 3.12)"

env: ## creates the environment, if there is none (about 9 GB, shared by all checkouts)
	@.ci/env --sglang $(SGLANG)

demo: env ## real SGLang answers questions about long texts, with TokenSelect and dense
	@$(BIN)/sglang-tokenselect demo $(ARGS)

serve: env ## the demo's TokenSelect server, for your own prompts, on port 30000
	@exec $(BIN)/python -m sglang_tokenselect.needle_server $(ARGS)

test: env ## all tests
	@$(BIN)/python -m pytest -v --durations=10 $(ARGS)

lint: env ## ruff: rules and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
