# Everything runs in .venv, for OpenRLHF in .venv-openrlhf, for SGLang in .venv-sglang and for Megatron in .venv-megatron, made on first
# use from integration/*.lock; nothing else on the machine is touched.
#   make demo            real verl, three precisions, side by side
#   make demo-openrlhf   the same with real OpenRLHF
#   make demo-sglang     the same with real verl and SGLang
#   make demo-megatron   the same with real verl and Megatron
#   make demo-async      the same with verl's separate_async trainer: numerics told from the age of samples
#   make bench           the evidence in integration/README.md; make bench-full trains for it, too
#   make test            all tests, real end-to-end runs included
#   make grid-megatron   verl's Megatron learner in every layout, on both bridges
#   make matrix          every release that is supported, at every level it is tested at

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
OPENRLHF_BIN := .venv-openrlhf/bin
SGLANG_BIN := .venv-sglang/bin
MEGATRON_BIN := .venv-megatron/bin
NOX := $(BIN)/nox -f integration/matrix/noxfile.py
READY := .venv/.ready
OPENRLHF_READY := .venv-openrlhf/.ready
SGLANG_READY := .venv-sglang/.ready
MEGATRON_READY := .venv-megatron/.ready
OLD_READY := .venv-verl-old/.ready
OPENRLHF_TESTS := tests/contract tests/openrlhf tests/probe/test_taken_by_a_run.py tests/e2e/test_openrlhf_runs.py
SGLANG_TESTS := tests/sglang tests/samplers tests/verl/config/test_samplers.py tests/e2e/test_verl_sglang_runs.py
MEGATRON_TESTS := tests/verl/megatron tests/e2e/test_verl_megatron_runs.py

unexport PYTHONDONTWRITEBYTECODE
# --no-deps: the locks are complete. They leave out torchvision, torchaudio and torchcodec, which vLLM's CPU build names
# as needs but does not need for text, and whose builds for CUDA break a CPU torch; OpenRLHF's flash-attn and
# bitsandbytes, and Megatron's TransformerEngine and its like, which are for CUDA only.
# pip installs torch, since it finds torch's CPU build wherever this machine keeps it, and uv, which installs the rest.
# --build-constraints: what comes as source, as DeepSpeed does, is built by itself with the lock's build tools; beside
# torch it does not build with the setuptools that vLLM asks for.
PIP := -m pip install --quiet --disable-pip-version-check --no-compile --no-deps
TORCH := ^(torch|typing-extensions|sympy|mpmath|networkx|jinja2|markupsafe|fsspec|filelock|setuptools|numpy|wheel|uv)==
# Compiled to bytecode at once, on every core: of these, several processes would otherwise compile the same at a time.
COMPILED := torch transformers vllm sglang ray verl openrlhf deepspeed megatron mbridge

# Two processes, as runs of frameworks are several themselves; tests/conftest.py says which tests stay together and
# which come first.
PYTEST := -m pytest -n 2

.PHONY: demo demo-openrlhf demo-sglang demo-megatron demo-async test test-verl test-openrlhf test-sglang test-megatron fingerprints test-learners test-releases matrix grid-megatron session unit lint dist bench bench-full bench-mismatch bench-monitor bench-step bench-faults bench-reading bench-lag clean

demo: $(READY)
	$(BIN)/python -m integration.demo.run

demo-openrlhf: $(OPENRLHF_READY)
	$(OPENRLHF_BIN)/python -m integration.demo.run_openrlhf

demo-sglang: $(SGLANG_READY)
	$(SGLANG_BIN)/python -m integration.demo.run --sampler sglang --out integration/demo/out-sglang

demo-megatron: $(MEGATRON_READY)
	$(MEGATRON_BIN)/python -m integration.demo.run --learner megatron --out integration/demo/out-megatron

demo-async: $(READY)
	$(BIN)/python -m integration.demo.run --trainer separate_async --out integration/demo/out-async

test: test-verl test-openrlhf test-sglang test-megatron fingerprints

test-verl: $(READY)
	$(BIN)/python $(PYTEST)

test-openrlhf: $(OPENRLHF_READY)
	$(OPENRLHF_BIN)/python $(PYTEST) $(OPENRLHF_TESTS)

test-sglang: $(SGLANG_READY)
	$(SGLANG_BIN)/python $(PYTEST) $(SGLANG_TESTS)

test-megatron: $(MEGATRON_READY)
	$(MEGATRON_BIN)/python $(PYTEST) $(MEGATRON_TESTS)

fingerprints: $(READY)
	$(NOX) --session fingerprints

# Of verl's releases besides the newest, the learners under the plan, on two ranks.
test-learners: $(READY) $(OLD_READY)
	$(NOX) --tags verl-others -- -k "(two-ranks or every_release or as_they_are) and not stock"

