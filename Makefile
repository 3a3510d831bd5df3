PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
WORKERS ?= 2
FUZZ_EXAMPLES ?= 1000
EXTRAS := examples,test,dev,docs,aqlm,cpu,onnx,completion,pandas,trl,sentence-transformers,notebooks
# The oldest supported versions, with the extras that the tests require. Tests of other optional
# packages are skipped there.
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed
OLDEST_EXTRAS := examples,test
# These tests give the same result with any supported version: they use torch (the same in both
# sets), numpy and this package only, need an optional package, or repeat a path through Trainer and
# from_pretrained that the remaining tests take as well (scripts, commands, benchmarks). Everything
# else, and every new file, runs with both sets.
VERSION_INDEPENDENT := \
	tests/quantizers tests/export tests/examples tests/cli tests/publishing \
	tests/noise/test_activation_noise.py tests/noise/test_block_mask.py \
	tests/noise/test_cluster_selection.py tests/noise/test_distributed.py \
	tests/noise/test_functions.py tests/noise/test_operator.py tests/noise/test_properties.py \
	tests/modeling/test_measurements_on_ranks.py tests/modeling/test_non_trainable.py \
	tests/modeling/test_packed.py tests/compression/bit_allocation \
	tests/compression/test_fingerprint.py tests/compression/test_layer_quantizers.py \
	tests/compression/test_stage_order.py tests/compression/test_stage_settings.py \
	tests/test_compile.py tests/test_docs.py tests/test_layout.py tests/test_paper_map.py \
	tests/fuzz tests/noise/test_in_place.py tests/modeling/test_ranges.py \
	tests/modeling/test_tracing.py tests/files \
	tests/test_patterns.py tests/test_text.py
PYTEST := -m pytest -n $(WORKERS) --dist worksteal
# The Space's gradio, in the version of its header, requires pillow < 13.
SPACE := .venv-space
SPACE_STAMP := $(SPACE)/.installed
GRADIO := $(shell sed -n 's/^sdk_version: //p' examples/space/README.md)
# A clean environment for the built wheel.
WHEEL := build/wheel-venv

# Nothing here needs the Hub; a request to it fails at once.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# MkDocs Material prints a notice about its successor on every build.
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo web bench test test-slow test-oldest test-space fuzz coverage lint format docs wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "PYTHON=python3.12 make venv uses another interpreter. ARGS=... is passed to the script or"
	@echo "to pytest, which runs in WORKERS=2 processes."

venv: $(STAMP)  ## create .venv with this package and its dependencies at the tested versions

# $(call install,environment,constraints,extras). torch is installed first, by itself, at its pin:
# constraints.txt gives the reason.
define install
@echo "Setting up $(1) (once; a few minutes, most of it torch) ..."
$(PYTHON) -m venv --clear $(1)
$(1)/bin/python -m pip install --quiet --constraint $(2) torch
$(1)/bin/python -m pip install --quiet --constraint $(2) --editable '.[$(3)]'
@touch $@
endef

# Re-created when the dependencies change.
$(STAMP): pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,$(EXTRAS))

$(OLDEST_STAMP): pyproject.toml constraints-oldest.txt
	$(call install,$(OLDEST),constraints-oldest.txt,$(OLDEST_EXTRAS))

$(SPACE_STAMP): pyproject.toml constraints.txt examples/space/README.md
	mkdir -p build
	(grep -v '^pillow==' constraints.txt; echo gradio==$(GRADIO)) > build/constraints-space.txt
	$(call install,$(SPACE),build/constraints-space.txt,space)

demo: $(STAMP)  ## compress a small ViT on digits with and without noise; a table and a picture (2 minutes)
	$(BIN)/python examples/demo.py $(ARGS)

# Written by npm when it has installed the packages of the page.
NPM_STAMP := examples/browser/node_modules/.package-lock.json

$(NPM_STAMP): examples/browser/package-lock.json
	@command -v npm > /dev/null || { echo "make web needs npm: install Node.js, https://nodejs.org" >&2; exit 1; }
	npm ci --ignore-scripts --no-audit --no-fund --prefix examples/browser
	@touch $@

web: export HF_HUB_OFFLINE := 0
web: $(NPM_STAMP) $(STAMP)  ## build a page that runs compressed models in the browser, and serve it
	$(BIN)/python examples/browser/build.py --serve 8000 $(ARGS)

# Peers of a script (faiss) are measured if they are installed.
BENCHMARKS := noise_overhead kmeans one_shot compression_overhead startup speed
# The page of the table of a script that does not write one by default.
bench_speed := --page docs/how_to/speed.md

bench: $(STAMP)  ## measure what benchmarks/results lacks of the performance, and write its pages (1 hour)
	@set -e; $(foreach name,$(BENCHMARKS),echo "benchmarks/$(name).py"; \
		$(BIN)/python benchmarks/$(name).py $(bench_$(name));)
	$(BIN)/python benchmarks/performance.py

test: $(STAMP)  ## run the tests except the slow ones
	$(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

test-slow: $(STAMP)  ## run the slow tests
	$(BIN)/python $(PYTEST) -m slow $(ARGS)

test-oldest: $(OLDEST_STAMP)  ## run the tests that depend on versions at the oldest supported ones
	$(OLDEST)/bin/python $(PYTEST) -m "not slow" $(addprefix --ignore=,$(VERSION_INDEPENDENT)) $(ARGS)

test-space: $(STAMP) $(SPACE_STAMP)  ## start the Space of examples/space and click its button
	$(BIN)/python -m pytest tests/examples/test_space.py $(ARGS)

fuzz: $(STAMP)  ## load mutants of saved models, FUZZ_EXAMPLES=1000 for each kind of file and storage
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python $(PYTEST) tests/fuzz $(ARGS)

coverage: $(STAMP)  ## run the tests except the slow ones and print the coverage of each file
	$(BIN)/python $(PYTEST) -m "not slow" --cov --cov-report=term-missing:skip-covered $(ARGS)

lint: $(STAMP)  ## check code, format, types and the wording of texts, without changing files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/check_language.py
	$(BIN)/mypy

format: $(STAMP)  ## fix and format with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## build the documentation site in site/; warnings are errors
	$(BIN)/mkdocs build --strict --quiet

wheel: $(STAMP)  ## build the wheel in dist/; try it, the command line and the demo in a clean environment
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt dist/*.whl
	cd $(WHEEL) && bin/python -c "import hf_quantnoise; print(hf_quantnoise.__version__, hf_quantnoise.__file__)"
	cd $(WHEEL) && bin/python -c "import hf_quantnoise as q; [getattr(q, name) for name in q.__all__]"
	cd $(WHEEL) && bin/hf-quantnoise --help && bin/hf-quantnoise compress --help
	$(WHEEL)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt \
		"$$(echo dist/*.whl)[examples]"
	cd $(WHEEL) && bin/python ../../examples/demo.py --epochs 1 --compression_epochs 0.5
	rm -rf build

clean:  ## remove the environments and everything that was built or written
	rm -rf $(VENV) $(OLDEST) $(SPACE) build dist site *.egg-info demo_output .coverage* \
		examples/browser/node_modules examples/browser/site \
		.pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
