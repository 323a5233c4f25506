"""Reading: from anything that holds a volume to one value that workers read blocks of.

First stage of the flow. `open_volume` looks at what the source is, lets the format's module in
`formats/` find the voxels, and settles the voxel size. Only then is a chunked copy made, where one
is needed. The `Volume` that it returns is small and picklable, and each worker opens the files for
itself.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr

from braincensus.errors import ConfigError, InputError, explain
from braincensus.formats import arrays, ome_zarr, phantom, tiff
from braincensus.formats.checks import as_voxel_size
from braincensus.formats.convert import Progress, describe_copy, make_copy
from braincensus.formats.readers import Found, Reader, TripleFloat, UncopiedReader, Voxels
from braincensus.formats.skipping import SkippingReader, Unreadable
from braincensus_kernels.boxes import Box, Triple
from braincensus_kernels.phantom import Phantom

_USUAL_UM = (0.01, 1000.0)  # beyond these, a unit was probably mistaken
_SUPPORTED = "OME-Zarr or zarr (a folder), TIFF (.tif .tiff .btf .tf2 .tf8), a folder of TIFF planes, or .npy"
_NOT_SUPPORTED = {
    ".json": "a metadata file; give the folder that it is in",
    ".h5": "HDF5 (mesoSPIM's BigDataViewer files among them)",
    ".hdf5": "HDF5",
    ".ims": "Imaris",
    ".n5": "N5",
    ".raw": "raw bytes, which do not say their shape",
    ".xml": "a BigDataViewer project",
    ".czi": "Zeiss CZI",
    ".lif": "Leica LIF",
    ".nd2": "Nikon ND2",
    ".nii": "NIfTI",
    ".gz": "gzip",
    ".nrrd": "NRRD",
    ".mrc": "MRC",
    ".klb": "KLB",
    ".zip": "a zip archive",
}


@dataclass(frozen=True)
class Volume:
    """A volume of voxels, axes ``zyx``, that can be read box by box from any process or thread.

    Attributes
    ----------
    source
        Path of what was opened, or ``"array"``.
    format
        What it is, for people: ``"OME-Zarr 0.5"``, ``"TIFF (ImageJ)"``.
    shape
        Voxels along z, y, x.
    dtype
        As read: native byte order; boolean voxels read as uint8 0 and 1.
    chunks
        What storage reads at once, in voxels along z, y, x; of the copy, where one is needed.
    voxel_size_um
        Along z, y, x, in um.
    voxel_size_from
        Where that comes from.
    notes
        What was assumed, to show to the user.
    identity
        What a resumed run compares; JSON-able. Without the voxel size, on which voxels do not depend.
    """

    source: str
    format: str
    shape: Triple
    dtype: np.dtype[Any]
    chunks: Triple
    voxel_size_um: TripleFloat
    voxel_size_from: str
    notes: tuple[str, ...]
    identity: dict[str, Any] = field(hash=False)
    reader: Reader = field(repr=False, compare=False)

    @property
    def n_bytes(self) -> int:
        """Size of all voxels in memory."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def needs_copy(self) -> bool:
        """Whether a chunked copy is needed that ``copy=False`` left out; of `n_bytes` at most."""
        return isinstance(self.reader, UncopiedReader)

    @property
    def box(self) -> Box:
        """The whole volume."""
        return Box.whole(self.shape)

    def read(self, box: Box) -> Voxels:
        """Read the voxels of a box.

        Parameters
        ----------
        box
            Inside the volume.

        Returns
        -------
        ndarray
            Of shape `box.shape` and dtype `dtype`, C-contiguous.

        Raises
        ------
        InputError
            If stored data is missing, truncated or corrupt; names the file and the voxels. A zarr
            chunk that is absent is no error: it holds the fill value, by design of the format.
            Also if the volume `needs_copy`.
        ValueError
            If the box reaches outside the volume.

        Examples
        --------
        >>> volume = open_volume(np.arange(24).reshape(2, 3, 4), voxel_size_um=1.0)
        >>> volume.read(Box((1, 0, 0), (2, 1, 4)))
        array([[[12, 13, 14, 15]]])
        """
        if not self.box.contains(box):
            raise ValueError(f"{box} reaches outside the volume of shape {self.shape}")
        if box.size == 0:
            return np.empty(box.shape, dtype=self.dtype)
        return self.reader.read(box)

    @property
    def skips(self) -> bool:
        """Whether damaged chunks and planes count as 0 (``on_unreadable="skip"``)."""
        return isinstance(self.reader, SkippingReader)

    def read_noting(self, box: Box) -> tuple[Voxels, tuple[Unreadable, ...]]:
        """Read the voxels of a box; say also which of the units that it touches cannot be read.

        Raises
        ------
        InputError
            As `read`; where the volume skips, only if no part can be skipped.
        """
        if not isinstance(self.reader, SkippingReader):
            return self.read(box), ()
        return self.reader.read_noting(box)

    def settled(self, unreadable: tuple[Unreadable, ...]) -> Volume:
        """Return the volume with a list of what cannot be read: that is 0, all else must be readable."""
        if not isinstance(self.reader, SkippingReader):
            return self
        return replace(self, reader=replace(self.reader, known=unreadable, settled=True))

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        """Tell Dask that equal identities are equal volumes, without hashing voxels."""
        return type(self).__qualname__, self.identity


