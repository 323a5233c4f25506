"""TIFF in the forms that microscopes write: one file, one file with a series per plane, a folder.

1. Read the headers: which pages make up the volume, and are they all there.
2. Uncompressed planes are mapped where they lie; of anything else a chunked copy is to be made.
3. The voxel size comes from OME or ImageJ metadata, or from the mesoSPIM sidecar.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile

from braincensus.errors import BraincensusError, InputError, explain
from braincensus.formats import mesospim
from braincensus.formats.checks import (
    USUAL_AXES,
    check_chunk,
    check_index,
    check_volume,
    choose_axes,
    is_voxel_size,
    um_per,
)
from braincensus.formats.convert import Progress
from braincensus.formats.ome_zarr import natural_key
from braincensus.formats.readers import (
    FlatReader,
    Found,
    PlanesReader,
    ReadPlanes,
    ToCopy,
    UncopiedReader,
    Voxels,
    VoxelSize,
    dtype_as_read,
    need_bytes,
)
from braincensus_kernels.boxes import Triple

EXTENSIONS = (".tif", ".tiff", ".btf", ".tf2", ".tf8")
_THREADS = 4
_WHY_COPY = "planes are compressed or tiled"


def open_tiff(path: Path, *, channel: int, timepoint: int, level: int) -> Found:
    """Find the volume in one TIFF file.

    Raises
    ------
    InputError
        If it is not a volume, or is truncated or damaged.
    ConfigError
        If the channel, time point or level does not exist.
    """
    with _opened(path) as (tif, images):
        series, number, notes = _the_series(images, path, level)
        _check_all_here(tif, number, images[number], path)
        names, axes_notes = _axis_names(series)
        dtype = series.dtype.newbyteorder(tif.byteorder)
        check_volume(series.shape, series.dtype, what=str(path))
        axes = choose_axes(names, series.shape, channel=channel, timepoint=timepoint, what=str(path))
        shape = axes.zyx(series.shape)
        kind, voxel_size, missing = _metadata_of(tif, number)
        identity = _identity(path, channel, timepoint, level, shape, dtype)
        stamp = str(identity["mtime_ns"])
        found = Found(
            format=kind,
            reader=UncopiedReader(str(path)),  # unless one of those below can do it
            shape=shape,
            dtype=dtype_as_read(dtype),
            chunks=(1, 1, shape[2]),
            voxel_size=voxel_size,
            identity=identity,
            notes=notes + axes_notes,
            missing_scale=missing,
        )
        full_shape = axes.zyx(images[number].shape)
        if level:
            z, y, x = (f / n for f, n in zip(full_shape, shape, strict=True))
            found = replace(found, downsampling=(z, y, x))
        offset = series.dataoffset
        if offset is not None and not isinstance(series, _PlanePerPage):
            need_bytes(path, offset + prod(series.shape) * dtype.itemsize)
            reader: Any = FlatReader(
                path=str(path.resolve()),
                offset=offset,
                shape=tuple(series.shape),
                dtype=dtype.str,
                axes=axes,
                stamp=stamp,
            )
            found = replace(found, reader=reader)
        else:
            pages = _pages_of_volume(series, names, axes.select, axes.order, path)
            if all(_is_mapped(page) for page in pages):
                reader = PlanesReader.of(
                    folder=str(path.parent.resolve()),
                    names=[path.name],
                    offsets=[int(page.dataoffsets[0]) for page in pages],
                    plane_shape=shape[1:],
                    dtype=dtype,
                    stamp=stamp,
                )
                found = replace(found, reader=reader)
            else:

                @contextmanager
                def open_again() -> Iterator[ReadPlanes]:
                    with _opened(path) as (tif, images):
                        series = _the_series(images, path, level)[0]
                        pages = _pages_of_volume(series, names, axes.select, axes.order, path)
                        yield _page_reader(tif, pages, path, shape, found.dtype)

                check_chunk((1, *shape[1:]), dtype, what=f"{path}, whose planes are decoded whole")
                copy = ToCopy(name=path.stem, beside=path.parent, why=_WHY_COPY, open_planes=open_again)
                found = replace(found, to_copy=copy)
    return mesospim.add_sidecar(found, path, full_shape)


def open_planes(
    folder: Path, *, channel: int, timepoint: int, level: int, progress: Progress | None, skip: bool = False
) -> Found:
    """Find the volume in a folder of TIFF planes, in natural order of their names.

    With `skip`, planes whose header cannot be read, or that are cut short, are there but unreadable.

    Raises
    ------
    InputError
        If planes differ, several images are mixed, or a file is truncated or damaged.
    """
    names = plane_names(folder)
    if len(names) == 1:
        found = open_tiff(folder / names[0], channel=channel, timepoint=timepoint, level=level)
        return replace(found, notes=(f"the one TIFF in the folder, {names[0]}", *found.notes))
    for word, index in (("channel", channel), ("timepoint", timepoint), ("level", level)):
        check_index(index, 1, word=word, what=str(folder))
    _check_one_image(folder, names)
    planes = _read_headers(folder, names, progress, skip=skip)
    whole = next((i for i, plane in enumerate(planes) if plane.dtype is not None), None)
    if whole is None:
        raise _damaged(folder / names[0], "no plane of the folder can be read")
    first = planes[whole]
    assert first.dtype is not None
    planes = [
        plane if plane.dtype is not None else replace(plane, shape=first.shape, dtype=first.dtype)
        for plane in planes
    ]
    for name, plane in zip(names, planes, strict=True):
        if (plane.shape, plane.dtype) != (first.shape, first.dtype):
            raise InputError(
                explain(
                    f"the planes in {folder} differ",
                    expected=f"{first.shape} {first.dtype}, as {names[whole]}",
                    found=f"{plane.shape} {plane.dtype} in {name}",
                    cause="two acquisitions in one folder, or an interrupted one",
                    remedy="keep one stack per folder",
                )
            )
    shape = (len(names), *first.shape)
    check_volume(shape, first.dtype, what=str(folder))
    listing = hashlib.sha256()
    for name, plane in zip(names, planes, strict=True):
        listing.update(f"{name} {plane.size} {plane.mtime_ns};".encode())
    identity = {
        "path": str(folder.resolve()),
        "channel": channel,
        "timepoint": timepoint,
        "level": level,
        "shape": list(shape),
        "dtype": first.dtype.str,
        "bytes": prod(shape) * first.dtype.itemsize,
        "fingerprint": listing.hexdigest()[:32],
    }
    with _opened(folder / names[whole]) as (tif, _):
        kind, voxel_size, missing = _metadata_of(tif, 0)
    found = Found(
        format=f"folder of {len(names)} {kind} planes",
        reader=UncopiedReader(str(folder)),  # unless planes can be mapped
        shape=shape,
        dtype=dtype_as_read(first.dtype),
        chunks=(1, 1, shape[2]),
        voxel_size=voxel_size,
        identity=identity,
        notes=_gaps(names),
        missing_scale=missing,
    )
    if all(plane.offset is not None for plane in planes):
        reader = PlanesReader.of(
            folder=str(folder.resolve()),
            names=names,
            offsets=[plane.offset or 0 for plane in planes],
            plane_shape=first.shape,
            dtype=first.dtype,
            stamp=str(identity["fingerprint"]),
        )
        found = replace(found, reader=reader)
    else:
        read_planes = _file_reader(folder, names, shape, found.dtype)
        check_chunk((1, *first.shape), first.dtype, what=f"{folder}, whose planes are decoded whole")
        copy = ToCopy(
            name=folder.stem,
            beside=folder.parent,
            why=_WHY_COPY,
            open_planes=lambda: nullcontext(read_planes),
        )
        found = replace(found, to_copy=copy)
    return mesospim.add_sidecar(found, folder, shape)


def plane_names(folder: Path) -> list[str]:
    """List the TIFF files of a folder in natural order, without maximum projections."""
    names = [
        entry.name
        for entry in folder.iterdir()
        if entry.suffix.lower() in EXTENSIONS and not entry.name.startswith(("MAX_", ".")) and entry.is_file()
    ]
    return sorted(names, key=natural_key)


# ---------------------------------------------------------------------------------------------
# 1. headers


class _Listener(logging.Handler):
    """Collects what tifffile logs in this thread; it reports damage in its log, not as errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.thread = threading.get_ident()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread:
            self.messages.append(record.getMessage())


