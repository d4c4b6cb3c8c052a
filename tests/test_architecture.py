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
MAY_IMPORT_A_FRAMEWORK = {
    "devices.py",
    "formats.py",
    "processes.py",
    "quantizing.py",
    "runtimes.py",
    "costs/measured.py",
}
INTERNALS = "keras_internals.py"


def tree_of(file):
    return ast.parse((SOURCE / file).read_text())


def imported_modules(file):
    """Full names of all that a file imports, inside functions too: `keras_morph.errors`, `keras_morph.errors.DataError`."""
    found = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if all(map(is_ours, names)) else {node.module} | names
    return found


def is_ours(name):
    """Whether a full name is that of a file of ours, and not of what one holds."""
    return f"{name.partition('.')[2].replace('.', '/')}.py" in FILES


def imported_files(file):
    """Files of ours that a file imports; from a package, its `__init__.py`, unless a module of it is meant."""
    names = {name for name in imported_modules(file) if name.startswith("keras_morph.")}
    paths = {name: name.replace(".", "/").partition("/")[2] for name in names}
    return {candidate for path in paths.values() for candidate in (f"{path}.py", f"{path}/__init__.py")} & set(FILES)


def foreign_names(file):
    """Names with an underscore in front that a file uses of others: of Keras, as no file of ours does so with another."""
    tree = tree_of(file)
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del))
    }
    own |= {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            names = [part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        yield from (name for name in names if re.match("_[a-z]", name) and name not in own)


def test_the_drawing_shows_every_file_once():
    assert sorted(ORDER) == FILES


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_files_above_it(file):
    assert imported_files(file) - {file} <= set(ORDER[: ORDER.index(file)])


def test_imports_are_seen():
    assert {"graph/closure.py", "graph/tracing.py"} <= imported_files("costs/costs.py")
    assert "zoo/__init__.py" in imported_files("cli/choices.py")
    assert "costs/__init__.py" not in imported_files("costs/costs.py")
    assert "cli/training.py" in imported_files("cli/app.py")


@pytest.mark.parametrize("file", FILES)
def test_no_framework_is_imported(file):
    found = {name.partition(".")[0] for name in imported_modules(file)} & FRAMEWORKS
    assert not found or file in MAY_IMPORT_A_FRAMEWORK


def test_frameworks_are_seen():
    assert "tensorflow" in imported_modules("devices.py")


@pytest.mark.parametrize("file", FILES)
def test_one_file_alone_touches_private_names_of_keras(file):
    private = {name for name in imported_modules(file) if name.startswith("keras.src")} | set(foreign_names(file))
    assert not private or file == INTERNALS


def test_private_names_are_seen():
    assert {"_functional", "_nodes_by_depth", "_operations", "_keras_mask"} <= set(foreign_names(INTERNALS))
    assert "keras.src.ops" in imported_modules(INTERNALS)
