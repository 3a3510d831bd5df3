PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
WORKERS ?= 2
EXTRAS := examples,test,dev,aqlm,onnx,trl,sentence-transformers
# The oldest supported versions, with what the tests cannot do without: those of optional packages
# skip there.
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed
OLDEST_EXTRAS := examples,test
PYTEST := -m pytest -n $(WORKERS) --dist worksteal

# Nothing here needs the Hub; what would ask it for something is told so at once.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-oldest lint format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=python3.12 make venv takes another interpreter; ARGS=... goes to the script or pytest,"
	@echo "which runs in WORKERS=2 processes."

venv: $(STAMP)  ## .venv with this package and everything it needs, at the tested versions

# $(call install,environment,constraints,extras). torch comes first, at its pin, by itself: see
# constraints.txt for what any other version would bring along.
define install
@echo "Setting up $(1) (once; a few minutes, most of it torch) ..."
$(PYTHON) -m venv --clear $(1)
$(1)/bin/python -m pip install --quiet --constraint $(2) torch
$(1)/bin/python -m pip install --quiet --constraint $(2) --editable '.[$(3)]'
@touch $@
endef

# Made anew when what is to be installed changes.
$(STAMP): pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,$(EXTRAS))

$(OLDEST_STAMP): pyproject.toml constraints-oldest.txt
	$(call install,$(OLDEST),constraints-oldest.txt,$(OLDEST_EXTRAS))

demo: $(STAMP)  ## train, compress, save and reload a small ViT on scikit-learn's digits: 1 to 2 minutes
	$(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP)  ## the tests, without the slow ones
	$(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

test-slow: $(STAMP)  ## the slow tests
	$(BIN)/python $(PYTEST) -m slow $(ARGS)

test-oldest: $(OLDEST_STAMP)  ## the tests, without the slow ones, at the oldest supported versions
	$(OLDEST)/bin/python $(PYTEST) -m "not slow" $(ARGS)

lint: $(STAMP)  ## ruff: mistakes and format, nothing is changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## ruff: mends what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## removes both environments and everything that was built or written
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info demo_output .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
