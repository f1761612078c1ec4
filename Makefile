# Two commands for a fresh machine with Python 3.11 or newer:
#   make parity   train a small model in both frameworks and check that they agree
#   make test     lint, types and tests (make check: the quick part)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: parity test check lint format docs slow gpu gpu2 tpu clean

parity: $(VENV)/.installed
	$(BIN)/parity demo

test: $(VENV)/.installed lint
	@echo "== tests"
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=25

# the lesson and what neither framework is, for every save
check: $(VENV)/.installed lint
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/lesson tests/common/test_layout.py tests/common/test_config.py \
		tests/common/test_data.py tests/common/test_schedule.py tests/common/test_tensors.py

lint: $(VENV)/.installed
	@echo "== lint and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# the tests that take minutes, and those that need the TPU compiler (pip install '.[tpu]')
slow: $(VENV)/.installed
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 $(BIN)/python -m pytest -m "slow or tpu"

# on a machine with an NVIDIA GPU: the ladder there, as dated tables, and the tests that need one
gpu: $(VENV)/.installed
	$(BIN)/parity run --device gpu --out docs/gpu_reference
	$(BIN)/parity run --device gpu --attention auto --preset demo --batch 2 --length 64 --steps 200 \
		--dtype float32 --dtype bfloat16 --out docs/gpu_fused
	$(BIN)/python -m pytest -m gpu

# on a machine with two of them: every mesh against the specification, and how much faster two are than one
gpu2: $(VENV)/.installed
	$(BIN)/parity sharded --device gpu --out docs/gpu_sharded
	$(BIN)/python scripts/scaling.py --device gpu --preset 1b --batch-size 16 --seq-len 2048 --mesh data=2 --mesh fsdp=2 \
		--out docs/scaling.md

# the TPU's compiler, on any machine (pip install '.[tpu]')
tpu: $(VENV)/.installed
	$(BIN)/python scripts/tpu_compile.py --table docs/tpu_compiled.md

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(BIN)/python scripts/side_by_side.py

# made again when the dependencies change
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (once; about two minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs data
