# Everything sets itself up on a fresh machine: `make demo` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ZOO := models/zoo
BUNDLE := build/efficientnet_lite0
STREETS := build/deeplabv3_efficientnet_lite0
BUNDLES := $(BUNDLE)/manifest.json $(STREETS)/manifest.json
INSTALLED := $(VENV)/.installed

.PHONY: help demo test check format stubs bundle bench clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "bitneck needs Python 3.11 or newer")'
	@echo "installing bitneck and what it needs into $(VENV): some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[edge,video,cloud,traces,models,dev]'
	touch $@

.SECONDEXPANSION:
build/%/manifest.json: $(INSTALLED) $$(wildcard $(ZOO)/%/*) $$(wildcard $(ZOO)/%/points/*/*) $(shell find models/bitneck_models shared/bitneck -name '*.py')
	@echo "exporting $* and proving that it equals its network: some minutes"
	$(BIN)/bitneck-models export $(ZOO)/$* --out build/$*
	touch $@

bundle: $(BUNDLES)  ## export the zoo's bundles to build/

demo: $(BUNDLES)  ## photographs from an edge process to a cloud process and back
	$(BIN)/python scripts/demo.py --bundle $(BUNDLE) --segmentation $(STREETS)

test: $(BUNDLES)  ## run the tests
	$(BIN)/python -m pytest -n auto

check: $(BUNDLES)  ## format, lint, types, stubs, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python scripts/generate_stubs.py --check
	$(BIN)/python -m pytest -n auto

format: $(INSTALLED)  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

stubs: $(INSTALLED)  ## generate shared/bitneck/v2 from proto/
	$(BIN)/python scripts/generate_stubs.py

bench: $(BUNDLE)/manifest.json  ## overhead, throughput, switches, reloads, memory, the edge client, automatic rate
	$(BIN)/python benchmarks/serving.py --bundle $(BUNDLE)
	$(BIN)/python benchmarks/operation.py --bundle $(BUNDLE)
	$(BIN)/python benchmarks/edge.py --bundle $(BUNDLE) --cuts
	$(BIN)/python benchmarks/ratecontrol.py

clean:  ## remove what the other targets made
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis
