"""TFRecord files of images, as TensorFlow's scripts and tensorflow-datasets write them, read without TensorFlow.

A file is a row of records, each `length, checksum, data, checksum`; the data are a `tf.train.Example` in Protocol Buffers'
wire format. The files are mapped into memory: to find labels and images reads little more than the pages that these begin on.
"""

__all__ = ["image_records", "record_files"]

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from keras_morph.datasets.arrays import Examples, Source, integer_labels
from keras_morph.datasets.decoding import FILE_LIMIT, reason
from keras_morph.datasets.streams import Images
from keras_morph.errors import DataError

_FILE = re.compile(r".*(\.tfrecords?\b.*|\.array_record\b.*|-\d{5}-of-\d{5})", re.IGNORECASE)
_PART = re.compile(r"(?:^|[-_.])(train|validation|valid|val|test)(?:ing)?(?=[-_.]|$)", re.IGNORECASE)
_IMAGES, _LABELS, _TEXTS = ("image/encoded", "image"), ("image/class/label", "label"), ("image/class/text",)
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # kinds of fields in the wire format


def record_files(path: Path) -> list[Path]:
    """The files of records in a folder, or the file itself if it is one, by their names."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return [
            file for file in files if _FILE.fullmatch(file.name) and not file.name.startswith(".") and file.is_file()
        ]
    except OSError:  # whoever reads folders of images says it
        return []


def image_records(path: Path, size: tuple[int, int] | None) -> Source:
    """Find the images of TFRecord files: `train-00000-of-00010`, `photos-validation.tfrecord-00000-of-00001`, `all.tfrecord`.

    Of each record `image/encoded` and `image/class/label` are read, or `image` and `label`. Classes are named by
    `image/class/text`, or by the lines of the one file that is called `*labels.txt`; else by their numbers.

    Args:
        path: a folder, or one file.
        size: height and width that images are resized to when they are decoded; `None` keeps theirs.

    Raises:
        DataError: if a file cannot be read, or a record is something else.
    """
    parts: dict[str, list[Path]] = {}
    for file in record_files(path):
        found = _PART.search(file.name)
        parts.setdefault(found[1].lower()[:3] if found else "", []).append(file)
    unnamed = parts.pop("", [])
    notes = []
    if "tra" not in parts:
        parts["tra"], unnamed = unnamed, []
    if unnamed:
        notes.append(f"{len(unnamed):,} files that are of no part are left out: {unnamed[0].name}")
    if not parts["tra"]:
        msg = f"{path}: expected files of training images (train-00000-of-00010), received {', '.join(sorted(parts))} alone"
        raise DataError(msg)
    if "val" in parts and "tes" not in parts:
        parts["tes"] = parts["val"]
        notes.append("there is no test file: the images of the validation files are for validation and for the test")
    read = {part: _Records.of(files, path) for part, files in parts.items()}
    examples = {part: records.examples(size) for part, records in read.items()}
    count = 1 + max(int(records.labels.max()) for records in read.values())
    names = _class_names(
        path, count, {label: text for records in read.values() for label, text in records.texts.items()}
    )
    return Source(examples["tra"], names, test=examples.get("tes"), validation=examples.get("val"), notes=tuple(notes))


def _class_names(path: Path, count: int, texts: dict[int, str]) -> tuple[str, ...]:
    listed = sorted(path.glob("*labels.txt")) if path.is_dir() else []
    if len(listed) == 1:
        lines = listed[0].read_text(encoding="utf-8", errors="replace").splitlines()
        if len(lines) >= count:
            return tuple(lines)
    names = tuple(texts.get(label, str(label)) for label in range(count))
    return names if len(set(names)) == count else tuple(map(str, range(count)))


@dataclass(frozen=True)
class _Records:
    """Where the images of some files are.

    Attributes:
        files: their paths and contents.
        places: int64 `(n, 4)`: file, number of the record, first byte of the image, and bytes.
        labels: int32 `(n,)`.
        texts: the name of each label that has one.
    """

    files: tuple[tuple[Path, mmap.mmap], ...]
    places: np.ndarray
    labels: np.ndarray
    texts: dict[int, str]

    @classmethod
    def of(cls, files: list[Path], path: Path) -> "_Records":
        opened, places, labels, texts = [], [], [], {}
        for number, file in enumerate(files):
            content = _mapped(file)
            opened.append((file, content))
            for index, (start, end) in enumerate(_records(file, content)):
                features = _example(content, start, end, f"{file}[{index}]")
                image, label = (_one_of(features, keys, f"{file}[{index}]") for keys in (_IMAGES, _LABELS))
                if not isinstance(image, tuple) or not isinstance(label, int):
                    msg = f"{file}[{index}]: expected bytes of one encoded image and one integer label, received others"
                    raise DataError(msg)
                places.append((number, index, *image))
                labels.append(label)
                text = features.get(_TEXTS[0])
                if isinstance(text, tuple) and label not in texts:
                    texts[label] = content[text[0] : text[0] + text[1]].decode("utf-8", "replace")
        if not labels:
            msg = f"{path}: expected records of images, received empty files: {', '.join(f.name for f in files[:3])}"
            raise DataError(msg)
        return cls(tuple(opened), np.array(places, np.int64), integer_labels(np.array(labels), str(path)), texts)

    def examples(self, size: tuple[int, int] | None) -> Examples:
        """Labels, and images that are decoded when they are asked for."""

        def encoded(index: int) -> tuple[str, partial[bytes]]:
            number, record, start, length = self.places[index].tolist()
            file, content = self.files[number]
            return f"{file}[{record}]", partial(content.__getitem__, slice(start, start + length))

        return Examples(self.labels, Images(encoded, np.arange(len(self.labels)), size))


def _mapped(file: Path) -> mmap.mmap:
    why = None
    try:
        with file.open("rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        if content[:2] == b"\x1f\x8b":
            why = "a compressed one; write it without compression"
        elif ".array_record" in file.name.lower():
            why = "an ArrayRecord; tensorflow-datasets writes TFRecord with file_format='tfrecord'"
    except (OSError, ValueError) as error:  # mmap refuses a file without content
        why = f"one that cannot be read ({reason(error)})"
    if why:
        msg = f"{file}: expected a TFRecord file, received {why}"
        raise DataError(msg)
    return content


def _records(file: Path, content: mmap.mmap) -> Iterator[tuple[int, int]]:
    """First byte and end of each record's data."""
    place = 0
    while place < len(content):
        length = struct.unpack_from("<Q", content, place)[0] if place + 12 <= len(content) else FILE_LIMIT
        start, end = place + 12, place + 12 + length
        if length >= FILE_LIMIT or end + 4 > len(content):
            msg = (
                f"{file}: expected a TFRecord file, received one that is damaged, or something else, at byte {place:,}"
            )
            raise DataError(msg)
        yield start, end
        place = end + 4


