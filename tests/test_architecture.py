"""Dependencies point one way, frameworks stay out, and one file alone reads Keras's private graph."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "keras_morph"
DRAWING = (ROOT / "docs" / "decisions.md").read_text().split("```")[1]
ORDER = re.findall(r"^(\S+\.py)", DRAWING, re.MULTILINE)
FILES = sorted(str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py"))
FRAMEWORKS = {"tensorflow", "tf_keras", "jax", "flax", "torch"}
# A backend's own piece of a run on several devices.
MAY_IMPORT_A_FRAMEWORK = {"devices.py", "exporting.py", "measuring.py"}
# What holds Keras's graph together, as of Keras 3.15.
PRIVATE_GRAPH = {
    "_functional",
    "_inbound_nodes",
    "_inputs_struct",
    "_keras_history",
    "_nodes",
    "_nodes_by_depth",
    "_operations",
    "_operations_by_depth",
    "_outbound_nodes",
    "_outputs_struct",
}


def tree_of(file):
    return ast.parse((SOURCE / file).read_text())


def imported_modules(file):
    """Full names of all that a file imports, inside functions too: `keras_morph.costs`, `keras_morph.costs.FLOPs`, ..."""
    found = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_files(file):
    """Files of ours that a file imports; from a package, its `__init__.py`, unless a module of it is meant."""
    names = {name for name in imported_modules(file) if name.startswith("keras_morph.")}
    paths = {name: name.replace(".", "/").partition("/")[2] for name in names}
    return {candidate for path in paths.values() for candidate in (f"{path}.py", f"{path}/__init__.py")} & set(FILES)


def attributes(file):
    """Names after a dot, and those asked for by getattr, hasattr and setattr."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            yield from (part.value for part in node.args if isinstance(part, ast.Constant))


def test_the_drawing_shows_every_file_once():
    assert sorted(ORDER) == FILES


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_files_above_it(file):
    assert imported_files(file) - {file} <= set(ORDER[: ORDER.index(file)])


def test_imports_are_seen():
    assert {"closure.py", "tracing.py"} <= imported_files("costs.py")
    assert "zoo/__init__.py" in imported_files("cli/choices.py")
    assert "zoo/morphnet_model.py" in imported_files("cli/train.py")


@pytest.mark.parametrize("file", FILES)
def test_no_framework_is_imported(file):
    found = {name.partition(".")[0] for name in imported_modules(file)} & FRAMEWORKS
    assert not found or file in MAY_IMPORT_A_FRAMEWORK


def test_frameworks_are_seen():
    assert "tensorflow" in imported_modules("devices.py")


@pytest.mark.parametrize("file", FILES)
def test_only_one_file_reads_the_private_attributes_of_keras_graph(file):
    found = PRIVATE_GRAPH & set(attributes(file))
    assert not found or file == "keras_graph.py"


def test_private_attributes_are_seen():
    assert {"_functional", "_nodes_by_depth", "_operations"} <= set(attributes("keras_graph.py"))
