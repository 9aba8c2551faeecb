# Two commands: make search, make test. Each makes .venv first if it is missing or older than the requirements.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
NAME ?= quick

.PHONY: search test test-faults sanitize format clean

search: .venv/.run
	$(BIN)/python main.py --config options/presets/quick.yaml --name $(NAME) --resume True
	$(BIN)/python inspect_model.py --experiment $(NAME)

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/python -m pytest -n auto --maxprocesses 8

# Processes killed at many moments, files damaged in many ways: the tests of faults at length
test-faults: .venv/.dev
	SNAS_FAULTS=long $(BIN)/python -m pytest -n auto --maxprocesses 8 --timeout 3600 tests/faults

# Every width of vectors, sizes with a border of each kind; compiling takes most of the time
sanitize: .venv/.dev
	SNAS_KERNELS=on SNAS_CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest tests/fused -k "not an_operation_is or -20- or -36- or -3-"

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
