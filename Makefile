# Baton: every target sets up what it needs. Override on the command line:
#   make sft RECIPE=recipes/real.yaml LAUNCH=recipes/launch/cpu2.yaml SET="sft.train.max_steps=100"
RECIPE ?= recipes/tiny.yaml
LAUNCH ?=
SET    ?=
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN     = $(BIN)/baton run $(RECIPE) $(if $(LAUNCH),--launch $(LAUNCH)) $(SET)

.DEFAULT_GOAL := help
.PHONY: help setup tokenizer pretrain sft reward ppo grpo rloo dpo generate rlhf align-dpo eval report chat test test-fast lint bench smollm2 clean

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo; echo "  RECIPE=$(RECIPE)  LAUNCH=$(LAUNCH)  SET=\"section.key=value ...\""

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Baton needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --config-settings editable_mode=compat -e .
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready requirements-test.lock
	$(BIN)/python -m pip install --quiet -c requirements.lock -r requirements-test.lock
	@touch $@

setup: $(VENV)/.ready  ## create .venv from requirements.lock
tokenizer: setup  ## train the tokenizer
	$(RUN) --to tokenizer
pretrain: setup  ## ... and pretrain
	$(RUN) --to pretrain
sft: setup  ## ... and tune on instructions
	$(RUN) --to sft
reward: setup  ## ... and train the reward model
	$(RUN) --to reward
ppo: setup  ## ... and align with PPO against the reward model
	$(RUN) --to ppo
grpo: setup  ## ... and learn from verifiable rewards with GRPO
	$(RUN) --to grpo
rloo: setup  ## ... or with RLOO
	$(RUN) --to rloo
dpo: setup  ## ... and align with DPO on the preference pairs
	$(RUN) --to dpo
generate: setup  ## ... and publish sampled answers as rows, as in recipes/rejection.yaml
	$(RUN) --to generate
rlhf: setup  ## the whole chain: tokenizer to PPO, then evaluation and the report
	$(RUN) --to ppo --to evaluate
	$(BIN)/baton report $(RECIPE)
align-dpo: setup  ## the chain with DPO in place of reward model and PPO
	$(RUN) --to dpo --to evaluate
	$(BIN)/baton report $(RECIPE)
eval: setup  ## evaluate the models that the run has
	$(RUN) --to evaluate
report: setup  ## one HTML page about the run
	$(BIN)/baton report $(RECIPE)
chat: setup  ## talk to the newest aligned model
	$(BIN)/baton chat $(RECIPE)
test: $(VENV)/.ready-test  ## all tests, two files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test-fast: $(VENV)/.ready-test  ## the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"
lint: $(VENV)/.ready-test  ## format, lint, types and spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
bench: setup  ## the benchmarks
	$(BIN)/python -m benchmarks
smollm2: setup  ## SmolLM2-135M-Instruct through every stage: 45 minutes; the data: docs/real.md
	$(BIN)/python -m benchmarks.real_model $(SET)
clean:  ## remove runs/ and caches, keep .venv
	rm -rf runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
