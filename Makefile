PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
WORKERS ?= 2
EXTRAS := examples,test,dev,aqlm,onnx,trl,sentence-transformers
PYTEST := -m pytest -n $(WORKERS) --dist worksteal

# Nothing here needs the Hub; what would ask it for something is told so at once.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow lint format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=python3.12 make venv takes another interpreter; ARGS=... goes to the script or pytest,"
	@echo "which runs in WORKERS=2 processes."

venv: $(STAMP)  ## .venv with this package and everything it needs, at the tested versions

# Made anew when what is to be installed changes. torch comes first, at its pin, by itself: see
# constraints.txt for what any other version would bring along.
$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once; a few minutes, most of it torch) ..."
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)  ## train, compress, save and reload a small ViT on scikit-learn's digits: 1 to 2 minutes
	$(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP)  ## the tests, without the slow ones
	$(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

test-slow: $(STAMP)  ## the slow tests
	$(BIN)/python $(PYTEST) -m slow $(ARGS)

lint: $(STAMP)  ## ruff: mistakes and format, nothing is changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## ruff: mends what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## removes .venv and everything that was built or written
	rm -rf $(VENV) build dist *.egg-info demo_output .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
