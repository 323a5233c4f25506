"""Reading voxels: small picklable values that know where a volume is stored, and open it when asked.

Second half of every format: the format's own module finds out what is stored where and returns a
`Found`; the reader inside it travels to the workers. A worker opens files at its first read and
keeps them open, one handle per reader and process, shared by its threads.
"""

from __future__ import annotations

import threading
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from braincensus.errors import BraincensusError, InputError, explain
from braincensus.formats.expansion import check_expansion
from braincensus_kernels.boxes import Box, Triple

Voxels = npt.NDArray[Any]
TripleFloat = tuple[float, float, float]
T = TypeVar("T")
ReadPlanes = Callable[[int, int], Voxels]  # planes start:stop -> (stop - start, y, x)

_OPEN_AT_MOST = 16
_handles: OrderedDict[Reader, Any] = OrderedDict()
_handles_lock = threading.RLock()


@dataclass(frozen=True)
class VoxelSize:
    """A voxel size and where it comes from."""

    um: TripleFloat
    origin: str


@dataclass(frozen=True)
class ToCopy:
    """What a chunked copy is made from, where a source cannot be read block by block.

    It stays in the process that opened the source; workers get a reader of the copy.
    """

    name: str
    beside: Path | None  # the folder that the source is in
    why: str  # for people
    open_planes: Callable[[], AbstractContextManager[ReadPlanes]]


@dataclass(frozen=True)
class Found:
    """What a format found at a source: enough to build a `Volume`.

    `voxel_size` is that of the source at full resolution, `downsampling` how much coarser the
    selected pyramid level is; their product is the voxel size of the volume. Where the source
    names one level itself (the path of an array), a voxel size given by hand is that level's.
    """

    format: str
    reader: Reader
    shape: Triple
    dtype: np.dtype[Any]
    chunks: Triple
    voxel_size: VoxelSize | None
    identity: dict[str, Any]
    downsampling: TripleFloat = (1.0, 1.0, 1.0)
    notes: tuple[str, ...] = ()
    missing_scale: str = "no voxel size in its metadata"
    is_one_level: bool = False
    to_copy: ToCopy | None = None  # made last, by `open_volume`


@dataclass(frozen=True)
class Axes:
    """How the volume lies in a stored array: the index that selects it, and its axes' order.

    Examples
    --------
    >>> axes = Axes(select=(0, 1, None, None, None), order=(0, 1, 2))
    >>> axes.index(Box((0, 0, 0), (1, 2, 3)))
    (0, 1, slice(0, 1, None), slice(0, 2, None), slice(0, 3, None))
    """

    select: tuple[int | None, ...]  # per stored axis: a fixed index, or None for z, y and x
    order: Triple  # where z, y and x are among the axes left free

    def index(self, box: Box) -> tuple[int | slice, ...]:
        """Return the index of a box in the stored array."""
        by_position = dict(zip(self.order, box.slices, strict=True))
        free = iter(range(3))
        return tuple(by_position[next(free)] if s is None else s for s in self.select)

    def zyx(self, stored: tuple[T, ...]) -> tuple[T, T, T]:
        """Pick the three values of z, y, x out of one value per stored axis."""
        free = [v for v, s in zip(stored, self.select, strict=True) if s is None]
        return free[self.order[0]], free[self.order[1]], free[self.order[2]]

    def take(self, stored: Any, box: Box) -> Voxels:
        """Read a box, with its axes as zyx."""
        return np.asarray(stored[self.index(box)]).transpose(self.order)


ZYX = Axes(select=(None, None, None), order=(0, 1, 2))


