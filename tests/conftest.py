"""One pytest process per backend: `KERAS_BACKEND=jax pytest`. Unmarked tests run on every backend."""

import atexit
import contextlib
import functools
import gc
import importlib.util
import os
import random
import shutil
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Tiny networks gain nothing from a second thread, and lose much where other processes want it.
for threads in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
    os.environ.setdefault(threads, "1")
if os.environ["KERAS_BACKEND"] == "jax":
    # Most of the time goes into compiling: leave out what LLVM would do for speed.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    # And compile once for all files, workers and child processes of a session.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        compiled = tempfile.mkdtemp(prefix="compiled-")
        atexit.register(shutil.rmtree, compiled, ignore_errors=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # In the background of a script Ctrl-C is ignored, by child processes too; tests send it to these.
    signal.signal(signal.SIGINT, signal.default_int_handler)

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
    "slow: a large network or a long run: left to `make test-all`",
    "one_of(n): of the test's cases every n-th, so that each value of each parameter has its turn; all in `make test-all`",
)

settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=60,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.register_profile("quick", settings.get_profile("ci"), max_examples=20)
settings.register_profile("long", settings.get_profile("ci"), derandomize=False, max_examples=2000)

LEFT = pytest.StashKey[int]()  # how many tests are left to `make test-all`


def pytest_addoption(parser):
    parser.addoption("--overwrite", action="store_true", help="write tests/golden anew instead of comparing with it")
    parser.addoption("--all", action="store_true", help="slow tests, all cases of each test and more random ones too")


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    # Before the test files are read, whose decorators take it as it is then.
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if config.getoption("all") else "quick"))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left"] = session.config.stash.get(LEFT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT] = getattr(node, "workeroutput", {}).get("left", 0)


def pytest_terminal_summary(terminalreporter, config):
    for package in OPTIONAL:
        if importlib.util.find_spec(package) is None:
            terminalreporter.write_line(f"deselected: tests that need {package}, which is not installed")
    if left := config.stash.get(LEFT, 0):
        terminalreporter.write_line(
            f"deselected: {left} tests that `make test-all` runs, or --all, or a test's own name"
        )


def missing(item):
    """Optional packages that a test needs and that are not installed."""
    return [m.args[0] for m in item.iter_markers("needs") if importlib.util.find_spec(m.args[0]) is None]


def turn(item, seen):
    """Number of a test's case: the next value of any parameter is one more. `seen` holds the values of earlier cases."""
    params = item.callspec.params
    marks = [mark.args[0] for mark in item.iter_markers("parametrize")]
    together = [tuple(name.strip() for name in (m.split(",") if isinstance(m, str) else m)) for m in marks]
    total = 0
    of_fixtures = params.keys() - {name for names in together for name in names}
    for names in [*together, *((name,) for name in sorted(of_fixtures))]:
        values = seen.setdefault((item.path, item.originalname, names), [])
        value = [id(params[name]) for name in names]
        if value not in values:
            values.append(value)
        total += values.index(value)
    return total


def left_to_all(item, seen):
    """Whether a test is slow, or none of the cases that `make test` runs."""
    turns = [turn(item, seen) % mark.args[0] for mark in item.iter_markers("one_of")]
    return bool(item.get_closest_marker("slow")) or any(turns)


def pytest_collection_modifyitems(config, items):
    """Deselects, and never skips, what is not for this backend, and what `make test-all` alone runs."""
    backend = keras.backend.backend()
    elsewhere = {
        item
        for item in items
        if (item.get_closest_marker("once") and backend != DEFAULT_BACKEND)
        or any(backend not in marker.args for marker in item.iter_markers("only_on"))
        or missing(item)
    }
    everything = config.getoption("all") or any("::" in argument for argument in config.args)
    seen = {}
    late = [item for item in items if left_to_all(item, seen)]
    left = set() if everything else set(late) - elsewhere
    config.stash[LEFT] = len(left)
    away = elsewhere | left
    config.hook.pytest_deselected(items=list(away))
    items[:] = [item for item in items if item not in away]


@pytest.fixture(autouse=True)
def _seeded():
    """TensorFlow's own seed is set where a test drew from it: setting it throws away all kernels, a third of a test's time."""
    with pytest.MonkeyPatch.context() as patch:
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf
            from tensorflow.python.eager import context

            drawn = getattr(context.context(), "_rng", None)
            if context.global_seed() == 0 and drawn and drawn.getstate() == random.Random(0).getstate():
                patch.setattr(tf.random, "set_seed", lambda seed: None)
        keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def _table():
    """Forgets the rows that a test registers: tests of all files share a process."""
    from keras_morph.layers.rules import TABLE

    before = dict(TABLE)
    yield
    TABLE.clear()
    TABLE.update(before)


@pytest.fixture(autouse=True, scope="module")
def _memory():
    """Gives back what one file's networks leave behind: JAX keeps every compiled function, gigabytes of them."""
    yield
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.random.set_seed(0)  # throws away its kernels
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


@contextlib.contextmanager
def without_graphs(config):
    """Trainings of a few steps: TensorFlow traces a graph for seconds each time, as in `make test-all`."""
    if keras.backend.backend() != "tensorflow" or config.getoption("all"):
        yield
        return
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)


@pytest.fixture
def uncompiled(request):
    with without_graphs(request.config):
        yield


@pytest.fixture(scope="module")
def once_uncompiled(request):
    """The context manager, for what a module trains once."""
    return functools.partial(without_graphs, request.config)


@pytest.fixture(scope="module")
def quick_initializers():
    """For tests that give every weight a value of their own: JAX compiles the initializer for each new shape, 0.07 s."""

    def drawn(initializer, shape, dtype=None):
        return keras.ops.convert_to_tensor(np.random.default_rng(0).normal(0, 0.1, shape), dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.initializers.VarianceScaling, "__call__", drawn)
        yield
