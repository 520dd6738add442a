"""Bytes of a ``.pt2`` archive: its JSON within limits, tensors by their path. What is pickled is not read."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from lamp_compile.diff import literals
from lamp_compile.errors import InputError

MOST_JSON = 2**29
"""Bytes of one JSON file, uncompressed."""
MOST_EXPANDED = 2**26
"""Bytes of one tensor, where the archive itself is smaller: nothing in it is compressed, but views can repeat bytes."""
SCALARS = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16", 29: "float8_e4m3fn",
    30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu", 34: "uint32", 35: "uint64",
}  # fmt: skip
_NUMPY = {
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "float32",
    "float64",
    "bool",
    "uint16",
    "uint32",
    "uint64",
}
_SIZES = {"complex32": 4, "complex64": 8, "complex128": 16, "bfloat16": 2}


class Archive:
    """An open archive."""

    def __init__(self, opened: zipfile.ZipFile, where: str) -> None:
        self.zip, self.where = opened, where
        self.most = max(Path(where).stat().st_size, MOST_EXPANDED)
        self.names = set(opened.namelist())
        models = sorted(n for n in self.names if n.rpartition("/")[0].endswith("models") and n.endswith(".json"))
        if len(models) != 1:
            compiled = any("aotinductor" in name for name in self.names)
            what = "a compiled package, which holds no graph" if compiled else f"{len(models)} exported programs in it"
            raise InputError(f"not an archive with one exported program: {what}", where=where, fix="torch.export.save")
        self._model = models[0]
        self.root = models[0].rpartition("models/")[0]
        self._tables: dict[str, dict[str, Any]] = {}

    def model(self) -> dict[str, Any]:
        """The exported program as JSON."""
        return self._json(self._model)

    def digest(self, path: str) -> str:
        """Hash of the values of a parameter or buffer."""
        found = self.values(path, self.folder(path))
        return literals.digest(found[2]) if found is not None else "#pickled"

    def small(self, path: str) -> str | None:
        """A small tensor's literal; None where it is large, pickled, or of a type without one."""
        folder = self.folder(path)
        meta = self._table(folder).get(path, {}).get("tensor_meta")
        if not meta or _count(_sizes(meta)) > literals.MOST_INLINE:
            return None
        return self._literal(path, folder)

    def folder(self, path: str) -> str:
        """Where a parameter or buffer lies: buffers that are not persistent are among the constants."""
        return "weights" if path in self._table("weights") else "constants"

    def literal(self, path: str) -> str:
        """A constant's literal or hash."""
        return self._literal(path, "constants") or "#pickled"

    def _literal(self, path: str, folder: str) -> str | None:
        import numpy as np

        found = self.values(path, folder)
        if found is None:
            return None
        dtype, sizes, data = found
        if dtype not in _NUMPY or _count(sizes) > literals.MOST_INLINE:
            return literals.tensor(dtype, sizes, None, data)
        array = np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<"))
        values = [float(str(x)) if array.dtype.kind == "f" else x.item() for x in array]
        return literals.tensor(dtype, sizes, values, None)

    def values(self, path: str, folder: str) -> tuple[str, tuple[int, ...], bytes] | None:
        """Element type, sizes and contiguous bytes; None for what is pickled."""
        import numpy as np

        entry = self._table(folder).get(path)
        if entry is None or entry.get("use_pickle") or not entry.get("tensor_meta"):
            return None
        meta = entry["tensor_meta"]
        dtype, sizes = SCALARS.get(meta["dtype"], "?"), _sizes(meta)
        item = np.dtype(dtype).itemsize if dtype in _NUMPY else _SIZES.get(dtype, 1)
        name = f"{self.root}data/{folder}/{entry['path_name']}"
        info = self.zip.getinfo(name)
        if max(info.file_size, _count(sizes) * item) > self.most:
            raise InputError(f"{path} claims more bytes than the archive has", where=self.where, fix="save it again")
        raw = self.zip.read(info)
        strides = tuple(int(s["as_int"]) for s in meta["strides"])
        start = int(meta["storage_offset"]["as_int"])
        last = start + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        if _count(sizes) and (min(strides, default=0) < 0 or start < 0 or (last + 1) * item > len(raw)):
            raise InputError(f"{path} reaches beyond its bytes", where=self.where, fix="save the program again")
        if not _count(sizes):
            return dtype, sizes, b""
        cells = np.frombuffer(raw, dtype=f"V{item}", count=len(raw) // item)[start:]
        view = np.lib.stride_tricks.as_strided(cells, sizes, tuple(s * item for s in strides), writeable=False)
        return dtype, sizes, view.tobytes()

    def _table(self, folder: str) -> dict[str, Any]:
        if folder not in self._tables:
            stem = "model_weights" if folder == "weights" else "model_constants"
            name = f"{self.root}data/{folder}/{stem}_config.json"
            self._tables[folder] = self._json(name)["config"] if name in self.names else {}
        return self._tables[folder]

    def _json(self, name: str) -> dict[str, Any]:
        info = self.zip.getinfo(name)
        if info.file_size > MOST_JSON:
            raise InputError(
                f"{name} is {info.file_size:,} bytes, at most {MOST_JSON:,} are read",
                where=self.where,
                fix="a smaller program",
            )
        with self.zip.open(info) as file:
            data = file.read(MOST_JSON + 1)
        found = json.loads(data)
        if not isinstance(found, dict):
            raise InputError(f"{name} is no JSON object", where=self.where, fix="save the program again")
        return found


def _sizes(meta: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(s["as_int"]) for s in meta["sizes"])


def _count(sizes: tuple[int, ...]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count
