# make demo                 shrink a small residual network on handwritten digits, from nothing
# make test [BACKEND=jax]   run the tests on TensorFlow, JAX or PyTorch
# make coverage             the same, and which lines of src no test reaches
# make check                format, lint, types
PYTHON     ?= python3
BACKEND    ?= tensorflow
TENSORFLOW ?= tensorflow
TORCH      ?= torch
BIN        := .venv/bin

.PHONY: demo test coverage check

demo: .venv/.demo
	KERAS_BACKEND=tensorflow $(BIN)/keras-morph shrink DigitsResNet --data digits --image-size 16 --budget 50%

test: .venv/.test-$(BACKEND)
	KERAS_BACKEND=$(BACKEND) $(BIN)/python -m pytest -n auto $(ARGS)

coverage: .venv/.test-$(BACKEND)
	KERAS_BACKEND=$(BACKEND) $(BIN)/python -m pytest -n auto --cov=keras_morph $(ARGS)

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

.venv/.check: .venv/.dev
	@touch $@

.venv/.dev: .venv/bin/pip pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