_DAMAGE = re.compile(
    r"corrupted|invalid (page )?offset|missing data (offset|ByteCounts)|truncated|incorrect Strip", re.I
)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, list[Any]]]:
    """Open a TIFF file and list its images; damage, raised or logged, becomes an InputError."""
    listener = _Listener()
    log = logging.getLogger("tifffile")
    log.addHandler(listener)
    try:
        with tifffile.TiffFile(path, _multifile=False) as tif:
            images = _images(tif)
            damage = [m for m in listener.messages if _DAMAGE.search(m)]
            if damage:
                raise _damaged(path, re.sub(r"^<tifffile[^>]*> ", "", damage[0]))
            if not images:
                raise _damaged(path, "no image in it")
            yield tif, images
    except (BraincensusError, MemoryError):
        raise
    except Exception as err:
        raise _damaged(path, f"{type(err).__name__}: {err}") from err
    finally:
        log.removeHandler(listener)


def _damaged(path: str | Path, found: str) -> InputError:
    return InputError(
        explain(
            f"cannot read the TIFF file {path}",
            found=found,
            cause="a file that was cut short or damaged while it was written or copied, or that is no TIFF",
            remedy="copy the file again from the original",
        )
    )


class _PlanePerPage:
    """All pages of a file, one after the other along z, whatever images the file says they are."""

    def __init__(self, pages: Sequence[Any]) -> None:
        self.pages = pages
        self.shape = (len(pages), pages[0].imagelength, pages[0].imagewidth)
        self.axes = "ZYX"
        self.dtype = pages[0].dtype
        self.dataoffset = None
        self.levels = [self]
        self.name = ""


