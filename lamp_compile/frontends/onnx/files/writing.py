"""Write a model beside its external data: complete or not at all, and never over the model that it came from."""

from __future__ import annotations

import filecmp
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lamp_compile.errors import InputError
from lamp_compile.frontends.onnx.files.reading import all_tensors
from lamp_compile.frontends.onnx.files.tensors import Folder

if TYPE_CHECKING:
    from onnx import ModelProto

_LARGEST = 2**31 - 1


def write(model: ModelProto, path: Path, source: Folder | None) -> None:
    """Write a model file; external data is copied next to it unless it is there already.

    Args:
        model: With external tensors as references relative to ``source``.
        path: The file; its folder must exist.
        source: Where the model came from; None if it has no external data.

    Raises:
        InputError: The folder is missing, the file is the original, a data file of that name but another content is
            in the way, or the model is larger than protobuf allows.
    """
    if not path.parent.is_dir():
        raise InputError("its folder does not exist", where=str(path), fix="create it first")
    if path.is_dir():
        raise InputError("it is a folder", where=str(path), fix="name a file in it, such as model.onnx")
    if source is not None and path.exists() and os.path.samefile(path, source.model):
        raise InputError("the result would overwrite the original", where=str(path), fix="give it another name")
    if model.ByteSize() > _LARGEST:
        raise InputError("more than 2 GiB", where=str(path), fix="save the original with external data first")
    if source is not None:
        _copy_data(model, path, source)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(model.SerializeToString(deterministic=True))
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(path), fix="choose another place") from None


def _copy_data(model: ModelProto, path: Path, source: Folder) -> None:
    root = Path(os.path.realpath(path.parent))
    if root == source.root:
        return
    locations = {
        entry.value
        for tensor in all_tensors(model)
        for entry in tensor.external_data
        if tensor.data_location == 1 and entry.key == "location"
    }
    pairs = [(source.file(location, str(path))[0], root / location) for location in sorted(locations)]
    for original, copy in pairs:
        if copy.exists() and not (copy.is_file() and filecmp.cmp(original, copy, shallow=False)):
            raise InputError("another data file of this name is there", where=str(copy), fix="choose another folder")
        if not Path(os.path.realpath(copy)).is_relative_to(root):
            raise InputError("a link leads out of the folder", where=str(copy), fix="choose another folder")
    for original, copy in pairs:
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(original, copy)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