class Reader(ABC):
    """Where voxels are stored and how to read a box of them; hashable, picklable, thread-safe."""

    def read(self, box: Box) -> Voxels:
        """Read a box: zyx, native byte order, C-contiguous; bool becomes uint8.

        Raises
        ------
        InputError
            If stored data is missing, truncated or corrupt.
        """
        try:
            return as_read(self._read(box))
        except (BraincensusError, MemoryError):
            raise
        except Exception as err:
            raise self._explain(box, err) from err

    @abstractmethod
    def _read(self, box: Box) -> Voxels:
        """Read a box in whatever byte order and layout is stored."""

    def units(self, box: Box) -> list[Box] | None:
        """List the units of storage that a box touches, each of which can be read or not, whole.

        None: all is one unit. They may leave the volume.
        """
        del box
        return None

    def _open(self) -> Any:
        """Open what `_read` needs; called once per process."""
        raise NotImplementedError

    def _explain(self, box: Box, err: Exception) -> InputError:
        return InputError(explain(f"cannot read voxels {where(box)}", found=f"{type(err).__name__}: {err}"))

    def _handle(self) -> Any:
        """Return this process's handle, opening it at first use."""
        with _handles_lock:
            if self in _handles:
                _handles.move_to_end(self)
            else:
                _handles[self] = self._open()
                while len(_handles) > _OPEN_AT_MOST:
                    _handles.popitem(last=False)
            return _handles[self]


@dataclass(frozen=True)
class PartReader(Reader):
    """A part of a volume, as a volume."""

    whole: Reader
    start: Triple

    def _read(self, box: Box) -> Voxels:
        return self.whole.read(box.shift(self.start))


def as_read(voxels: Voxels) -> Voxels:
    """Convert to what `Volume.read` promises: native byte order, C-contiguous, no bool."""
    return np.ascontiguousarray(voxels, dtype=dtype_as_read(voxels.dtype))


def _copied(voxels: Voxels) -> Voxels:
    """Detach from the mapped file or the caller's array: readers may write into what they get."""
    return np.array(voxels, dtype=dtype_as_read(voxels.dtype), order="C", copy=True)