def _images(tif: Any) -> list[Any]:
    """List the images of a file: its series, unless they are the planes of one volume.

    mesoSPIM's big TIFF writer makes each plane an image of its own. tifffile takes time
    quadratic in the number of images, so that case is looked for first.
    """
    first = tif.pages[0]
    if first.is_shaped and not tif.is_ome and len(tif.pages) > 1 and tif.pages[1].is_shaped:
        pages = list(tif.pages)
        if all(
            page.shape == first.shape and page.dtype == first.dtype and page.ndim == 2 and _is_own_image(page)
            for page in pages
        ):
            return [_PlanePerPage(pages)]
    return list(tif.series)


def _is_own_image(page: Any) -> bool:
    """Whether tifffile's description says that this page alone is an image."""
    description = page.shaped_description
    if not description or not description.startswith("{"):
        return False
    stated: list[int] = json.loads(description)["shape"]
    return bool(prod(stated) == prod(page.shape))


def _the_series(every: Sequence[Any], path: Path, level: int) -> tuple[Any, int, tuple[str, ...]]:
    """Choose the pages that are the volume; return them, the number of their image, and notes."""
    volumes = [s for s in every if len(s.shape) >= 3 and "S" not in s.axes] or every
    if len(volumes) > 1:
        raise InputError(
            explain(
                f"{path} holds {len(volumes)} images, not one volume",
                expected="one image",
                found=", ".join(f"{s.name} {s.axes} {s.shape}".strip() for s in volumes[:10]),
                remedy="save the one to analyse as its own file",
            )
        )
    series = volumes[0]
    number = next(i for i, s in enumerate(every) if s is series)
    check_index(level, len(series.levels), word="level", what=str(path))
    notes = (f"image {number} of {len(every)} used, the only stack",) if len(every) > 1 else ()
    return series.levels[level], number, notes


