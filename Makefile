.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOGS ?= logs

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

# torch first, in the build that pip finds here (an index for CPUs, PIP_EXTRA_INDEX_URL, has a smaller one), then the rest.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

train: $(VENV)/.installed ## Install, then run the quickstart: data, training, evaluation, report
	$(BIN)/python train.py experiment=quickstart

test: $(VENV)/.installed ## Install, then run the tests (SLOW=1: also those that take a quarter of a minute each)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(if $(SLOW),,-m "not slow")

lint: $(VENV)/.installed ## Check style, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

docs: $(VENV)/.installed ## Make the documentation's site in site/, links checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

ui: $(VENV)/.installed ## Show the runs in MLflow at http://127.0.0.1:5000 (LOGS=FOLDER: where paths.logs is not logs)
	$(BIN)/mlflow server --backend-store-uri sqlite:///$(LOGS)/mlflow.db --artifacts-destination $(LOGS)/mlartifacts --host 127.0.0.1 --port 5000

.PHONY: help train test lint docs ui
