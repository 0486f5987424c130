# make demo   install into .venv, train across four hospitals, compare strategies, export ONNX
# make test   everything CI holds: format, lint, types, layers, tests with coverage
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out
DATA ?= $(FEDKIT_DATA)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check bench figures clean

$(VENV)/core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/dev: $(VENV)/core
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/core
	$(BIN)/fedkit demo --out $(OUT)/demo

check: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered --cov-fail-under=90 --durations=10

bench: $(VENV)/dev
	$(BIN)/python bench/run.py

figures: $(VENV)/dev
	$(BIN)/python bench/figures.py $(if $(DATA),--data $(DATA))

clean:
	rm -rf $(VENV) $(OUT) .coverage .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
