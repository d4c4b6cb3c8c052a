"""One pytest process per backend: `KERAS_BACKEND=jax pytest`. Unmarked tests run on every backend."""

import gc
import importlib.util
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Tiny networks gain nothing from a second thread, and lose much where other processes want it.
for threads in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
    os.environ.setdefault(threads, "1")
if os.environ["KERAS_BACKEND"] == "jax":
    # Most of the time goes into compiling: leave out what LLVM would do for speed.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

DEFAULT_BACKEND = "tensorflow"
OPTIONAL = ("keras_hub",)
MARKERS = (
    "once: holds no tensors, or covers what does not depend on them: runs on the default backend only",
    "only_on(*backends): what only these backends can run",
    "needs(module): what runs where an optional package is installed",
)

settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=60,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.register_profile("long", settings.get_profile("ci"), derandomize=False, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser):
    parser.addoption("--overwrite", action="store_true", help="write tests/golden anew instead of comparing with it")


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_terminal_summary(terminalreporter):
    for package in OPTIONAL:
        if importlib.util.find_spec(package) is None:
            terminalreporter.write_line(f"deselected: tests that need {package}, which is not installed")


def missing(item):
    """Optional packages that a test needs and that are not installed."""
    return [m.args[0] for m in item.iter_markers("needs") if importlib.util.find_spec(m.args[0]) is None]


def pytest_collection_modifyitems(config, items):
    """Deselects, and never skips, what is not for this backend."""
    backend = keras.backend.backend()
    elsewhere = [
        item
        for item in items
        if (item.get_closest_marker("once") and backend != DEFAULT_BACKEND)
        or any(backend not in marker.args for marker in item.iter_markers("only_on"))
        or missing(item)
    ]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [item for item in items if item not in elsewhere]


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _memory():
    """Gives back what one file's networks leave behind: JAX keeps every compiled function, gigabytes of them."""
    yield
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()
    gc.collect()


@pytest.fixture
def golden(request):
    """Compares a text with `tests/golden/NAME`."""

    def compare(name, text):
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--overwrite"):
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8")

    return compare


@pytest.fixture(scope="module")
def quick_initializers():
    """For tests that give every weight a value of their own: JAX compiles the initializer for each new shape, 0.07 s."""

    def drawn(initializer, shape, dtype=None):
        return keras.ops.convert_to_tensor(np.random.default_rng(0).normal(0, 0.1, shape), dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.initializers.VarianceScaling, "__call__", drawn)
        yield
