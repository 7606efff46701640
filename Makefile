# Everything runs in the project's own environment, .venv. Targets never download anything once installed.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
BENCH := .venv-bench/.installed

.PHONY: help install demo test docs bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-9s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## Make .venv and install the project with its pinned dependencies

$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing into .venv: a minute or two"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(INSTALLED) ## Pretrain on the embedded digits, probe and export: minutes on 2 CPU cores
	$(BIN)/accelerate launch $(LAUNCH) pretrain/run.py pretrain/recipes/digits.yaml

test: $(INSTALLED) ## Style, types, import directions and tests, with coverage
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n 2 --dist loadfile --cov --cov-report=term

docs: $(INSTALLED) ## Build the documentation: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(BENCH): pyproject.toml constraints.txt benchmarks/requirements.txt benchmarks/torchvision_names.py
	@echo "installing the peers into .venv-bench: some minutes"
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[fast]'
	.venv-bench/bin/python benchmarks/peers.py install
	@touch $@

bench: $(BENCH) ## Measure beside peers; ONLY="step loader" some of it, QUICK=1 tiny, DATA=FOLDER for learning
	.venv-bench/bin/python benchmarks/run.py --only $(ONLY) $(if $(QUICK),--quick) $(if $(DATA),--data $(DATA))

clean: ## Remove the environments, the demo's shards and the built documentation, but no runs
	rm -rf .venv .venv-bench shards site

# One process; spelt out, the launcher has nothing to warn about, and quiet, it adds no traceback to our messages.
LAUNCH := --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
