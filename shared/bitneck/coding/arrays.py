"""Arrays to an ``.npz`` file, and back from a stranger's: every size is checked before memory is taken for it. Pure."""

import io
import math
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from bitneck.errors import BundleCorrupt

__all__ = ["MAX_ARRAY_BYTES", "read_arrays", "written_arrays"]

MAX_ARRAY_BYTES = 64 << 20
"""What the arrays of one file may take together. The tables of 320 channels with 4,000 symbols each are 5 MB."""

_MAX_HEADER = 4096
_UNIX = 3
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Methods of which `zipfile` unpacks no more than it is asked for."""


def written_arrays(**arrays: NDArray[Any]) -> bytes:
    """Arrays as a compressed ``.npz`` file, by name.

    `numpy.savez_compressed` writes a member before its size is known, with headers that differ between versions of
    Python. A bundle's id must not.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            npy.write_array(content, np.asanyarray(array), allow_pickle=False)
            member = zipfile.ZipInfo(f"{name}.npy")  # dated 1980
            member.create_system = _UNIX
            archive.writestr(member, content.getvalue(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def read_arrays(data: bytes, names: Sequence[str]) -> list[NDArray[np.generic]]:
    """Arrays of an ``.npz`` file, by name. Pickled contents are never loaded.

    Args:
        data: the file's bytes.
        names: of the arrays, without ``.npy``.

    Raises:
        BundleCorrupt: an array is missing, is not of integers, is packed by another method than deflate, has another
            length than its header says, or they would take more than `MAX_ARRAY_BYTES`.
        zipfile.BadZipFile, ValueError, OSError: it is no ``.npz`` file.
    """
    arrays = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.getinfo(f"{name}.npy") for name in names if f"{name}.npy" in archive.namelist()}
        if len(members) != len(names):
            raise BundleCorrupt(f"of the arrays {', '.join(names)} only {', '.join(members) or 'none'} are there")
        if sum(member.file_size for member in members.values()) > MAX_ARRAY_BYTES:
            raise BundleCorrupt(f"its arrays would take more than {MAX_ARRAY_BYTES} bytes")
        for name, member in members.items():
            if member.compress_type not in _BOUNDED:
                raise BundleCorrupt(f"array {name} is packed by another method than deflate")
            with archive.open(member) as file:
                content = file.read(member.file_size)  # and no more, whatever the file unpacks to
            arrays.append(_array(name, content))
    return arrays


def _array(name: str, content: bytes) -> NDArray[np.generic]:
    stream = io.BytesIO(content)
    version = npy.read_magic(stream)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read_header is None:
        raise BundleCorrupt(f"array {name} has the format {version}, expected 1.0 or 2.0")
    shape, _, dtype = read_header(stream, max_header_size=_MAX_HEADER)
    if dtype.kind not in "iu":
        raise BundleCorrupt(f"array {name} has the type {dtype}, expected integers")
    if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise BundleCorrupt(f"array {name} says it has the shape {shape}, but not that many bytes follow")
    stream.seek(0)
    array: NDArray[np.generic] = np.load(stream, allow_pickle=False)
    return array
