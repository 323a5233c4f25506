"""Reading around what is damaged: its voxels count as 0, the same in every stage.

What is skipped is a unit of storage, a chunk or a plane, whole: which voxels are 0 does not depend on the
boxes in which a volume is read. The first pass over the volume finds the damaged units; from then on the list
is settled: what is on it is never looked at again (it might be readable the next time), and what is not must
be readable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from braincensus.errors import InputError
from braincensus.formats.readers import Reader, Voxels
from braincensus_kernels.boxes import Box, Triple


@dataclass(frozen=True)
class Unreadable:
    """A unit of storage that cannot be read: its voxels, and why; the reason names the file."""

    box: Box
    reason: str

    def summary(self) -> dict[str, Any]:
        """Give the provenance."""
        return {"start": list(self.box.start), "stop": list(self.box.stop), "reason": self.reason}


@dataclass(frozen=True)
class SkippingReader(Reader):
    """Reads what can be read of `inner`, and 0 elsewhere."""

    inner: Reader
    shape: Triple
    dtype: str  # as read
    known: tuple[Unreadable, ...] = ()
    settled: bool = False

    def read(self, box: Box) -> Voxels:
        """Read a box, with 0 where it cannot be read.

        Raises
        ------
        InputError
            If what is stored cannot be read in parts, or a part is damaged that is not on the settled list.
        """
        return self.read_noting(box)[0]

    def read_noting(self, box: Box) -> tuple[Voxels, tuple[Unreadable, ...]]:
        """Read a box; return also which units that it touches cannot be read."""
        hit = {bad.box: bad for bad in self.known if meet(bad.box, box)}
        failed: InputError | None = None
        if not hit:
            try:
                return self.inner.read(box), ()
            except InputError as err:
                if self.settled:
                    raise
                failed = err
        voxels = np.zeros(box.shape, dtype=self.dtype)
        for unit in self._units(box, failed):
            if unit in hit:
                continue
            part = unit.intersect(box)
            try:  # whole: a part of it might be readable where all of it is not
                voxels[part.slices_in(box)] = self.inner.read(unit)[part.slices_in(unit)]
            except InputError as err:
                if self.settled:
                    raise
                hit[unit] = Unreadable(unit, in_one_line(err))
        return voxels, tuple(hit[unit] for unit in sorted(hit))

    def _units(self, box: Box, failed: InputError | None) -> list[Box]:
        try:
            units = self.inner.units(box)
        except Exception as err:  # not a part of it: all of it
            raise failed or InputError(str(err)) from err
        if units is None:
            raise failed or InputError("stored as one unit, of which no part can be skipped")
        return [unit.clip(self.shape) for unit in units]

    def _read(self, box: Box) -> Voxels:
        return self.read(box)


def meet(a: Box, b: Box) -> bool:
    """Whether two boxes share a voxel."""
    return all(max(i, j) < min(k, m) for i, j, k, m in zip(a.start, b.start, a.stop, b.stop, strict=True))


def n_voxels(unreadable: Iterable[Unreadable]) -> int:
    """Count the voxels that count as 0; units do not overlap."""
    return sum(bad.box.size for bad in unreadable)


def unreadable_summary(unreadable: Sequence[Unreadable]) -> dict[str, Any]:
    """Give the provenance of the input."""
    return {
        "unreadable": [bad.summary() for bad in unreadable],
        "unreadable_voxels": n_voxels(unreadable),
    }


def unreadable_warning(about: Mapping[str, Any]) -> str:
    """Say for people what was skipped, from the provenance of the input."""
    units = about["unreadable"]
    parts = "1 part" if len(units) == 1 else f"{len(units):,} parts"
    return (
        f"WARNING: {parts} of the input could not be read: {about['unreadable_voxels']:,} voxels counted as "
        f"0. The first: {units[0]['reason']} (all in the provenance, input.unreadable). Cells there are "
        "missing; when the input is whole again, run with --fresh"
    )


def in_one_line(err: InputError) -> str:
    """Shorten an error to what was read and what was found."""
    lines = [line.strip() for line in str(err).splitlines()]
    return "; ".join([lines[0], *(line for line in lines[1:] if line.startswith("found: "))])
