# Everything runs in .venv, made on first use from integration/verl.lock; nothing else on the machine is touched.
#   make demo   real verl, three precisions, side by side
#   make test   all tests, real end-to-end runs included

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test unit lint bench clean

demo: $(READY)
	$(BIN)/python -m integration.demo.run

test: $(READY)
	$(BIN)/python -m pytest

unit: $(READY)
	$(BIN)/python -m pytest tests/unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m integration.bench.mismatch

# --no-deps: the lock is complete. It leaves out torchvision, torchaudio and torchcodec, which vLLM's CPU build names
# as needs but does not need for text, and whose builds for CUDA break a CPU torch.
$(READY): integration/verl.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "the lock file is for Python 3.11: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing real verl, vLLM, Ray and torch into $(VENV): a few minutes, once"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $$(grep -E '^(torch|typing-extensions|sympy|mpmath|networkx|jinja2|markupsafe|fsspec|filelock|setuptools|numpy)==' integration/verl.lock)
	@$(BIN)/python -c 'import torch' 2>/dev/null || { rm -rf $(VENV); echo "pip found a CUDA build of torch; let PIP_EXTRA_INDEX_URL name PyTorch's index of CPU builds and run make again"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r integration/verl.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) integration/demo/out integration/bench/out