def _axis_names(series: Any) -> tuple[list[str], tuple[str, ...]]:
    """Name the axes; an axis that the file leaves unnamed is z."""
    letters = list(series.axes)
    if "S" in letters and series.shape[letters.index("S")] > 1:
        raise InputError(
            explain(
                "a colour (RGB) TIFF is not a volume of intensities",
                expected="one sample per pixel",
                found=f"axes {series.axes}, shape {series.shape}",
                cause="a rendering, or a last axis that was taken for colours",
                remedy="export the channel to analyse as greyscale",
            )
        )
    unnamed = [i for i, letter in enumerate(letters) if letter not in "TCZYXS" and series.shape[i] > 1]
    if len(letters) == 3 and letters[0] == "T":
        return ["z", "y", "x"], ("the file calls its planes time points; taken as z",)
    usual = USUAL_AXES.get(len(unnamed) + 2, "")
    if not usual or any(letter in "TCZ" and len(unnamed) > 1 for letter in letters) or "Z" in letters:
        return [letter.lower() for letter in letters], ()
    for i, name in zip(unnamed, usual, strict=False):
        letters[i] = name
    notes = (f"axes not named in the file; taken as {usual}",) if len(unnamed) > 1 else ()
    return [letter.lower() for letter in letters], notes


def _pages_of_volume(
    series: Any, names: Sequence[str], select: Sequence[int | None], order: Triple, path: Path
) -> list[Any]:
    """List the page of each plane of the selected volume, and check that its data is there."""
    lead = tuple(series.shape[:-2])
    if tuple(names[-2:]) != ("y", "x") or len(series.pages) != prod(lead):
        raise InputError(
            explain(
                f"{path}: its pages are not the planes of a volume",
                expected=f"{prod(lead)} pages of one plane each, for axes {''.join(names)}",
                found=f"{len(series.pages)} pages",
                cause="an interrupted acquisition, or a layout that is not supported",
                remedy="save it again as ImageJ TIFF or OME-Zarr",
            )
        )
    numbers = np.arange(prod(lead)).reshape(lead)[tuple(slice(None) if s is None else s for s in select[:-2])]
    every = list(series.pages)
    pages = [every[i] for i in numbers.ravel()]
    size = path.stat().st_size
    for z, page in enumerate(pages):
        if page is None:
            raise InputError(
                explain(
                    f"{path}, plane {z}: not in this file",
                    cause="an image spread over several files, or an interrupted acquisition",
                    remedy="merge the files, or give the folder if each holds one plane",
                )
            )
        ends = [int(o) + int(n) for o, n in zip(page.dataoffsets, page.databytecounts, strict=False)]
        if not ends or min(page.databytecounts) == 0 or max(ends) > size:
            need_bytes(path, max(ends, default=0), plane=z)
            raise _damaged(path, f"plane {z} has no data")
    return pages


def _is_mapped(page: Any) -> bool:
    """Whether the plane lies in the file as it will lie in memory."""
    n = int(sum(page.databytecounts))
    return bool(page.is_final and page.dtype.kind != "b" and n >= page.nbytes and _is_one_run(page))


def _is_one_run(page: Any) -> bool:
    ends = np.cumsum(page.databytecounts[:-1]) + page.dataoffsets[0]
    return bool(np.array_equal(ends, page.dataoffsets[1:]))


@dataclass(frozen=True)
class _Plane:
    """What one file of a folder says of its plane.

    Without an offset it must be decoded; without a dtype it is damaged.
    """

    shape: tuple[int, int]
    dtype: np.dtype[Any] | None
    offset: int | None
    size: int
    mtime_ns: int


_NOWHERE = 2**60
"""Offset of a plane that cannot be read: behind the end of any file."""


