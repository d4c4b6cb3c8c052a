"""Files and options from outside that are wrong in random ways, and what has to become of each: our error, or a right result.

A case is made from a seed and a number, so that what fails can be made again. tests/test_hostile_files.py tries some of each
kind, benchmarks/hostile.py as many as one likes.
"""

import contextlib
import copy
import inspect
import io
import json
import os
import random
import resource
import signal
import sys
import typing
import zipfile
from pathlib import Path
from unittest import mock

import models
import numpy as np
import typer
from PIL import Image

import keras_morph as km
from keras_morph.cli import choices, inspecting, main
from keras_morph.cli.app import app
from keras_morph.graph.closure import close

SECONDS = 20  # that a case may take
REFUSED, RIGHT = "refused", "right"


class Hangs(BaseException):
    """A case took too long. No Exception, so that nobody takes it for a damaged file."""


@contextlib.contextmanager
def watched(seconds=SECONDS):
    """Inside, what takes longer is interrupted."""

    def stop(*_):
        raise Hangs(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(judge, *arguments):
    """What becomes of a case: REFUSED or RIGHT; whatever else is raised is a fault of ours."""
    said = None
    with watched():
        try:
            judge(*arguments)
        except km.KerasMorphError as error:
            said = str(error).strip()
    if said is None:
        return RIGHT
    assert said, "an empty message"
    assert "\n" not in said, f"more than a line: {said}"
    return REFUSED


# JSON ------------------------------------------------------------------------------------------------------------

ODD_VALUES = [
    *(None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 1e308, float("nan"), float("inf"), 10**9, 10**30, -(10**20)),
    *("", "x", "conv1", "../../etc/passwd", "[", "(a+)+$", "\ud800", "\x00", "x" * 10_000, [], {}, [[]], [0], [0, 0]),
    *([-1], [True], [1.0], ["0"], [10**18], {"width": 3}, {"": None}, [None] * 50, list(range(99))),
]


def nodes_of(data):
    """All places in a JSON value, as (container, key)."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in list(items):
        yield data, key
        yield from nodes_of(value)


def mutated_json(text, rng):
    """A JSON text with one to three faults: in its values, or in its characters."""
    if rng.random() < 0.15:
        return mutated_bytes(text.encode(), rng)
    data = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(nodes_of(data))
        if not places:
            break
        container, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(("", "x", "conv9", "logits", str(key) + "_1"))] = container.pop(key)
        elif kind == 2 and isinstance(container, list):
            container.insert(rng.randrange(len(container) + 1), copy.deepcopy(rng.choice(ODD_VALUES)))
        elif kind == 3 and isinstance(container[key], list):
            rng.shuffle(container[key])
        elif kind == 4 and isinstance(container[key], list) and container[key]:
            del container[key][rng.randrange(len(container[key])) :]
        elif kind == 5 and type(container[key]) is int:
            container[key] += rng.choice((-1, 1, 2, 1000))
        elif kind == 6:
            other, place = rng.choice(places)
            with contextlib.suppress(KeyError, IndexError):
                container[key], other[place] = copy.deepcopy((other[place], container[key]))
        else:
            container[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return json.dumps(data).encode()


def mutated_bytes(content, rng):
    """Bytes that were cut, changed, inserted or repeated."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        at = rng.randrange(len(content)) if content else 0
        kind = rng.randrange(5)
        if kind == 0:
            content[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del content[at : at + rng.choice((1, 4, 64, 4096))]
        elif kind == 2:
            content[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
        elif kind == 3:
            content[at : at + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\1\0\0"))
        else:
            content[at:at] = content[at : at + rng.choice((4, 64, 512))]
    if rng.random() < 0.2:
        del content[rng.randrange(len(content) + 1) :]
    return bytes(content)


# Structures ------------------------------------------------------------------------------------------------------

NETWORKS = ("plain", "residual_identity", "u_net", "grouped", "operations")


class Structures:
    """Structure files and counts of some networks, and what they may come to."""

    def __init__(self, folder):
        self.folder, self.seeds = Path(folder), {}
        for name in NETWORKS:
            seed = models.build(name)
            graph = km.trace(seed)
            structure = km.fit_budget(
                seed, "60%", scores=np.random.default_rng(0).random(graph.num_groups), cost=km.ModelSize()
            )
            structure.save(self.folder / "sound.json")
            self.seeds[name] = seed, graph, (self.folder / "sound.json").read_text(), json.dumps(structure.counts())

    def case(self, rng):
        """A file, and the network that it is used with."""
        name = rng.choice(NETWORKS)
        seed, graph, structure, counts = self.seeds[name]
        path = self.folder / "mutated.json"
        path.write_bytes(mutated_json(rng.choice((structure, structure, counts)), rng))
        return seed, graph, path

    def judge(self, seed, graph, path):
        """Rebuild: only what the file lists may be there, and it computes what the masked seed computes."""
        small = km.rebuild(seed, path)
        listed = json.loads(path.read_text())
        widths = km.trace(small).widths
        if "format" not in listed:
            assert listed, "no counts at all"
            for key, count in listed.items():
                assert type(count) is int, f"a count {count!r}"
                layer = key if key in graph.widths else key.rpartition("/")[0]
                assert widths.get(layer, 0) <= count, f"{layer} has {widths.get(layer)} of {count} channels"
            return
        structure = km.Structure.load(path)
        assert set(listed["layers"]) == set(structure.alive)
        assert len(structure.alive) == len(graph.widths), "layers are missing"
        closed = close(graph, structure.named_as(graph).groups(graph)).channels
        here = structure.named_as(graph).alive
        for layer in graph.layers:
            if layer.name in graph.widths:
                kept = np.flatnonzero(closed[layer.made])
                assert set(kept.tolist()) <= set(here[layer.name].tolist()), (
                    f"{layer.name} keeps more than the file lists"
                )
        inputs = models.examples(seed)
        for one, other in zip(*(models.outputs(m, inputs) for m in (small, km.masked(seed, path))), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * max(1, float(np.abs(other).max())))


# Models ----------------------------------------------------------------------------------------------------------


class Models:
    """`.keras` files that are damaged as archives, or whose members are."""

    def __init__(self, folder):
        self.folder, self.sound = Path(folder), []
        for name in ("plain", "residual_identity", "separable"):
            path = self.folder / "sound.keras"
            models.build(name).save(path)
            with zipfile.ZipFile(path) as archive:
                members = {member: archive.read(member) for member in archive.namelist()}
            self.sound.append((path.read_bytes(), members))

    def case(self, rng):
        """The path of a file."""
        whole, members = rng.choice(self.sound)
        path = self.folder / "mutated.keras"
        if rng.random() < 0.2:
            path.write_bytes(mutated_bytes(whole, rng))
            return (path,)
        members = dict(members)
        member = rng.choice(("config.json", "config.json", "config.json", "model.weights.h5", "metadata.json"))
        kind = rng.randrange(10)
        if kind == 0:
            del members[member]
        elif kind == 1:
            members[rng.choice(("../outside.txt", "/tmp/outside.txt", "assets/../../outside.txt", "x" * 300))] = (
                b"outside"
            )
        elif kind == 2:
            members[member] = b""
        else:
            change = mutated_json if member.endswith("json") else mutated_bytes
            content = members[member]
            members[member] = change(content.decode() if change is mutated_json else content, rng)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return (path,)

    def judge(self, path):
        """What opens is a model that can be inspected, and gives numbers or says what is wrong with its layers."""
        model = choices.load_model(str(path))
        with contextlib.redirect_stdout(io.StringIO()):
            inspecting.show(inspecting.gather(km.trace(model)))


# Images and archives ---------------------------------------------------------------------------------------------


class Pictures:
    """Folders, zips and arrays of images, one of them damaged."""

    def __init__(self, folder):
        self.folder = Path(folder)
        colours = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
        self.encoded = {}
        for suffix, modes in {
            "png": ("L", "RGB", "RGBA", "P", "1", "I;16"), "jpg": ("L", "RGB"), "gif": ("P",), "bmp": ("RGB",), "webp": ("RGB",),
        }.items():  # fmt: skip
            for mode in modes:
                stream = io.BytesIO()
                image = Image.fromarray(colours)
                image = image.convert("L").convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
                image.save(stream, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
                self.encoded[f"{mode.replace(';', '')}.{suffix}"] = stream.getvalue()
        stream = io.BytesIO()
        np.savez(
            stream,
            x_train=np.zeros((20, 4, 4), np.uint8),
            y_train=np.arange(20) % 2,
            x_test=np.zeros((4, 4, 4), np.uint8),
            y_test=np.arange(4) % 2,
        )
        self.arrays = stream.getvalue()

    def case(self, rng):
        """A path, and whether the images stay on disk."""
        kind = rng.randrange(4)
        if kind == 0:
            path = self.folder / "mutated.npz"
            path.write_bytes(mutated_npz(self.arrays, rng))
            return path, None
        name = rng.choice(sorted(self.encoded))
        sound = self.encoded[name]
        files = {f"{part}/{label}/{i}_{name}": sound for part in ("train", "test") for label in "ab" for i in range(3)}
        if kind == 1:
            path = self.folder / "mutated.zip"
            stream = io.BytesIO()
            with zipfile.ZipFile(stream, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
                for file, content in files.items():
                    archive.writestr(file, content)
            path.write_bytes(mutated_bytes(stream.getvalue(), rng))
            return path, rng.random() < 0.5
        path = self.folder / f"images{rng.randrange(10**9)}"
        files[rng.choice(sorted(files))] = mutated_bytes(sound, rng)
        for file, content in files.items():
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            (path / file).write_bytes(content)
        return path, kind == 2

    def judge(self, path, stream):
        """What is loaded is images in [0, 1] of one shape, one for each label."""
        data = km.datasets.load(path, stream=stream)
        for part in ("train", "val", "test"):
            x, y = np.asarray(getattr(data, f"x_{part}")), getattr(data, f"y_{part}")
            assert x.shape == (len(y), *data.image_shape)
            assert x.dtype == np.float32
            assert np.isfinite(x).all()
            assert not len(x) or 0 <= x.min() <= x.max() <= 1
            assert not len(y) or 0 <= y.min() <= y.max() < data.num_classes


def mutated_npz(content, rng):
    """An archive of arrays: damaged as such, or one whose header lies."""
    if rng.random() < 0.3:
        return mutated_bytes(content, rng)
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as sound, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        chosen = rng.choice(sound.namelist())
        for name in sound.namelist():
            member = sound.read(name)
            if name == chosen:
                kind = rng.randrange(4)
                if kind == 0:
                    member = mutated_bytes(member, rng)
                elif kind == 1:
                    shape = rng.choice(
                        (b"(99999999, 99999, 9)", b"(-5, 4, 4)", b"(20, 4)", b"()", b"(True,)", b"(10**9,)")
                    )
                    at, end = member.index(b"("), member.index(b")") + 1
                    member = member[:at] + shape + member[end:].replace(b" " * 20, b"", 1)
                elif kind == 2:
                    kind = rng.choice((b"|O", b"<f8", b"<i8", b"|b1", b"<c8", b"<U9", b"|V3", b"<M8"))
                    member = member.replace(b"|u1", kind, 1).replace(b"<i8", kind, 1)
                else:
                    continue
            archive.writestr(name, member)
    return stream.getvalue()


# Options ---------------------------------------------------------------------------------------------------------

NONSENSE = [
    *(
        "",
        " ",
        "nan",
        "-inf",
        "-1",
        "0",
        "1e9",
        "1e308",
        "99999999999999999999",
        "true",
        "null",
        "[]",
        "{}",
        "\t\x1b[31m",
    ),
    *(
        "../../../etc/passwd",
        "/proc/self/mem",
        "/dev/null",
        "é漢\udcff",
        "%s%n",
        "x" * 5000,
        "-",
        "50%%",
        "0x10",
        "(a+)+$",
    ),
]


MODEL = "test_cli:for_digits"
BASES = {
    "train": ["--base-model-name", "DigitsResNet", "--dataset", "digits", "--limit", "40", "--num-epochs", "1"],
    "shrink": [MODEL, "--limit", "60", "--epochs", "3", "--seed-epochs", "0"],
    "sweep": [MODEL],
    "compare": ["."],
    "inspect": [MODEL],
    "rebuild": [MODEL, "structure.json", "out.keras"],
    "expand": [MODEL, "structure.json", "out.keras"],
    "finetune": [MODEL, "--limit", "60", "--epochs", "1"],
    "report": [MODEL, MODEL],
    "export": [MODEL],
    "measure": [MODEL],
    "benchmark": [MODEL],
    "zoo": [],
}
WORK = (  # what takes long, and is not done here: what comes to it was accepted
    "keras_morph.cli.training._fit",
    "keras_morph.cli.shrinking.shrink_model",
    "keras_morph.cli.shrinking.shrink_family",
    "keras_morph.cli.sweeping.search",
    "keras_morph.cli.finetuning.fit_resumably",
    "keras_morph.exporting.export_all",
    "keras_morph.measuring.export_structures",
    "keras_morph.benchmarking._files",
)


class Accepted(BaseException):
    """Instead of work that takes long."""


def option_cases():
    """Command lines in each of which one option or argument is nonsense; `structure.json` has to be in their folder."""
    for registered in app.registered_commands:
        base, position = BASES[registered.callback.__name__], 0
        for parameter in inspect.signature(registered.callback).parameters.values():
            if parameter.annotation is typer.Context:
                continue
            kind = parameter.annotation.__origin__
            if isinstance(parameter.annotation.__metadata__[0], typer.models.ArgumentInfo):
                for value in NONSENSE:
                    yield [registered.callback.__name__, *base[:position], "--", value, *base[position + 1 :]]
                position += 1
            elif bool not in (kind, *typing.get_args(kind)):
                for value in NONSENSE:
                    yield [registered.callback.__name__, *base, "--" + parameter.name.replace("_", "-"), value]


def judge_command(arguments, folder, within=None):
    """One line and exit code 2 or 1, or a result; nothing is written but into the folder where the command runs.

    Or into one above it, if that is given: `--log-dir ../..` is a user's wish.
    """
    out, err, outside = io.StringIO(), io.StringIO(), []

    def stop(*_, **__):
        raise Accepted

    with contextlib.ExitStack() as stack:
        for name in WORK:
            stack.enter_context(mock.patch(name, stop))
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(mock.patch("tempfile.tempdir", str(folder)))  # what is only there for a while may be there
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(written(outside, within or folder))
        stack.enter_context(watched())
        try:
            main(arguments)
        except Accepted:
            code = 0
        except SystemExit as stopped:
            code = stopped.code
    assert not outside, f"written: {outside}"
    if code == 0:
        return RIGHT
    assert code in (1, 2), f"exit code {code}"
    lines = [line for line in err.getvalue().splitlines() if line.startswith("keras-morph: ")]
    assert len(lines) == 1, f"lines: {err.getvalue()[-500:]}"
    assert "Traceback" not in err.getvalue()
    assert len(lines[0]) < 2100, "a line without an end"
    return REFUSED


_WATCHING = []


def _audit(event, arguments):
    if not _WATCHING:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags and flags & (os.O_WRONLY | os.O_RDWR))
    else:
        path, writes = arguments[0], event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink")
    if writes and isinstance(path, str | bytes | os.PathLike):
        for note in _WATCHING:
            note(os.path.realpath(os.fsdecode(path)))


sys.addaudithook(_audit)


@contextlib.contextmanager
def written(found, folder):
    """Inside, collects the paths outside a folder that are written; bytecode, caches and /dev/null are nobody's."""
    folder = os.path.realpath(folder)

    def note(path):
        parts = Path(path).parts
        if (
            not path.startswith((folder, "/dev/", "/proc/self/"))
            and "__pycache__" not in parts
            and ".cache" not in parts
        ):
            found.append(path)

    _WATCHING.append(note)
    try:
        yield
    finally:
        _WATCHING.remove(note)


# What bounds a case ----------------------------------------------------------------------------------------------


def largest_memory():
    """Bytes that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


KINDS = {"structures": Structures, "models": Models, "pictures": Pictures}


def tried(kind, folder, count, seed, *, report=None):
    """Try cases of a kind; gives how many were refused and how many were right.

    Args:
        kind: one of KINDS.
        folder: an empty one, for their files.
        count: how many.
        seed: case `number` is that of `random.Random(f"{kind} {seed} {number}")`.
        report: called with what fails and its number, instead of failing at once.
    """
    folder = Path(folder)
    cases, found = KINDS[kind](folder), {REFUSED: 0, RIGHT: 0}
    for number in range(count):
        case = cases.case(random.Random(f"{kind} {seed} {number}"))
        try:
            found[outcome(cases.judge, *case)] += 1
        except (Exception, Hangs) as error:
            if report is None:
                error.add_note(f"{kind}, seed {seed}, case {number}")
                raise
            report(number, error)
    return found
