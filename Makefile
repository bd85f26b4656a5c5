# Every target works in .venv, which is made and filled on first use; a second call finds the stamp and does nothing.
PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := .venv/bin
STAMP := .venv/.ppf-installed
NATIVE := $(wildcard csrc/* cmake/*)

# Threads that spin while they wait halve the speed of a machine that has other work.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-export lint docs wheel clean
demo: $(STAMP)
	$(BIN)/ppf demo

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# Exports in the programs they are for. Compiles llama.cpp without its tools: some minutes on two cores, once.
LLAMA_OPTIONS := -DGGML_CCACHE=OFF -DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF \
	$(foreach part,EXAMPLES TOOLS TESTS SERVER,-DLLAMA_BUILD_$(part)=OFF)
test-export: $(STAMP)
	CMAKE_ARGS="$(LLAMA_OPTIONS)" $(BIN)/python -m pip install --quiet --editable '.[export-test]'
	$(BIN)/python -m pytest tests/test_export_llamacpp.py tests/test_export_lm_eval.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(STAMP)
	$(BIN)/python docs/api.py
	$(BIN)/python benchmarks/report.py

wheel: $(STAMP)
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf build dist .pytest_cache .ruff_cache $(STAMP)
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(STAMP): pyproject.toml CMakeLists.txt $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
