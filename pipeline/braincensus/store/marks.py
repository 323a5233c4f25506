"""Marks of done blocks: what a block gave, which files it wrote, and their checksums.

Written after the data, and believed only as far as it checks: a block counts as done if its mark is of the
same key (everything that the block depends on), and every file that it wrote is there with the same bytes.
Anything less, a mark cut short included, and the block is done again.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from braincensus.errors import OutputError
from braincensus.store.packing import pack, unpack

if TYPE_CHECKING:
    from braincensus.store.container import Output

DONE = "done"
"""Folder of the marks among the working files: a folder for each stage in it, and for each of its steps."""

_ABSENT = -1  # size of a shard that holds nothing but the fill value, which zarr does not write
_READ = 1 << 22


@dataclass(frozen=True)
class Mark:
    """Where the mark of a block is, and what it must say."""

    output: Output
    stage: str
    step: str
    number: int
    key: str

    @property
    def _name(self) -> str:
        return f"{DONE}/{self.stage}/{self.step}/{self.number:07d}"

    def result(self, classes: Sequence[type]) -> Any:
        """Return what the block gave.

        Raises
        ------
        NotDoneError
            If the block is not done, or not as it was.
        """
        try:
            arrays = self.output.read_work(self._name)
            key, result, files = unpack(arrays, classes)
            files = [(relative, int(size), int(checksum)) for relative, size, checksum in files]
        except (OutputError, ValueError, TypeError) as err:
            raise NotDoneError(str(err)) from err
        if key != self.key:
            raise NotDoneError("it was done for something else")
        for relative, size, checksum in files:
            if not _is_inside(relative):  # not written by us
                raise NotDoneError(f"{relative!r} names a file outside the output")
            if _size_and_checksum(self.output.path / relative) != (size, checksum):
                raise NotDoneError(f"{relative} is not what was written")
        return result

    def write(self, result: Any, files: Sequence[Path]) -> None:
        """Mark the block as done; call it when all of its files are written."""
        listed = [
            (str(path.relative_to(self.output.path)), *_size_and_checksum(path))
            for path in sorted(set(files))
        ]
        self.output.write_work(self._name, pack((self.key, result, listed)))


class NotDoneError(Exception):
    """A block that is to be done (again)."""


def _is_inside(relative: object) -> bool:
    path = PurePosixPath(relative) if isinstance(relative, str) and relative else None
    return path is not None and not path.is_absolute() and ".." not in path.parts


def _size_and_checksum(path: Path) -> tuple[int, int]:
    checksum, size = 0, 0
    try:
        with path.open("rb") as file:
            while block := file.read(_READ):
                checksum, size = zlib.crc32(block, checksum), size + len(block)
    except FileNotFoundError:
        return _ABSENT, 0
    except OSError as err:
        raise NotDoneError(f"{path} cannot be read: {err}") from err
    return size, checksum
