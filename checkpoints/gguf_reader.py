"""A GGUF file, the format of llama.cpp, opened: its metadata and its tensors, still as stored.

The file is: magic, version, two counts; the metadata, each a name, a type and a value; a list of
the tensors, each a name, a shape, a type and a place; then their data. All is little-endian.
"""
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from support.files import need

NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
           10: "<u8", 11: "<i8", 12: "<f8"}
TEXT, LIST = 8, 9


class Stored(NamedTuple):
    """A tensor as it is stored."""
    name: str
    kind: Any                       # a gguf.GGMLQuantizationType
    shape: tuple                    # as in PyTorch: rows first
    data: np.ndarray                # (..., bytes of a row) uint8, on disk until it is read


class Cursor:
    """Reads one value after the other; what would lie beyond the end is refused."""

    def __init__(self, path):
        self.path, self.at = path, 0
        self.file = np.memmap(path, np.uint8, "r")

    def room(self, size):
        need(size <= len(self.file) - self.at, f"{self.path}: the file is truncated or damaged "
                                               f"(its {len(self.file)} bytes are too few)")

    def take(self, size):
        self.room(size)
        self.at += size
        return self.file[self.at - size:self.at].tobytes()

    def number(self, form):
        return struct.unpack("<" + form, self.take(struct.calcsize(form)))[0]

    def text(self):
        raw = self.take(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: {raw[:60]!r} is no UTF-8; is the file damaged?"
                             ) from None

    def value(self, kind):
        """A number, a text, or a list of one of them."""
        if kind == TEXT:
            return self.text()
        if kind == LIST:
            inner, count = self.number("I"), self.number("Q")
            if inner == TEXT:
                return [self.text() for _ in range(count)]
            return self.numbers(inner, count).tolist()
        return self.numbers(kind, 1)[0].item()

    def numbers(self, kind, count):
        need(kind in NUMBERS, f"{self.path}: a value of the unknown type {kind}; "
                              "is the file damaged?")
        form = np.dtype(NUMBERS[kind])
        return np.frombuffer(self.take(count * form.itemsize), form)


class Gguf:
    """fields: the metadata, a dict; tensors: a list of Stored. ValueError for other files."""

    def __init__(self, path):
        self.path = Path(path)
        need(self.path.is_file(), f"{path}: no such file")
        need(self.path.stat().st_size >= 24, f"{path}: not a GGUF file")
        cursor = Cursor(self.path)
        need(cursor.take(4) == b"GGUF", f"{path}: not a GGUF file")
        version = cursor.number("I")
        need(version & 65535, f"{path}: a big-endian GGUF file is not supported")
        need(version in (2, 3), f"{path}: version {version} of GGUF is not supported (2, 3)")
        n_tensors, n_fields = cursor.number("Q"), cursor.number("Q")
        self.fields = {}
        for _ in range(n_fields):
            name = cursor.text()
            need(name not in self.fields, f"{path}: {name:.60} stands there twice")
            self.fields[name] = cursor.value(cursor.number("I"))
        self.whole()
        table = [self.entry(cursor) for _ in range(n_tensors)]
        self.tensors = self.place(cursor, table)

    def whole(self):
        """Refuse the parts of a file that was split."""
        parts = self.get("split.count", 1)
        need(parts in (0, 1), f"{self.path}: one of {parts} parts of a split file; join them first "
                              "(llama-gguf-split --merge)")

    def entry(self, cursor):
        """The next line of the list of tensors -> name, shape, number of the type, offset."""
        name, dims = cursor.text(), cursor.number("I")
        need(dims <= 4, f"{self.path}: {name:.60} has {dims} dimensions; is the file damaged?")
        shape = [cursor.number("Q") for _ in range(dims)]
        return name, tuple(reversed(shape)), cursor.number("I"), cursor.number("Q")

    def place(self, cursor, table):
        """The entries of the list -> Stored, each with its bytes of the file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        step = self.get("general.alignment", 32)
        need(type(step) is int and step > 0, f"{self.path}: general.alignment is {step!r:.60}")
        begin = -(-cursor.at // step) * step
        known, stored = set(GGMLQuantizationType), {}
        for name, shape, kind, offset in table:
            need(kind in known, f"{self.path}: {name:.60} is of the unknown type {kind}")
            need(name not in stored, f"{self.path}: tensor {name:.60} stands there twice")
            kind = GGMLQuantizationType(kind)
            block, size = GGML_QUANT_SIZES[kind]
            columns = shape[-1] if shape else 1
            need(columns % block == 0, f"{self.path}: {name:.60} has rows of {columns} numbers, "
                                       f"{kind.name} needs a multiple of {block}")
            cursor.at = begin + offset
            count = math.prod(shape) // block * size
            cursor.room(count)
            data = cursor.file[cursor.at:cursor.at + count]
            data = data.reshape(*shape[:-1], columns // block * size)
            stored[name] = Stored(name, kind, shape, data)
        return list(stored.values())

    def get(self, name, default=None):
        return self.fields.get(name, default)

    def field(self, name):
        """A value that has to be there."""
        need(name in self.fields, f"{self.path}: the metadata {name} are missing")
        return self.fields[name]