def _read_headers(
    folder: Path, names: Sequence[str], progress: Progress | None, *, skip: bool
) -> list[_Plane]:
    def header(name: str) -> _Plane:
        try:
            return whole_header(name)
        except InputError:
            if not skip:
                raise
            status = (folder / name).stat()
            return _Plane((0, 0), None, _NOWHERE, status.st_size, status.st_mtime_ns)

    def whole_header(name: str) -> _Plane:
        path = folder / name
        with _opened(path) as (tif, images):
            if len(tif.pages) != 1:
                raise InputError(
                    explain(
                        f"{folder} holds {len(names)} TIFF files of which {name} has {len(tif.pages)} planes",
                        expected="one plane in each file, or one file",
                        found=", ".join(names[:5]) + (" ..." if len(names) > 5 else ""),
                        cause="a folder of tiles or channels",
                        remedy=f"give one file, for example {path}",
                    )
                )
            page = tif.pages[0]
            _axis_names(images[0])
            status = path.stat()
            ends = [int(o) + int(n) for o, n in zip(page.dataoffsets, page.databytecounts, strict=False)]
            need_bytes(path, max(ends, default=0))
            return _Plane(
                shape=(page.imagelength, page.imagewidth),
                dtype=page.dtype.newbyteorder(tif.byteorder),
                offset=int(page.dataoffsets[0]) if _is_mapped(page) else None,
                size=status.st_size,
                mtime_ns=status.st_mtime_ns,
            )

    planes = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for i, plane in enumerate(pool.map(header, names)):
            planes.append(plane)
            if progress and (i % 100 == 99 or i + 1 == len(names)):
                progress("reading the headers of planes", i + 1, len(names))
    return planes


_CHANNEL_IN_NAME = re.compile(r"(?:^|[_\-. ])(?:ch|channel|c)[_ ]?(\d+)(?=[_\-. ]|$)", re.I)


def _check_one_image(folder: Path, names: Sequence[str]) -> None:
    """Refuse a folder whose names speak of several channels or tiles: they would be interleaved."""
    for part in ("tile", "channel", "shutter", "rotation"):
        values = {mesospim.parse_name(name).get(part) for name in names}
        if part == "channel" and values == {None}:
            values = {m[1] if (m := _CHANNEL_IN_NAME.search(Path(name).stem)) else None for name in names}
        if len(values) > 1 and len(values) < len(names):
            raise InputError(
                explain(
                    f"the file names in {folder} speak of several {part}s",
                    expected="the planes of one volume",
                    found=f"{part} " + ", ".join(sorted(str(v) for v in values)),
                    remedy="keep one stack per folder",
                )
            )


def _gaps(names: Sequence[str]) -> tuple[str, ...]:
    """Say which plane numbers are missing, if the names end in a running number."""
    numbers = [int(found[-1]) for name in names if (found := re.findall(r"\d+", Path(name).stem))]
    if len(numbers) != len(names) or sorted(set(numbers)) != numbers:
        return ()
    steps = np.diff(numbers)
    step = int(np.min(steps)) if len(steps) else 1
    missing = [n for a, b in pairwise(numbers) for n in range(a + step, b, step)]
    if not missing or len(missing) > len(names):
        return ()
    shown = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
    return (f"plane numbers missing: {len(missing)} ({shown}); their neighbours are taken as adjacent",)


# ---------------------------------------------------------------------------------------------
# 2. planes for the copy


def _page_reader(
    tif: Any, pages: Sequence[Any], path: Path, shape: Triple, dtype: np.dtype[Any]
) -> ReadPlanes:
    """Decode planes of one file, several at a time."""
    tif.filehandle.set_lock(True)
    return _read_with(lambda z: pages[z].asarray(), shape, dtype, lambda z: f"{path}, plane {z}")


def _file_reader(folder: Path, names: Sequence[str], shape: Triple, dtype: np.dtype[Any]) -> ReadPlanes:
    """Decode planes that are one file each, several at a time."""
    return _read_with(
        lambda z: tifffile.imread(folder / names[z]), shape, dtype, lambda z: str(folder / names[z])
    )


def _read_with(
    decode: Callable[[int], Any], shape: Triple, dtype: np.dtype[Any], name: Callable[[int], str]
) -> ReadPlanes:
    def read_planes(start: int, stop: int) -> Voxels:
        slab = np.empty((stop - start, *shape[1:]), dtype=dtype)

        def read(z: int) -> None:
            try:
                plane = decode(z)
            except Exception as err:
                raise _damaged(name(z), f"{type(err).__name__}: {err}") from err
            if plane.shape != slab.shape[1:]:
                raise _damaged(name(z), f"shape {plane.shape} where {slab.shape[1:]} is expected")
            slab[z - start] = plane

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(read, range(start, stop)))
        return slab

    return read_planes


