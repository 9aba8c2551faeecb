# Two commands: make search, make test. Each makes .venv first if it is missing or older than the requirements.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
NAME ?= quick

.PHONY: search test format clean

search: .venv/.run
	$(BIN)/python main.py --config options/presets/quick.yaml --name $(NAME) --resume True
	$(BIN)/python inspect_model.py --experiment $(NAME)

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/python -m pytest

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/.run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.dev: requirements-dev.txt .venv/.run
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