_Value = tuple[int, int] | int | None
"""First byte and length of bytes, an integer, or something else."""


def _one_of(features: dict[str, _Value], keys: tuple[str, ...], origin: str) -> _Value:
    for key in keys:
        if key in features:
            return features[key]
    found = ", ".join(sorted(features)) or "nothing"
    msg = f"{origin}: expected {' or '.join(keys)} in each record, received {found[:300]}"
    raise DataError(msg)


def _example(content: mmap.mmap, start: int, end: int, origin: str) -> dict[str, _Value]:
    """The features of a `tf.train.Example` with one value each: Example > Features > (key, Feature) > list > value."""
    features: dict[str, _Value] = {}
    try:
        for features_start, features_end in _inside(content, start, end, 1):
            for entry in _inside(content, features_start, features_end, 1):
                ((key, key_end),) = _inside(content, *entry, 1)
                name = content[key:key_end].decode("utf-8")
                value: _Value = None
                for feature in _inside(content, *entry, 2):
                    of_bytes = [each for kind in _inside(content, *feature, 1) for each in _inside(content, *kind, 1)]
                    integers = [n for kind in _inside(content, *feature, 3) for n in _integers(content, *kind)]
                    if len(of_bytes) == 1:
                        value = (of_bytes[0][0], of_bytes[0][1] - of_bytes[0][0])
                    elif len(integers) == 1:
                        value = integers[0]
                features[name] = value
    except (ValueError, IndexError) as error:
        msg = f"{origin}: expected a tf.train.Example, received something else ({reason(error)})"
        raise DataError(msg) from error
    return features


def _inside(content: mmap.mmap, start: int, end: int, wanted: int) -> list[tuple[int, int]]:
    """First byte and end of each field of bytes with a number."""
    return [
        (first, last)
        for number, kind, first, last in _fields(content, start, end)
        if (number, kind) == (wanted, _BYTES)
    ]


def _integers(content: mmap.mmap, start: int, end: int) -> Iterator[int]:
    """The values of an Int64List, packed or not."""
    for number, kind, first, last in _fields(content, start, end):
        while number == 1 and kind in (_VARINT, _BYTES) and first < last:
            value, first = _varint(content, first, last)
            yield value - (value >> 63 << 64)  # of two's complement


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, kind, first byte and end of the fields of a message."""
    while start < end:
        key, start = _varint(content, start, end)
        kind, first = key & 7, start
        if kind == _VARINT:
            _, start = _varint(content, start, end)
        elif kind == _BYTES:
            length, first = _varint(content, start, end)
            start = first + length
        elif kind in (_FIXED64, _FIXED32):
            start += 8 if kind == _FIXED64 else 4
        else:
            msg = f"a field of kind {kind}"
            raise ValueError(msg)
        if start > end:
            msg = "a field that is longer than its message"
            raise ValueError(msg)
        yield key >> 3, kind, first, start


def _varint(content: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    """A number in groups of seven bits, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= end:
            break
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    msg = "a number without end"
    raise ValueError(msg)
