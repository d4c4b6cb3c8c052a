"""Folders and zips of images: `train/CLASS/*.png`, `val/CLASS/*.png`, `test/CLASS/*.jpg`, or class folders alone.

Finding images is apart from decoding them, so that a few of many cost a few.
"""

__all__ = ["Found", "image_folder", "image_zip"]

import os
import stat
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from keras_morph.datasets.arrays import Examples, Source
from keras_morph.datasets.decoding import FILE_LIMIT, Encoded, reason
from keras_morph.datasets.streams import Images
from keras_morph.errors import DataError
from keras_morph.runs import read_regular

_Parts = dict[str, tuple[str, ...]]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_PARTS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
# Folders that hold no files: to read them has effects, or no end.
_VIRTUAL = ("/proc", "/sys", "/dev")


@dataclass
class Found:
    """What lies in a folder or a zip.

    Attributes:
        names: of files, with slashes, from the folder on.
        empty: folders without any file.
        notes: what a user would want to know, one line each.
    """

    names: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def image_folder(path: Path, size: tuple[int, int] | None) -> Source:
    """Find the images of a folder.

    Images outside a class folder, files of other formats, and what is no file are left out, and a note says so; hidden
    ones without a note. Folders that hold everything else are passed over (`cifar/train/...`). Links are followed, but
    for those that lead back. Classes are numbered by sorted name.

    Args:
        path: The folder.
        size: Height and width that images are resized to when they are decoded; `None` keeps theirs.

    Raises:
        DataError: If a folder cannot be read, if there are no images or fewer than two classes, or if a class is in the
            validation or test part only.
    """
    root = os.path.realpath(path)
    if root == os.path.abspath(os.sep) or any(root == each or root.startswith(f"{each}/") for each in _VIRTUAL):
        msg = f"{path}: expected a folder of images, received one of the system's own; check the path"
        raise DataError(msg)
    found = _walked(path)
    return _by_class(
        found, lambda name: (f"{path}/{name}", partial(read_regular, f"{path}/{name}", FILE_LIMIT)), path, size
    )


def _walked(path: Path) -> Found:
    """All files below a folder."""
    found, kinds, followed = Found(), Counter[str](), set[str]()
    waiting: list[tuple[str, tuple[str, ...]]] = [("", ())]  # folders, and where the links were by which we came
    while waiting:
        folder, trail = waiting.pop()
        before, inside = len(found.names), 0
        try:
            with os.scandir(path / folder) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}".lstrip("/")
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        inside += 1
                        way = trail
                        if entry.is_symlink():
                            target, way = os.path.realpath(entry.path), (*trail, os.path.realpath(path / folder))
                            if target in followed or not _leads_on(target, way):
                                kinds["links to folders that were there before are not followed"] += 1
                                continue
                            followed.add(target)
                            kinds["links to other folders are followed"] += 1
                        waiting.append((name, way))
                    elif entry.is_file():
                        found.names.append(name)
                    elif name.lower().endswith(_SUFFIXES):
                        kinds[_kind_of(entry)] += 1
        except OSError as error:
            msg = f"{path / folder}: expected a folder that can be read, received one that cannot ({reason(error)})"
            raise DataError(msg) from error
        if folder and not inside and len(found.names) == before:
            found.empty.append(folder)
    found.notes += [f"{count:,} {kind}" for kind, count in sorted(kinds.items())]
    return found


def _leads_on(target: str, way: Iterable[str]) -> bool:
    """Whether a folder is neither one of the system's own nor holds one of those by which we came."""
    below = tuple(f"{folder}/" for folder in way)
    return not target.startswith(_VIRTUAL) and not any(each.startswith(f"{target.rstrip('/')}/") for each in below)


def _kind_of(entry: "os.DirEntry[str]") -> str:
    """What a file is that cannot be read as one."""
    try:
        mode = entry.stat().st_mode
    except OSError:
        return "links that lead nowhere are left out"
    names = {stat.S_ISFIFO: "pipes", stat.S_ISSOCK: "sockets", stat.S_ISCHR: "devices", stat.S_ISBLK: "devices"}
    return next((f"{name} are left out" for test, name in names.items() if test(mode)), "special files are left out")


def image_zip(path: Path, size: tuple[int, int] | None) -> Source:
    """Find the images of a zip, as in `image_folder`; members are decoded straight from the archive.

    Raises:
        DataError: If the file is no zip, and as in `image_folder`.
    """
    try:
        # Stays open as long as its examples live: to read the list of 60,000 members once more takes half a second.
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        msg = f"{path}: expected a zip of images, received a file that cannot be opened ({reason(error)})"
        raise DataError(msg) from error
    members = archive.infolist()
    files = [member.filename for member in members if not member.is_dir()]
    folders = _above(name.rpartition("/")[0] for name in files)
    empty = [m.filename.rstrip("/") for m in members if m.is_dir() and m.filename.rstrip("/") not in folders]
    found = Found(files, [name for name in empty if not _hidden(name.split("/"))])
    return _by_class(found, lambda name: (f"{path}: {name}", partial(_member, archive, name)), path, size)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    size = archive.getinfo(name).file_size
    if size > FILE_LIMIT:
        msg = f"{size:,} bytes when unpacked, more than {FILE_LIMIT:,}"
        raise ValueError(msg)
    return archive.read(name)  # never more than it says


