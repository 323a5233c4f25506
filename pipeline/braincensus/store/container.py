"""The life of an output: begun (marked incomplete), written by many tasks, finished in one last step.

The root's attributes are the only judge. ``braincensus.status`` is written first, as ``incomplete``;
the ``ome`` attributes, without which no viewer sees an image, are written last, in the same move that
sets ``complete``. A run that dies in between leaves nothing that looks finished.
"""

from __future__ import annotations

import os
import shutil
import threading
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import zarr

from braincensus.errors import OutputError, explain
from braincensus.store import arrays, ome_metadata
from braincensus.store.files import (
    PARTIAL,
    jsonable,
    read_arrays,
    remove_folder,
    unreadable,
    write_arrays,
    write_npy,
    writing,
)
from braincensus.store.ome_metadata import TripleFloat
from braincensus.store.places import absolute, check_free
from braincensus.store.pyramids import PyramidLevel
from braincensus.store.root import KEY, RESERVED, progress, recorded_at, root_attributes, write_group
from braincensus.store.tables import BLOCKS, CELLS, part_files
from braincensus_kernels.boxes import Box, Triple

LABELS, DENSITY, WORK = "labels/cells", "density", "braincensus"
_GROUPS = ("labels", LABELS, DENSITY, "tables", CELLS, BLOCKS, WORK)
_LAYOUT = 1

_writing_root = threading.Lock()