# All that is tested of the learners of each framework's oldest release, on two ranks.
test-releases: $(READY) $(OPENRLHF_READY) $(SGLANG_READY) $(MEGATRON_READY) $(OLD_READY)
	$(NOX) --tags oldest -- -k "not one-rank"

matrix: $(READY) $(OPENRLHF_READY) $(SGLANG_READY) $(MEGATRON_READY) $(OLD_READY)
	$(NOX)

# Every layout of verl's Megatron learner on both bridges, cell by cell; goes on where it was stopped.
grid-megatron: $(READY) $(MEGATRON_READY)
	$(MEGATRON_BIN)/python -m integration.matrix.megatron
	$(BIN)/python -m integration.matrix.write

session: $(READY) $(OPENRLHF_READY) $(SGLANG_READY) $(MEGATRON_READY) $(OLD_READY)
	$(NOX) --session '$(NAME)'

unit: $(READY)
	$(BIN)/python $(PYTEST) -m "not verl and not openrlhf and not vllm and not e2e"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The wheel and the source distribution.
dist: $(READY)
	rm -rf dist
	$(BIN)/python -m hatchling build -d dist

# What evidence.json holds then goes onto a page of plots and into the tables of integration/README.md.
bench: $(READY)
	$(BIN)/python -m integration.bench.evidence
	$(BIN)/python -m integration.bench.page
	$(BIN)/python -m integration.bench.write

# With the sections that are many runs of real verl: hours on two cores.
bench-full: $(READY)
	$(BIN)/python -m integration.bench.evidence --full
	$(BIN)/python -m integration.bench.page
	$(BIN)/python -m integration.bench.write

bench-mismatch: $(READY)
	$(BIN)/python -m integration.bench.mismatch

bench-monitor: $(READY)
	$(BIN)/python -m integration.bench.monitor

# What goes wrong on ranks, in state files and in the monitor, planted.
bench-faults: $(READY)
	$(BIN)/python -m integration.bench.faults

bench-reading: $(READY)
	$(BIN)/python -m integration.bench.reading

bench-lag: $(READY)
	$(BIN)/python -m integration.bench.lag

bench-step: $(READY)
	$(BIN)/python -m integration.bench.step
	$(BIN)/python -m integration.bench.write

$(READY): integration/verl.lock pyproject.toml
	@echo "installing real verl, vLLM, Ray and torch into .venv: a few minutes, once"
	$(call environment,.venv,integration/verl.lock)
	touch $@

$(SGLANG_READY): integration/sglang.lock pyproject.toml
	@echo "installing real verl, SGLang, Ray and torch into .venv-sglang: a few minutes, once"
	$(call environment,.venv-sglang,integration/sglang.lock)
	touch $@

$(MEGATRON_READY): integration/megatron.lock pyproject.toml
	@echo "installing real verl, Megatron, vLLM, Ray and torch into .venv-megatron: a few minutes, once"
	$(call environment,.venv-megatron,integration/megatron.lock)
	touch $@

# DeepSpeed's CPU kernels are compiled here, which needs a C++ compiler, and not by the processes of the first run.
$(OPENRLHF_READY): integration/openrlhf.lock pyproject.toml
	@echo "installing real OpenRLHF, DeepSpeed, vLLM, Ray and torch into .venv-openrlhf: a few minutes, once"
	$(call environment,.venv-openrlhf,integration/openrlhf.lock)
	$(OPENRLHF_BIN)/python -m integration.cpu.compile_kernels
	touch $@

$(OLD_READY): integration/verl-old.lock pyproject.toml
	@echo "installing real verl as it was in 2025, Ray and torch into .venv-verl-old: a few minutes, once"
	$(call environment,.venv-verl-old,integration/verl-old.lock)
	touch $@

define environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "the lock file is for Python 3.11: make PYTHON=/path/to/python3.11")'
$(PYTHON) -m venv $(1)
$(1)/bin/python $(PIP) $$(grep -E '$(TORCH)' $(2))
@$(1)/bin/python -c 'import torch' || { rm -rf $(1); echo "torch does not load; if pip found its CUDA build, let PIP_EXTRA_INDEX_URL name PyTorch's index of CPU builds and run make again"; exit 1; }
$(1)/bin/uv pip install --quiet --python $(1)/bin/python --no-deps --build-constraints $(2) -r $(2) -e .
@$(1)/bin/python -m compileall -q -j 0 $(addprefix $(1)/lib/python3.11/site-packages/,$(COMPILED)) >/dev/null 2>&1 || true
endef

clean:
	rm -rf dist .venv .venv-openrlhf .venv-sglang .venv-megatron .venv-verl-old integration/demo/out integration/demo/out-*/ integration/bench/out/*/
