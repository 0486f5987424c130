# make demo   install into .venv, train across four hospitals, compare strategies, export ONNX
# make test   everything CI holds: format, lint, types, layers, tests with coverage
# make sbom   what a deployment consists of, as CycloneDX JSON (make test writes it too)
# make docs   the pages of docs/ as a site in out/docs, complete in itself
# make extras what needs other people's heavy libraries: Flower, trackers, a model server, a browser, the site
# make faults kill, cut, misuse and flood a running federation, and count what was lost
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test extras check protos sbom locks bench faults figures docs clean

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

test: check sbom
	$(BIN)/pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered --cov-fail-under=91 --durations=10

$(VENV)-extras/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-extras
	$(VENV)-extras/bin/pip install --quiet torch==2.13.0
	$(VENV)-extras/bin/pip install --quiet --constraint constraints.txt --editable '.[dev,browser,docs,flower,mlflow,tensorboard]'
	@touch $@

# The model server pins what others want newer; it needs no fedkit.
$(VENV)-serving/ready: Makefile
	$(PYTHON) -m venv $(VENV)-serving
	$(VENV)-serving/bin/pip install --quiet mlserver==1.7.1 onnxruntime==1.31.1
	@touch $@

extras: $(VENV)-extras/ready $(VENV)-serving/ready
	OUT=$(OUT) FEDKIT_MLSERVER=$(abspath $(VENV)-serving/bin/mlserver) \
		$(VENV)-extras/bin/pytest tests/extras --durations=10

$(VENV)-supply/ready: Makefile
	$(PYTHON) -m venv $(VENV)-supply
	$(VENV)-supply/bin/pip install --quiet uv==0.12.24 cyclonedx-bom==7.5.0
	@touch $@

# What a deployment from the lock file consists of, as CycloneDX.
sbom: $(VENV)-supply/ready
	@mkdir -p $(OUT)
	PYTHONWARNINGS=ignore $(VENV)-supply/bin/cyclonedx-py requirements locks/cpu.lock --pyproject pyproject.toml \
		--output-reproducible --of JSON -o $(OUT)/sbom.cdx.json

COMPILE := $(VENV)-supply/bin/uv pip compile --constraint constraints.txt --quiet --generate-hashes \
	--no-header --no-emit-index-url --no-emit-find-links --no-annotate \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28

# After a change of constraints.txt; TORCH_CPU is where PyTorch's CPU builds are.
locks: $(VENV)-supply/ready
	$(COMPILE) locks/build.txt --output-file locks/build.lock
	$(COMPILE) pyproject.toml --extra he --output-file locks/gpu.lock
	UV_FIND_LINKS="$(TORCH_CPU)" $(COMPILE) pyproject.toml --extra he --override locks/cpu-torch.txt --output-file locks/cpu.lock

protos: $(VENV)/dev
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. $(wildcard fedkit/protos/*.proto)

faults: $(VENV)/dev
	$(BIN)/python bench/faults.py
	$(BIN)/python bench/floods.py

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
	$(BIN)/python bench/idle_agents.py

$(VENV)-docs/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet torch==2.13.0
	$(VENV)-docs/bin/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

docs: $(VENV)-docs/ready
	$(VENV)-docs/bin/mkdocs build --strict --site-dir $(OUT)/docs

# It writes docs/figures.md. DATA is a folder with the Fashion-MNIST files, for figures that need them and half an hour.
figures: $(VENV)/dev $(VENV)-pfl/ready $(VENV)-peers/ready
	$(BIN)/python bench/figures.py $(PEERS) --page docs/figures.md $(if $(DATA),--data "$(DATA)")

clean:
	rm -rf $(VENV) $(VENV)-pfl $(VENV)-peers $(VENV)-supply $(VENV)-extras $(VENV)-serving $(VENV)-docs $(OUT) .coverage .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