def open_volume(
    source: Any,
    *,
    channel: int = 0,
    timepoint: int = 0,
    level: int = 0,
    voxel_size_um: TripleFloat | float | None = None,
    scratch: str | Path | None = None,
    progress: Progress | None = None,
    copy: bool = True,
    on_unreadable: Literal["fail", "skip"] = "fail",
) -> Volume:
    """Open a volume, whatever it is stored as.

    Parameters
    ----------
    source
        Path of an OME-Zarr image (0.4 or 0.5), a mesoSPIM tile, a zarr array, a TIFF file, a folder
        of TIFF planes, a ``.npy`` file or a ``.phantom.json``; or a NumPy or zarr array (3D zyx, 4D czyx,
        5D tczyx), or a `Phantom`, whose voxels are made when read.
    channel, timepoint, level
        Which channel, time point and pyramid level, counted from 0.
    voxel_size_um
        Along z, y, x in um, at full resolution (level 0), or of the array itself if `source` is an
        array or the path of one. Overrides the metadata; needed where there is none.
    scratch
        Folder for chunked copies of what cannot be read block-wise (compressed TIFF, NumPy arrays);
        every worker must reach it. Without it, compressed TIFF is copied to
        ``$BRAINCENSUS_SCRATCH``, or to ``.braincensus-scratch`` beside the source, and NumPy arrays
        are not copied.
    progress
        Called as ``progress(what, done, total)`` while something takes long: headers are counted in
        files, a copy in voxels, first with those that an interrupted copy has already.
    copy
        Whether to make the chunked copy that such a source needs, as the last step. Without it
        nothing is written: the volume is described as if from its copy, but cannot be read.
    on_unreadable
        ``skip``: voxels of damaged chunks and planes are 0. Not in ``.npy`` and TIFF stacks that are one run
        of bytes, which have no parts.

    Raises
    ------
    InputError
        If there is no volume at the source, it is damaged, or nothing says its voxel size.
    ConfigError
        If an argument is of the wrong kind, or the channel, time point or level does not exist.
    PlanError, OutputError
        If a chunked copy is needed and does not fit or cannot be written.

    Examples
    --------
    >>> volume = open_volume(np.zeros((64, 128, 128), np.uint16), voxel_size_um=(5, 2, 2))
    >>> volume.shape, volume.voxel_size_um
    ((64, 128, 128), (5.0, 2.0, 2.0))
    """
    given = None if voxel_size_um is None else as_voxel_size(voxel_size_um)
    for word, value in (("channel", channel), ("timepoint", timepoint), ("level", level)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
            raise ConfigError(explain(f"not a {word}", expected="a number from 0", found=repr(value)))
    folder = None if scratch is None else Path(scratch)
    name, found = _find(
        source,
        channel=int(channel),
        timepoint=int(timepoint),
        level=int(level),
        copy_array=folder is not None,
        progress=progress,
        skip=on_unreadable == "skip",
    )
    size, origin = _settle_voxel_size(name, found, given)
    # Last, because it can take hours: by now, nothing else can be refused.
    if found.to_copy and copy:
        found = make_copy(
            found, found.to_copy, scratch=folder, progress=progress, skip=on_unreadable == "skip"
        )
    elif found.to_copy:
        found = describe_copy(found, found.to_copy)
    if on_unreadable == "skip" and not isinstance(found.reader, SkippingReader | UncopiedReader):
        found = replace(found, reader=SkippingReader(found.reader, found.shape, found.dtype.str))
    notes = found.notes
    if found.dtype == np.uint8 and np.dtype(found.identity["dtype"]) == np.bool_:
        notes += ("boolean voxels, read as 0 and 1",)
    if not all(_USUAL_UM[0] <= v <= _USUAL_UM[1] for v in size):
        notes += (f"a voxel of {', '.join(f'{v:g}' for v in size)} um is unusual: check its unit",)
    return Volume(
        source=name,
        format=found.format,
        shape=found.shape,
        dtype=found.dtype,
        chunks=found.chunks,
        voxel_size_um=size,
        voxel_size_from=origin,
        notes=notes,
        identity=found.identity,
        reader=found.reader,
    )


def _find(
    source: Any,
    *,
    channel: int,
    timepoint: int,
    level: int,
    copy_array: bool,
    progress: Progress | None,
    skip: bool,
) -> tuple[str, Found]:
    """Let the right format find the voxels; return the name of the source with it."""
    if isinstance(source, zarr.Array | zarr.Group):
        on_disk = arrays.path_of(source)
        if on_disk is not None:
            source = on_disk
    if isinstance(source, np.ndarray | zarr.Array):
        return "array", arrays.open_array(
            source, channel=channel, timepoint=timepoint, level=level, with_copy=copy_array
        )
    if isinstance(source, Phantom):
        return "phantom", phantom.open_phantom(source, channel=channel, timepoint=timepoint, level=level)
    if not isinstance(source, str | Path):
        raise ConfigError(
            explain(
                "not a source of voxels",
                expected="a path, a NumPy array or a zarr array",
                found=type(source).__name__,
                remedy="store Dask arrays as zarr first"
                if type(source).__module__.startswith("dask")
                else "",
            )
        )
    if "://" in str(source):
        raise InputError(
            explain(
                f"{source} is an address, not a path",
                expected="a path on a file system that every worker can reach",
                remedy="copy or mount it, or open it with zarr and pass the array",
            )
        )
    path = Path(source).expanduser()
    if not path.exists():
        raise _missing(path)
    if path.is_dir():
        found = _find_in_folder(
            path, channel=channel, timepoint=timepoint, level=level, progress=progress, skip=skip
        )
    elif path.name.lower().endswith(phantom.ENDING):
        found = phantom.open_phantom(path, channel=channel, timepoint=timepoint, level=level)
    elif path.suffix.lower() in tiff.EXTENSIONS:
        found = tiff.open_tiff(path, channel=channel, timepoint=timepoint, level=level)
    elif path.suffix.lower() == ".npy":
        found = arrays.open_npy(path, channel=channel, timepoint=timepoint, level=level)
    else:
        raise _unknown(path)
    return str(path), found


def _find_in_folder(
    path: Path, *, channel: int, timepoint: int, level: int, progress: Progress | None, skip: bool
) -> Found:
    if ome_zarr.is_zarr(path):
        return ome_zarr.open_ome_zarr(path, channel=channel, timepoint=timepoint, level=level)
    if tiff.plane_names(path):
        return tiff.open_planes(
            path, channel=channel, timepoint=timepoint, level=level, progress=progress, skip=skip
        )
    if path.suffix.lower() in _NOT_SUPPORTED:
        raise _unknown(path)
    inside = sorted(child.name for child in path.iterdir())
    stores = [name for name in inside if ome_zarr.is_zarr(path / name)]
    raise InputError(
        explain(
            f"no volume in the folder {path}",
            expected=_SUPPORTED,
            found=", ".join((stores or inside)[:20]) or "an empty folder",
            cause="a zarr store whose metadata file was not copied" if path.suffix == ".zarr" else "",
            remedy=f"give one of them, for example {path / stores[0]}" if stores else "",
        )
    )


def _settle_voxel_size(name: str, found: Found, given: TripleFloat | None) -> tuple[TripleFloat, str]:
    if given is not None and found.is_one_level:
        return given, "given"
    if given is None and found.voxel_size is None:
        raise InputError(
            explain(
                f"no voxel size for {name}",
                expected="a voxel size in its OME or ImageJ metadata, or a mesoSPIM _meta.txt beside it",
                found=found.missing_scale,
                remedy="give it in um: --voxel-size Z,Y,X or voxel_size_um=(z, y, x)",
            )
        )
    base, origin = (given, "given") if given else (found.voxel_size.um, found.voxel_size.origin)  # type: ignore[union-attr]
    factors = found.downsampling
    if factors != (1.0, 1.0, 1.0):
        origin += f" at full resolution, times {', '.join(f'{f:g}' for f in factors)} for this level"
    z, y, x = (b * f for b, f in zip(base, factors, strict=True))
    return (z, y, x), origin


def _missing(path: Path) -> InputError:
    """Say which part of a path does not exist, and what there is that is called something like it."""
    gone = path
    while not gone.parent.exists() and gone.parent != gone:
        gone = gone.parent
    try:
        there = [child.name for child in gone.parent.iterdir()]
    except OSError:
        there = []
    lower = {name.lower(): name for name in there}
    close = difflib.get_close_matches(gone.name.lower(), lower, n=3, cutoff=0.5)
    return InputError(
        explain(
            f"{path} does not exist",
            found=f"no {gone.name!r} in {gone.parent}",
            remedy=f"did you mean {' or '.join(repr(lower[name]) for name in close)}?"
            if close
            else "check the path",
        )
    )


def _unknown(path: Path) -> InputError:
    known = _NOT_SUPPORTED.get(path.suffix.lower())
    return InputError(
        explain(
            f"{path} is not a format that can be read",
            expected=_SUPPORTED,
            found=known or f"a file with extension {path.suffix!r}",
            remedy="convert it to OME-Zarr or TIFF" if known else "",
        )
    )