@dataclass(frozen=True)
class Output:
    """A handle on an output: small, picklable, with nothing open. Workers and client share its path.

    Attributes
    ----------
    path
        The OME-Zarr, absolute.
    voxel_size_um
        Of full resolution, zyx.
    token
        Names this output among all that were ever at this path.
    """

    path: Path
    voxel_size_um: TripleFloat
    token: str

    # Voxels

    def create_array(
        self,
        name: str,
        *,
        shape: Triple,
        dtype: Any,
        chunk: Triple,
        shard: Triple | None,
        fill_value: Any = 0,
    ) -> None:
        """Create an array, for example ``labels/cells/0``; see `chunk_and_shard`.

        One of the same shape, dtype and shards that exists is kept as it is.

        Raises
        ------
        OutputError
            If another array is there, or nothing can be written.
        """
        arrays.create(
            self.path, name, shape=shape, dtype=dtype, chunk=chunk, shard=shard, fill_value=fill_value
        )

    def array(self, name: str, mode: str = "r") -> zarr.Array[Any]:
        """Open an array, ``r`` or ``r+``; `write_block` is the safe way to write."""
        return arrays.open_array(self.path, name, mode=mode)

    def write_block(self, name: str, box: Box, values: np.ndarray) -> None:
        """Write the voxels of a box that covers whole shards (or ends at the border).

        Different boxes may be written at once from any thread, process or node.

        Raises
        ------
        ValueError, TypeError
            If the box cuts a shard, or the values do not fit it or the array's dtype without loss.
        OutputError
            If the disk is full or the place cannot be written.
        """
        self._check_mine()
        arrays.write(self.path, name, box, values)

    def read_block(self, name: str, box: Box) -> np.ndarray:
        """Read the voxels of a box; what was never written is the array's fill value.

        Raises
        ------
        OutputError
            If a shard is damaged; names its file.
        """
        return arrays.read(self.path, name, box)

    # Working files, one per block

    @property
    def work_dir(self) -> Path:
        """Folder of the run's working files."""
        return self.path / WORK

    def write_work(self, name: str, columns: Mapping[str, np.ndarray]) -> None:
        """Write named arrays as a working file, for example ``partials/0000012``; whole or not at all."""
        self._check_mine()
        write_arrays(self._work(name, ".safetensors"), columns)

    def read_work(self, name: str) -> dict[str, np.ndarray]:
        """Read a working file.

        Raises
        ------
        OutputError
            If it is missing or damaged; names the file.
        """
        return read_arrays(self._work(name, ".safetensors"))

    def write_map(self, name: str, values: np.ndarray) -> None:
        """Write one array as a working file that `map_work` can map (``<name>.npy``)."""
        self._check_mine()
        write_npy(self._work(name, ".npy"), values)

    def map_work(self, name: str) -> np.ndarray:
        """Map an array that `write_map` wrote: only the pages that are looked at are read."""
        path = self._work(name, ".npy")
        try:
            mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError:  # a file without values cannot be mapped
            try:
                mapped = np.load(path, allow_pickle=False)
            except (ValueError, EOFError) as err:
                raise unreadable(path, err) from err
            if mapped.size:
                raise unreadable(path, EOFError("the file ends too early")) from None
        except (OSError, EOFError) as err:
            raise unreadable(path, err) from err
        return mapped

    def remove_work(self, *names: str) -> None:
        """Remove working files, folders or arrays by their names in `work_dir`; absent ones are fine."""
        for name in names:
            place = self._work(name, "")
            if place.is_dir() and not place.is_symlink():
                # A network file system keeps a file that a worker still maps; what stays does no harm.
                remove_folder(place, ignore_errors=True)
            else:
                place.unlink(missing_ok=True)

    def _work(self, name: str, ending: str) -> Path:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts:
            raise ValueError(f"a working file is named by a path inside the output, not {name!r}")
        return self.work_dir.joinpath(*parts[:-1], parts[-1] + ending)

    def remove_levels(self, group: str) -> None:
        """Remove all levels of an image: of the root (``""``) or of ``labels/cells``."""
        place = self.path / group
        for entry in list(place.iterdir()) if place.is_dir() else ():
            if entry.name.isdigit():
                _remove(entry)

    def remove_parts(self, *names: str) -> None:
        """Remove folders of tables or arrays that a stage wrote, by their names in the output."""
        for name in names:
            if (self.path / name).exists():
                _remove(self.path / name)

    # Provenance and status

    @property
    def provenance(self) -> dict[str, Any]:
        """Everything recorded about the run: our key of the root's attributes."""
        attributes = root_attributes(self.path) or {}
        provenance: dict[str, Any] = attributes.get(KEY, {})
        return provenance

    @property
    def status(self) -> str:
        """``incomplete`` or ``complete``."""
        return str(self.provenance.get("status", "missing"))

    def update_provenance(self, changes: Mapping[str, Any]) -> None:
        """Add entries to the provenance, replacing those of the same name; whole or not at all.

        Only the process that runs the census may call it (threads may). NumPy values, tuples and paths
        are written as JSON; NaN and infinity become null.

        Raises
        ------
        OutputError
            If it cannot be written, or another run has replaced this output.
        """
        taken = [name for name in changes if name in RESERVED]
        if taken:
            raise ValueError(f"the provenance keeps {', '.join(taken)} for itself")
        self._rewrite_root(changes, ome=None)

    def _check_mine(self) -> None:
        """Refuse to write into what has become the output of another run.

        A task whose client died may go on, or hang and wake up; by then another run may have begun here,
        with other settings.
        """
        recorded = (root_attributes(self.path) or {}).get(KEY, {})
        if recorded.get("token") != self.token:
            raise self._replaced()

    def _replaced(self) -> OutputError:
        return OutputError(
            explain(
                f"{self.path} is no longer the output of this run",
                cause="another run has replaced it, or it was removed",
                remedy="give every run its own output",
            )
        )

    def _rewrite_root(self, changes: Mapping[str, Any], *, ome: Mapping[str, Any] | None) -> None:
        with _writing_root:
            attributes = root_attributes(self.path) or {}
            recorded = attributes.get(KEY, {})
            if recorded.get("token") != self.token:
                raise self._replaced()
            attributes[KEY] = {**recorded, **jsonable(changes)}
            if ome is not None:
                attributes = {"ome": jsonable(ome), **attributes}
            write_group(self.path, attributes)

    def finalise(self, *, levels: Sequence[PyramidLevel], density_bin_um: TripleFloat) -> None:
        """Make the output whole: check that its parts are there, write all attributes, the root's last.

        Parameters
        ----------
        levels
            Levels of the probability and of the labels, full resolution first, as planned.
        density_bin_um
            Spacing of the density map.

        Raises
        ------
        OutputError
            If an array or a part of a table is missing, or nothing can be written; the output then stays
            incomplete.
        """
        if not levels:
            raise ValueError("an image has at least one level")
        self._check_parts(levels)
        _remove_partials(self.path)
        grids = [(level.scale_um, level.translation_um) for level in levels]
        density_grid = [(density_bin_um, ome_metadata.grid_origin_um(density_bin_um, self.voxel_size_um))]
        density_top = float(np.max(self.array(f"{DENSITY}/0")[...], initial=0.0)) or 1.0
        name = self.path.name.removesuffix(".zarr").removesuffix(".ome")
        density = ome_metadata.image(
            name, density_grid, how=None, label="cells per mm^3", color="FFFFFF", top=density_top
        )
        probability = ome_metadata.image(
            name, grids, how="mean", label="foreground probability", color="00FF00", top=65535.0
        )
        inner: list[tuple[str, dict[str, Any]]] = [
            (LABELS, {"ome": ome_metadata.label_image("cells", grids)}),
            (DENSITY, {"ome": density}),
            (CELLS, ome_metadata.feature_table("cells")),
            (BLOCKS, ome_metadata.generic_table("block")),
            ("labels", {"ome": ome_metadata.label_list(["cells"])}),
            ("tables", {"tables": ["cells", "blocks"]}),
        ]
        for group, attributes in inner:
            write_group(self.path / group, jsonable(attributes))
        self._rewrite_root({"status": "complete"}, ome=probability)

    def _check_parts(self, levels: Sequence[PyramidLevel]) -> None:
        for number, level in enumerate(levels):
            for name in (str(number), f"{LABELS}/{number}"):
                found = self.array(name).shape
                if found != tuple(level.shape):
                    raise OutputError(
                        explain(
                            f"{self.path / name} does not have the planned shape",
                            expected=str(tuple(level.shape)),
                            found=str(found),
                            remedy="start over with --fresh (fresh=True)",
                        )
                    )
        self.array(f"{DENSITY}/0")
        part_files(self.path, CELLS)
        part_files(self.path, BLOCKS)