def _by_class(found: Found, encoded: Callable[[str], Encoded], path: Path, size: tuple[int, int] | None) -> Source:
    images, notes = _image_parts(found, path), list(found.notes)
    parts, more = _split(images, path)
    notes += more
    train = parts.pop("train")
    class_names = tuple(sorted({folders[0] for folders in train.values()}))
    if len(class_names) < 2:
        msg = (
            f"{path}: expected at least two folders of images, one per class (train/CLASS/*.png, test/CLASS/*.png, or "
            f"CLASS/*.png), received {class_names[0] if class_names else 'none'}; sort the images into folders"
        )
        raise DataError(msg)
    for part, others in parts.items():
        strangers = sorted({folders[0] for folders in others.values()} - set(class_names))
        if strangers:
            msg = (
                f"{path}: expected in {part}/ only classes that train/ has too, received {strangers[0]!r}; remove it, or "
                "add its training images"
            )
            raise DataError(msg)
    notes += _left_out(found, {name for part in (train, *parts.values()) for name in part}, class_names)
    number = {name: index for index, name in enumerate(class_names)}

    def examples(part: _Parts) -> Examples:
        files = sorted(part)
        labels = np.array([number[part[file][0]] for file in files], np.int32)
        return Examples(labels, Images(lambda index: encoded(files[index]), np.arange(len(files)), size))

    split = {part: examples(others) for part, others in parts.items() if others}
    return Source(examples(train), class_names, test=split.get("test"), validation=split.get("val"), notes=tuple(notes))


def _left_out(found: Found, images: set[str], class_names: Sequence[str]) -> Iterator[str]:
    """Notes on files that are no images, images outside class folders, and class folders without images."""
    others = [name for name in found.names if not name.lower().endswith(_SUFFIXES) and not _hidden(name.split("/"))]
    if others:
        kinds = Counter(PurePosixPath(name).suffix.lower() or "no ending" for name in others)
        said = ", ".join(f"{kind} ({count:,})" for kind, count in kinds.most_common(5))
        yield f"{len(others):,} files that are no images are left out: {said}"
    outside = sum(
        name.lower().endswith(_SUFFIXES) and name not in images and not _hidden(name.split("/")) for name in found.names
    )
    if outside:
        yield f"{outside:,} images outside a class folder are left out"
    holding = _above(name.rpartition("/")[0] for name in images)
    empty = sorted(_above([name.rpartition("/")[0] for name in found.names if "/" in name] + found.empty) - holding)
    if empty:
        yield f"{len(empty):,} folders without images make no class: {', '.join(empty[:5])}{', ...' * (len(empty) > 5)}"


def _above(folders: Iterable[str]) -> set[str]:
    """Folders, and those that they are in; a million files are in a thousand of them."""
    unique = set(folders)
    return {*unique, *(str(parent) for folder in unique for parent in PurePosixPath(folder).parents)} - {"", "."}


def _hidden(parts: Iterable[str]) -> bool:
    return any(part.startswith((".", "__MACOSX")) and part != "." for part in parts)


def _image_parts(found: Found, path: Path) -> _Parts:
    """Split the names of images at slashes; without hidden ones, and without folders that hold everything else."""
    images: _Parts = {}
    for name in found.names:
        if name.lower().endswith(_SUFFIXES):
            # A million names share their folders' names.
            parts = tuple(sys.intern(part) for part in name.split("/") if part not in ("", "."))
            if not _hidden(parts):
                images[name] = parts
    if not images:
        there = Counter(PurePosixPath(name).suffix.lower() or "no ending" for name in found.names)
        instead = ", ".join(f"{count:,} of {kind}" for kind, count in there.most_common(3))
        msg = f"{path}: expected images ({', '.join(_SUFFIXES)}), received {instead or 'none'}; check the path"
        raise DataError(msg)
    while True:
        images = {name: parts for name, parts in images.items() if len(parts) > 1}
        tops = {parts[0] for parts in images.values()}
        holds_folders = any(len(parts) > 2 for parts in images.values())
        if len(tops) != 1 or not holds_folders or _holds_classes(images, _PARTS["train"]):
            return images
        images = {name: parts[1:] for name, parts in images.items()}


def _holds_classes(images: _Parts, names: Sequence[str]) -> bool:
    # A class may be called "train", as in CIFAR-100: then images lie right inside.
    return any(parts[0].lower() in names and len(parts) > 2 for parts in images.values())


def _split(images: _Parts, path: Path) -> tuple[dict[str, _Parts], list[str]]:
    """The images of `train`, `val` and `test` by class, and what there is to say."""
    if not _holds_classes(images, _PARTS["train"]):
        return {"train": images}, []
    parts: dict[str, _Parts] = {}
    for part, names in (("train", _PARTS["train"]), ("val", _PARTS["validation"]), ("test", _PARTS["test"])):
        parts[part] = {
            name: folders[1:] for name, folders in images.items() if folders[0].lower() in names and len(folders) > 2
        }
    known = {name for names in _PARTS.values() for name in names}
    others = sorted({folders[0] for folders in images.values()} - {f for f in _tops(images) if f.lower() in known})
    if others and not (parts["test"] or parts["val"]):
        msg = (
            f"{path}: expected test/CLASS or val/CLASS beside train/, received {', '.join(others[:5])}; rename the test "
            "images' folder"
        )
        raise DataError(msg)
    notes = []
    if parts["val"] and not parts["test"]:
        parts["test"] = parts["val"]
        notes.append("there is no test/: the images of val/ are for validation and for the test")
    if others:
        notes.append(f"folders beside train/ that are left out: {', '.join(others[:5])}")
    return parts, notes


def _tops(images: Mapping[str, tuple[str, ...]]) -> set[str]:
    return {folders[0] for folders in images.values()}