def dtype_as_read(stored: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that reading gives for a stored dtype."""
    return np.dtype(np.uint8) if stored == np.bool_ else stored.newbyteorder("=")


def where(box: Box) -> str:
    """Write a box as people write it, for messages.

    Examples
    --------
    >>> where(Box((0, 0, 64), (64, 64, 128)))
    'z 0:64, y 0:64, x 64:128'
    """
    return ", ".join(f"{n} {a}:{b}" for n, a, b in zip("zyx", box.start, box.stop, strict=True))


# ---------------------------------------------------------------------------------------------
# zarr


class StrictStore(LocalStore):
    """A local store in which an incomplete file is an error.

    zarr reads a chunk that is not there as the fill value, by design; but it takes an *empty*
    file, or a shard cut short, for an absent chunk too, so that an interrupted copy would read
    as dark tissue. A chunk that would become larger than chunks are is an error before it is decoded.
    """

    outermost_codec: str = ""
    """Name of the codec of each chunk; empty: not looked into."""
    chunk_bytes: int = 0

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Read a file or part of it; an empty or short answer raises OSError."""
        return self._bounded(
            _complete(await super().get(key, prototype, byte_range), key, byte_range), key, byte_range
        )

    def get_sync(
        self,
        key: str,
        *,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Read without the event loop, under the same rule."""
        found = super().get_sync(key, prototype=prototype, byte_range=byte_range)
        return self._bounded(_complete(found, key, byte_range), key, byte_range)

    def _bounded(self, data: Buffer | None, key: str, byte_range: ByteRequest | None) -> Buffer | None:
        if data is not None and byte_range is None and self.outermost_codec and "zarr.json" not in key:
            check_expansion(
                data.as_numpy_array(), self.outermost_codec, chunk_bytes=self.chunk_bytes, key=key
            )
        return data


class FullStore(StrictStore):
    """A strict store in which an absent chunk is an error too: our own copies write every chunk."""

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Read a file or part of it; an absent chunk raises FileNotFoundError."""
        return _present(await super().get(key, prototype, byte_range), key)

    def get_sync(
        self,
        key: str,
        *,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Read without the event loop, under the same rule."""
        return _present(super().get_sync(key, prototype=prototype, byte_range=byte_range), key)


def _present(data: Buffer | None, key: str) -> Buffer | None:
    if data is None and key.startswith("c/"):
        raise FileNotFoundError(f"{key} is missing")
    return data


def _complete(data: Buffer | None, key: str, byte_range: ByteRequest | None) -> Buffer | None:
    if data is None:
        return None
    match byte_range:
        case RangeByteRequest(start=start, end=end):
            expected = end - start
        case SuffixByteRequest(suffix=suffix):
            expected = suffix
        case _:
            expected = 1
    if len(data) < expected:
        raise OSError(f"{key} is cut short: {len(data)} bytes where at least {expected} are needed")
    return data


@dataclass(frozen=True)
class ZarrReader(Reader):
    """An array in a zarr store on disk."""

    root: str
    array: str  # path inside the store; "" if the store is the array
    axes: Axes
    zarr_format: int
    stamp: str = ""  # changes when the store does, so that a stale handle is not reused
    all_chunks: bool = False  # whether every chunk was written, so that an absent one is damage

    def _open(self) -> Any:
        return open_zarr_array(self.root, self.array, self.zarr_format, all_chunks=self.all_chunks)

    def units(self, box: Box) -> list[Box] | None:
        """List the chunks that a box touches; those of a shard are read one by one."""
        return _chunks_of(box, self.axes.zyx(tuple(self._handle().chunks)))

    def _read(self, box: Box) -> Voxels:
        return self.axes.take(self._handle(), box)

    def _explain(self, box: Box, err: Exception) -> InputError:
        problem, found = f"cannot read voxels {where(box)} of {Path(self.root) / self.array}", err
        chunk_file = ""
        try:
            array = self._handle()
            stored = tuple(array.shards or array.chunks)
            for chunk in _chunks_of(box, self.axes.zyx(stored)):
                part = chunk.intersect(box)
                try:
                    self._read(part)
                except Exception as chunk_err:
                    found = chunk_err
                    index = self.axes.index(part)
                    at = [
                        (i if isinstance(i, int) else i.start) // n
                        for i, n in zip(index, stored, strict=True)
                    ]
                    chunk_file = f" in chunk file {array.metadata.encode_chunk_key(tuple(at))}"
                    break
        except Exception as open_err:
            found = open_err
        return InputError(
            explain(
                problem + chunk_file,
                found=f"{type(found).__name__}: {found}",
                cause="a file that was lost, cut short or damaged while it was written or copied",
                remedy=f"delete {self.root}; it is a copy and will be made again"
                if self.all_chunks
                else "copy that file again from the original; or count its voxels as 0: --on-unreadable skip "
                "(input.on_unreadable: skip)",
            )
        )


def _chunks_of(box: Box, chunk: Triple) -> list[Box]:
    """List the storage chunks that a box touches."""
    lo = [a // c for a, c in zip(box.start, chunk, strict=True)]
    hi = [-(-b // c) for b, c in zip(box.stop, chunk, strict=True)]
    start = [a * c for a, c in zip(lo, chunk, strict=True)]
    stop = [b * c for b, c in zip(hi, chunk, strict=True)]
    return list(Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])).tiles(chunk))


def open_zarr_array(root: str, array: str, zarr_format: int, *, all_chunks: bool = False) -> Any:
    """Open an array of a store on disk, read-only and strictly."""
    store = FullStore(root, read_only=True) if all_chunks else StrictStore(root, read_only=True)
    found = zarr.open_array(store=store, path=array, mode="r", zarr_format=3 if zarr_format == 3 else 2)
    if found.shards is None:
        store.chunk_bytes = prod(found.chunks) * found.dtype.itemsize
        store.outermost_codec = _outermost(found.compressors)
    return found


def _outermost(compressors: Sequence[Any]) -> str:
    """Return the name of the codec that was applied last, checksums apart, which are appended."""
    for codec in reversed(compressors):
        about = codec.to_dict() if hasattr(codec, "to_dict") else codec.get_config()
        name = str(about.get("name", about.get("id", "")))
        if name != "crc32c":
            return name
    return ""


# ---------------------------------------------------------------------------------------------
# flat files and planes


@dataclass(frozen=True)
class FlatReader(Reader):
    """One array stored as it lies in memory, in one file: `.npy`, or a contiguous TIFF stack."""

    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: str
    axes: Axes
    fortran: bool = False
    stamp: str = ""

    def _open(self) -> Any:
        return np.memmap(
            self.path,
            dtype=np.dtype(self.dtype),
            mode="r",
            offset=self.offset,
            shape=self.shape,
            order="F" if self.fortran else "C",
        )

    def _read(self, box: Box) -> Voxels:
        need_bytes(self.path, self.offset + prod(self.shape) * np.dtype(self.dtype).itemsize)
        return _copied(self.axes.take(self._handle(), box))


@dataclass(frozen=True)
class PlanesReader(Reader):
    """Uncompressed planes: in one file at given offsets, or one file each."""

    folder: str
    packed_names: bytes  # one file name, or one per plane
    packed_offsets: bytes  # one byte offset per plane
    plane_shape: tuple[int, int]
    dtype: str
    stamp: str = ""

    @classmethod
    def of(
        cls,
        *,
        folder: str,
        names: list[str],
        offsets: list[int],
        plane_shape: tuple[int, int],
        dtype: np.dtype[Any],
        stamp: str,
    ) -> PlanesReader:
        """Pack the lists, which are long and regular, so that sending the reader is cheap."""
        steps = np.diff(np.asarray(offsets, dtype=np.int64), prepend=0)
        return cls(
            folder=folder,
            packed_names=zlib.compress("\0".join(names).encode()),
            packed_offsets=zlib.compress(steps.tobytes()),
            plane_shape=plane_shape,
            dtype=dtype.str,
            stamp=stamp,
        )

    def units(self, box: Box) -> list[Box] | None:
        """List the planes that a box touches."""
        rows, columns = self.plane_shape
        return [Box((z, 0, 0), (z + 1, rows, columns)) for z in range(box.start[0], box.stop[0])]

    def _open(self) -> Any:
        names = zlib.decompress(self.packed_names).decode().split("\0")
        offsets = np.cumsum(np.frombuffer(zlib.decompress(self.packed_offsets), dtype=np.int64))
        return names, offsets

    def _read(self, box: Box) -> Voxels:
        names, offsets = self._handle()
        dtype = np.dtype(self.dtype)
        rows, columns = box.slices[1:]
        n_bytes = prod(self.plane_shape) * dtype.itemsize
        out = np.empty(box.shape, dtype=dtype.newbyteorder("="))
        for i, z in enumerate(range(box.start[0], box.stop[0])):
            path, offset = Path(self.folder) / names[z if len(names) > 1 else 0], int(offsets[z])
            need_bytes(path, offset + n_bytes, plane=z)
            out[i] = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=self.plane_shape)[
                rows, columns
            ]
        return out


def need_bytes(path: str | Path, n_bytes: int, *, plane: int | None = None) -> int:
    """Return a file's size, or refuse one that is shorter than its own metadata says.

    Reading mapped memory beyond the end of a file would kill the process.

    Raises
    ------
    InputError
        If the file is missing or shorter than `n_bytes`.
    """
    at = "" if plane is None else f", plane {plane}"
    try:
        size = Path(path).stat().st_size
    except OSError as err:
        raise InputError(explain(f"cannot read {path}{at}", found=f"{type(err).__name__}: {err}")) from err
    if size < n_bytes:
        raise InputError(
            explain(
                f"{path}{at}: the file is truncated",
                expected=f"at least {n_bytes:,} bytes",
                found=f"{size:,} bytes",
                cause="an acquisition or a copy that was interrupted",
                remedy="copy the file again from the original"
                + (
                    ""
                    if plane is None
                    else "; or count its voxels as 0: --on-unreadable skip (input.on_unreadable: skip)"
                ),
            )
        )
    return size


# ---------------------------------------------------------------------------------------------
# memory


@dataclass(frozen=True)
class MemoryReader(Reader):
    """An array held in memory, or a zarr array in a store that is not on disk."""

    array: Any = field(repr=False, compare=False)
    axes: Axes
    stamp: str = ""

    def _read(self, box: Box) -> Voxels:
        return _copied(self.axes.take(self.array, box))


# ---------------------------------------------------------------------------------------------
# not yet


@dataclass(frozen=True)
class UncopiedReader(Reader):
    """Stands for the chunked copy of a source that was only looked at: refuses to read."""

    source: str

    def _read(self, box: Box) -> Voxels:
        raise InputError(
            explain(
                f"cannot read voxels {where(box)} of {self.source}",
                expected="a chunked copy of it, because it cannot be read block by block",
                found="a volume that was opened with copy=False, which makes none",
                remedy="open it with copy=True",
            )
        )