def create_output(
    path: str | os.PathLike[str],
    *,
    overwrite: bool,
    voxel_size_um: TripleFloat,
    protect: Iterable[str | os.PathLike[str]] = (),
) -> Output:
    """Begin an output, marked incomplete from its first file on.

    Parameters
    ----------
    path
        The OME-Zarr to write; missing parent folders are made.
    overwrite
        Remove an earlier output of braincensus that is there; nothing else is ever removed.
    voxel_size_um
        Of full resolution, zyx.
    protect
        Paths that must survive, such as the input: an output that contains one is not removed.

    Raises
    ------
    OutputError
        If something is there that may not be removed, or nothing can be written there.
    """
    check_free(path, overwrite=overwrite, protect=protect)
    place = absolute(path)
    output = Output(place, voxel_size_um, uuid.uuid4().hex)
    begun = {
        "status": "incomplete",
        "token": output.token,
        "layout": _LAYOUT,
        "voxel_size_um": list(voxel_size_um),
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
        write_group(place, {KEY: begun})  # before anything goes: a removal that dies is no finished output
        for entry in place.iterdir():
            if entry.name != "zarr.json":
                _remove(entry)
        for group in _GROUPS:
            write_group(place / group, {})
    return output


def reopen_output(output: Output, *, voxel_size_um: TripleFloat) -> Output:
    """Go on with an output that was begun or finished, marked incomplete from now on.

    Parameters
    ----------
    output
        What the earlier run left.
    voxel_size_um
        Of full resolution, zyx; it may be another one now.

    Returns
    -------
    Output
        Under a new token: what an earlier run still does with the old one is noticed.

    Raises
    ------
    OutputError
        If nothing can be written there.
    """
    _refuse_links(output.path)
    attributes = root_attributes(output.path) or {}
    recorded = attributes.get(KEY, {})
    again = Output(output.path, voxel_size_um, uuid.uuid4().hex)
    begun = {"status": "incomplete", "token": again.token, "voxel_size_um": list(voxel_size_um)}
    with writing(output.path):
        # Without the `ome` attributes no viewer takes it for an image until it is whole again.
        write_group(output.path, {KEY: {**recorded, **begun}})
        for group in _GROUPS:
            if not (output.path / group / "zarr.json").is_file():
                write_group(output.path / group, {})
    return again


def _refuse_links(place: Path) -> None:
    """Refuse an output in which a folder is a link: what is written or removed would be elsewhere."""
    for folder, folders, _ in os.walk(place):
        for name in folders:
            if (Path(folder) / name).is_symlink():
                raise OutputError(
                    explain(
                        f"{Path(folder) / name} is a link",
                        expected="an output whose folders are its own",
                        found=f"a link to {os.readlink(Path(folder) / name)}",
                        remedy="put the folder itself there, or start over with --fresh (fresh=True)",
                    )
                )
        folders[:] = [name for name in folders if name not in ("c", "done")]  # files of voxels, and marks


def open_output(path: str | os.PathLike[str], *, allow_incomplete: bool = False) -> Output:
    """Open an output.

    Parameters
    ----------
    path
        The OME-Zarr.
    allow_incomplete
        Open one whose run did not finish, too.

    Raises
    ------
    OutputError
        If there is none, it is something else, or its run did not finish.
    """
    place = absolute(path)
    if not place.exists():
        raise OutputError(explain(f"there is no output at {place}", remedy="check the path"))
    recorded = recorded_at(place)
    if recorded is None:
        raise OutputError(
            explain(
                f"{place} is not an output of braincensus",
                expected=f"an OME-Zarr with `{KEY}` among its attributes",
                found="a file" if place.is_file() else "a folder without them",
                cause="the path of the input, or of a group inside an output",
                remedy="give the folder that `braincensus run` wrote",
            )
        )
    try:
        z, y, x = (float(size) for size in recorded["voxel_size_um"])
        output = Output(place, (z, y, x), str(recorded["token"]))
    except (KeyError, TypeError, ValueError) as err:
        raise unreadable(place / "zarr.json", err) from err
    if recorded.get("status") != "complete" and not allow_incomplete:
        raise OutputError(
            explain(
                f"the run that writes {place} has not finished",
                found=progress(recorded),
                cause="it is still running, or it was interrupted or failed",
                remedy="wait for it, or run again: it goes on where it stopped; "
                "open_output(path, allow_incomplete=True) shows what is there",
            )
        )
    return output


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        remove_folder(entry)
    else:
        entry.unlink()


def _remove_partials(place: Path) -> None:
    """Remove what killed writers and removers left; nothing reads it."""
    for leftover in list(place.rglob(f"*{PARTIAL}")):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
