# SPDX-License-Identifier: Apache-2.0
# SGLANG: the version of SGLang to run with, as in `make test SGLANG=0.5.23`.
# ARGS: more arguments of the command that a target starts.

# The ends of the supported range. GPUs need the oldest, so it is what the targets run with; `make test` runs both.
OLDEST := 0.5.17
NEWEST := 0.5.23
SGLANG ?= $(OLDEST)
ARGS ?=
# Environments of several versions live side by side.
VENV := $(if $(filter $(OLDEST),$(SGLANG)),.venv,.venv-$(SGLANG))
BIN := $(VENV)/bin

# Everything comes from this checkout; without it, loading a local folder may still ask a hub.
export HF_HUB_OFFLINE := 1
# OpenMP's waiting threads sleep: spinning costs ten times the time where processes share few cores.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help env demo serve test pytest lint versions

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Options: SGLANG=$(SGLANG) (its version), ARGS='...' (more arguments), PYTHON=... (3.11 or 3.12)"

env: ## creates the environment, if there is none (about 9 GB, shared by all checkouts)
	@.ci/env --sglang $(SGLANG) --venv $(VENV)

demo: env ## real SGLang answers questions about long texts, with TokenSelect and dense
	@$(BIN)/sglang-tokenselect demo $(ARGS)

serve: env ## the demo's TokenSelect server, for your own prompts, on port 30000
	@exec $(BIN)/python -m sglang_tokenselect.needle_server $(ARGS)

test: ## all tests on the newest SGLang, a smoke test on the oldest; with SGLANG= or ARGS= one run of pytest
ifeq ($(origin SGLANG)$(ARGS),file)
	@echo "All tests on SGLang $(NEWEST), then those marked smoke on $(OLDEST)"
	@$(MAKE) --no-print-directory pytest SGLANG=$(NEWEST) ARGS="--ran suite"
	@$(MAKE) --no-print-directory pytest SGLANG=$(OLDEST) ARGS="--ran smoke -m smoke"
else
	@$(MAKE) --no-print-directory pytest
endif

pytest: env
	@$(BIN)/python -m pytest -v --durations=10 $(ARGS)

lint: env ## rules and format (ruff), types (mypy), spelling (typos)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/typos

versions: env ## the README's table of versions, from what `make test` and the GPU tests ran here last
	@$(BIN)/python tests/support/versions.py
