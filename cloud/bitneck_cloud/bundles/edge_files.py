"""The device's half of a bundle, for devices that fetch it, whatever becomes of its folder."""

import contextlib
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

from bitneck.bundle import Bundle
from bitneck.disk_thread import DiskThread
from bitneck.errors import BundleCorrupt, Unavailable

__all__ = ["EdgeFiles"]

_MOST_MEMORY = 2 << 20
"""Bytes of files that are kept in memory, the smallest ones. The others stay open: of the default bundle, 10 of 108."""
_MOST_S = 5.0
"""A disk that has not given a chunk for so long does not answer."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class _Held:
    """Files that can be read without their folder: the small ones, and descriptors of the others."""

    small: Mapping[str, bytes]
    large: Mapping[str, int]


class EdgeFiles:
    """The files of one bundle that devices may fetch.

    Before `hold`, they are read from the bundle's folder. After it, they are in memory or open, so they can be read as
    long as this object lives, though the folder is deleted, replaced, or not mounted any more.

    Args:
        bundle: verified, with the device's half.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._entries = bundle.manifest.files_for("edge")
        self._held: _Held | None = None
        self._disk = DiskThread("bitneck-files")
        weakref.finalize(self, self._disk.end)

    def hold(self) -> None:
        """Hold the files from now on, in place of those that were held before. It blocks.

        Raises:
            BundleCorrupt: one is gone, cannot be read, or has another size.
        """
        small, large, left = dict[str, bytes](), dict[str, int](), _MOST_MEMORY
        with contextlib.ExitStack() as at_last, contextlib.ExitStack() as unless_held:
            for name, entry in sorted(self._entries.items(), key=lambda item: item[1].size):
                path = self._bundle.path(name)
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                    (at_last if entry.size <= left else unless_held).callback(os.close, descriptor)
                    if (size := os.fstat(descriptor).st_size) != entry.size:
                        raise BundleCorrupt(f"{path} has {size} bytes, the manifest says {entry.size}; export it again")
                    if entry.size <= left:
                        small[name] = os.pread(descriptor, entry.size, 0)
                        left -= entry.size
                    else:
                        large[name] = descriptor
                except OSError as exc:
                    raise BundleCorrupt(f"{path} cannot be read ({exc.strerror or exc}); export it again") from exc
            held = _Held(small, large)
            unless_held.pop_all()
        weakref.finalize(held, _close, tuple(large.values()))
        self._held = held

    @property
    def open_files(self) -> int:
        """Descriptors that they take."""
        return len(self._held.large) if self._held is not None else 0

    async def read(self, name: str, offset: int, most: int) -> bytes:
        """A part of a file.

        Args:
            name: one of the device's half.
            offset: of the first byte that is wanted, within the file.
            most: bytes that are wanted, at least 1.

        Returns:
            One byte at least.

        Raises:
            Unavailable: the disk does not answer, or the file is gone or has changed; the reason is on its ``cause``.
        """
        held = self._held
        if held is not None and name in held.small:
            return held.small[name][offset : offset + most]
        try:
            if self._disk.stuck_s > _MOST_S:
                raise TimeoutError
            return await self._disk.within(_MOST_S, self._read, held, name, offset, most)
        except TimeoutError as exc:
            raise Unavailable(f"the disk of the bundle has not given {name} for {_MOST_S:.0f} s") from exc
        except OSError as exc:
            raise Unavailable(f"{name} cannot be read ({exc.strerror or exc})") from exc

    def _read(self, held: _Held | None, name: str, offset: int, most: int) -> bytes:
        if held is not None:  # as long as this runs, `held` lives, and its files are open
            # An error, such as of a network's disk on which they were deleted: perhaps they are back.
            with contextlib.suppress(OSError):
                if data := os.pread(held.large[name], most, offset):
                    return data
        with self._bundle.path(name).open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) != self._entries[name].size:
                raise OSError(f"it has {size} bytes, the manifest says {self._entries[name].size}")
            file.seek(offset)
            return file.read(most)


def _close(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
