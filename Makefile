# make demo                 shrink a small residual network on handwritten digits, from nothing
# make test [BACKEND=jax]   run the tests on TensorFlow, JAX or PyTorch
# make test-all             all of them: large networks, and every case of what `make test` runs some cases of
# make coverage             which lines of src/ no test of `make test` runs
# make check                format, lint, types
PYTHON     ?= python3
BACKEND    ?= tensorflow
TENSORFLOW ?= tensorflow
TORCH      ?= torch
BIN        := .venv/bin

PYTEST      = KERAS_BACKEND=$(BACKEND) $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: demo test test-all coverage check

demo: .venv/.demo
	KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=2 $(BIN)/keras-morph shrink DigitsResNet --data digits --image-size 16 --budget 50%

test: .venv/.test-$(BACKEND)
	$(PYTEST) $(ARGS)

test-all: .venv/.test-$(BACKEND)
	$(PYTEST) --all $(ARGS)

coverage: .venv/.test-$(BACKEND)
	$(PYTEST) --cov=keras_morph --cov-report=term-missing:skip-covered $(ARGS)

check: .venv/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/pip pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check $(TENSORFLOW) -e '.[demo]'
	@touch $@

# Some tests open on one backend what another one wrote, so TensorFlow and JAX are always there.
.venv/.test-tensorflow .venv/.test-jax: .venv/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check $(TENSORFLOW) jax
	@touch $@

.venv/.test-torch: .venv/.test-jax
	$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)'
	@touch $@

.venv/.coverage: .venv/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check pytest-cov
	@touch $@

.venv/.check: .venv/.dev
	@touch $@

.venv/.dev: .venv/bin/pip pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,onnx,litert,openvino,int8]'
	@touch $@