# ---------------------------------------------------------------------------------------------
# 3. metadata


def _metadata_of(tif: Any, number: int) -> tuple[str, VoxelSize | None, str]:
    """Return the kind of TIFF, its voxel size if it has one, and what is missing if not."""
    if tif.is_ome:
        voxel_size, missing = _from_ome(tif.ome_metadata, number)
        return "OME-TIFF", voxel_size, missing
    if tif.is_imagej:
        voxel_size, missing = _from_imagej(tif.imagej_metadata or {}, tif.pages[0])
        return "TIFF (ImageJ)", voxel_size, missing
    kind = "BigTIFF" if tif.is_bigtiff else "TIFF"
    return kind, None, "a TIFF without OME or ImageJ metadata"


def _ome_pixels(xml: str, image: int) -> Mapping[str, str]:
    """Return the attributes of an image's Pixels element; empty if there is none."""
    try:
        pixels = [e for e in ElementTree.fromstring(xml).iter() if e.tag.rpartition("}")[2] == "Pixels"]
    except ElementTree.ParseError:
        return {}
    return pixels[min(image, len(pixels) - 1)].attrib if pixels else {}


def _check_all_here(tif: Any, number: int, image: Any, path: Path) -> None:
    """Refuse a file that holds only some of the planes that its OME metadata describes."""
    described = _ome_pixels(tif.ome_metadata, number) if tif.is_ome else {}
    sizes = [described.get(f"Size{axis}", "") for axis in "ZCT"]
    if not all(size.isdigit() for size in sizes):
        return
    claimed, here = prod(int(size) for size in sizes), prod(image.shape[:-2])
    if here < claimed:
        raise InputError(
            explain(
                f"{path} holds only part of an image",
                expected=f"the {claimed} planes that its OME metadata describes",
                found=f"{here} planes",
                cause="an image spread over several files, or an interrupted acquisition",
                remedy="merge the files, or give the folder if each file holds one plane",
            )
        )


def _from_ome(xml: str, image: int) -> tuple[VoxelSize | None, str]:
    attributes = _ome_pixels(xml, image)
    try:
        sizes = [
            float(attributes[f"PhysicalSize{a}"])
            * (um_per(attributes.get(f"PhysicalSize{a}Unit", "µm")) or np.nan)
            for a in "ZYX"
        ]
    except KeyError as err:
        return None, f"OME metadata without {err.args[0]}"
    except ValueError as err:
        return None, f"OME metadata that cannot be read ({err})"
    if not is_voxel_size(sizes):
        return None, "OME metadata with sizes or units that are not lengths"
    return VoxelSize((sizes[0], sizes[1], sizes[2]), "OME metadata"), ""


def _from_imagej(metadata: dict[str, Any], page: Any) -> tuple[VoxelSize | None, str]:
    unit = um_per(metadata.get("unit"))
    if unit is None:
        return None, f"ImageJ metadata without a unit of length (unit: {metadata.get('unit', 'none')})"
    if "spacing" not in metadata:
        return None, "ImageJ metadata without the spacing of planes"
    try:
        per_pixel = [page.tags[name].value for name in ("YResolution", "XResolution")]
        y, x = (denominator / numerator for numerator, denominator in per_pixel)
        sizes = (abs(float(metadata["spacing"])) * unit, y * unit, x * unit)
    except (KeyError, ValueError, TypeError, ZeroDivisionError):
        return None, "ImageJ metadata without a pixel size"
    if not is_voxel_size(sizes):
        return None, f"ImageJ metadata with an impossible voxel size, {sizes}"
    return VoxelSize(sizes, "ImageJ metadata"), ""


def _identity(
    path: Path, channel: int, timepoint: int, level: int, shape: Triple, dtype: np.dtype[Any]
) -> dict[str, Any]:
    status = path.stat()
    return {
        "path": str(path.resolve()),
        "channel": channel,
        "timepoint": timepoint,
        "level": level,
        "shape": list(shape),
        "dtype": dtype.str,
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }
