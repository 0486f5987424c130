# make demo   install into .venv, train across four hospitals, compare strategies, export ONNX
# make test   everything CI holds: format, lint, types, layers, tests with coverage
# make faults kill and cut a running federation at random and count what was lost
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check protos bench faults figures clean

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
	$(BIN)/pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered --cov-fail-under=91 --durations=10

protos: $(VENV)/dev
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. $(wildcard fedkit/protos/*.proto)

faults: $(VENV)/dev
	$(BIN)/python bench/faults.py

$(VENV)-pfl/ready: Makefile
	$(PYTHON) -m venv $(VENV)-pfl
	$(VENV)-pfl/bin/pip install --quiet torch==2.13.0
	$(VENV)-pfl/bin/pip install --quiet pfl==0.6.0
	@touch $@

$(VENV)-peers/ready: Makefile constraints.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/pip install --quiet torch==2.13.0
	$(VENV)-peers/bin/pip install --quiet --constraint constraints.txt flwr==1.41.0 nvflare==2.9.0
	@touch $@

PEERS := --pfl $(VENV)-pfl/bin/python --peers $(VENV)-peers/bin/python

bench: $(VENV)/dev $(VENV)-pfl/ready $(VENV)-peers/ready
	$(BIN)/python bench/run.py $(PEERS)

figures: $(VENV)/dev $(VENV)-pfl/ready $(VENV)-peers/ready
	$(BIN)/python bench/figures.py $(PEERS)

clean:
	rm -rf $(VENV) $(VENV)-pfl $(VENV)-peers $(OUT) .coverage .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
