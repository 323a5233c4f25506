"""Patches through a device one after another, so that reading, copying and computing overlap.

    reading thread    | read 2          | read 3          | read 4
    copying in        |        2 ->     |        3 ->     |
    computing         | 1               | 2               | 3
    copying out       |                 | -> 1            | -> 2

`ReadAhead` is the first row, and all that a CPU needs. `Lanes` is the rest: on CUDA three streams, two sets
of pinned buffers that are reused, and one CUDA graph of the network, captured once for each patch shape. The
order of the work is the same on every device, and every device runs the same code (on the CPU streams and
events do nothing), so it is tested without a GPU. Nothing here changes a number: a graph replays the kernels
that it recorded.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")

PATCHES_AT_ONCE = 2
"""Patches of one caller that are in memory at a time: one in work, one being read or ready."""

BUFFERS = 2
"""Sets of pinned buffers of `Lanes`."""

_WARM_UPS = 2


class _End:
    """What the reading thread puts last: nothing more, or why not."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class ReadAhead(Generic[T]):
    """Read the next item in a thread of its own while the last one given is in use; never more than that one.

    Parameters
    ----------
    items
        Advanced in one thread, always the same.

    Notes
    -----
    An exception of `items` is raised where its item would have come. `close` waits for the item being read.

    Examples
    --------
    >>> with ReadAhead(n * n for n in range(4)) as squares:
    ...     list(squares)
    [0, 1, 4, 9]
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._items = items
        self._ready: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        self._room = threading.Semaphore(1)
        self._closed = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            source = iter(self._items)
            while True:
                self._room.acquire()
                if self._closed.is_set():
                    break
                try:
                    item = next(source)
                except StopIteration:
                    break
                self._ready.put(item)
                del item  # the receiver alone holds it
            if self._closed.is_set() and hasattr(source, "close"):
                source.close()
        except BaseException as error:  # whatever it is, the receiver must hear of it
            self._ready.put(_End(error))
        else:
            self._ready.put(_End(None))

    def __enter__(self) -> ReadAhead[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._over:
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, _End):
            self._over = True
            self._thread.join()
            if item.error is not None:
                raise item.error
            raise StopIteration
        self._room.release()
        return item

    @property
    def is_ready(self) -> bool:
        """Whether the next item, or the end, has been read."""
        return self._over or not self._ready.empty()

    def close(self) -> None:
        """Stop reading."""
        self._closed.set()
        self._room.release()
        self._thread.join()
        self._over = True


def predict_ahead(
    predict: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    patches: Iterable[NDArray[np.float32]],
    *,
    slot: AbstractContextManager[Any],
) -> Iterator[NDArray[np.float32]]:
    """Yield what `predict` gives of every patch, in order, and read the next one meanwhile.

    `slot` is held while predicting, and not while waiting for a patch.
    """
    with ReadAhead(patches) as ready:
        for patch in ready:
            with slot:
                result = predict(patch)
            del patch
            yield result
            del result


@dataclass
class _Buffers:
    host_in: Tensor
    device_in: Tensor
    device_out: Tensor
    host_out: Tensor
    copied_in: Any
    computed: Any
    copied_out: Any


class _NoEvent:
    """A CUDA event where all work is done when its call returns."""

    def record(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Lanes:
    """One device's way in, network, and way out; buffers and graph are those of the last patch's shape.

    Parameters
    ----------
    compute
        From a tensor (1, 1, z, y, x) on the device to the core (z, y, x), float32.
    halo_voxels
        By how much the core is smaller than the patch, on each side.
    device
        As torch names it.
    graph
        Whether to capture `compute` as a CUDA graph: what it does must then depend on the shape alone.
    buffers
        Sets of pinned buffers; with one, nothing overlaps.
    """

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        *,
        halo_voxels: int,
        device: str,
        graph: bool,
        buffers: int = BUFFERS,
    ) -> None:
        self._n_buffers = buffers
        self._compute, self._halo, self._device = compute, halo_voxels, torch.device(device)
        self._cuda = self._device.type == "cuda"
        self._lock = threading.Lock()
        self._shape: tuple[int, ...] = ()
        self._buffers: list[_Buffers] = []
        self._wants_graph = graph and self._cuda
        self._graph: torch.cuda.CUDAGraph | None = None
        with self._on_device():
            self._in, self._work, self._out = self._stream(), self._stream(), self._stream()

    def _stream(self) -> Any:
        return torch.cuda.Stream() if self._cuda else None  # type: ignore[no-untyped-call]

    def _event(self) -> Any:
        """Return what tells when work is done; who waits for it sleeps, and leaves the core to others."""
        return torch.cuda.Event(blocking=True) if self._cuda else _NoEvent()  # type: ignore[no-untyped-call]

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if self._cuda else nullcontext()

    def _lane(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream) if self._cuda else nullcontext()

    def _fit(self, shape: tuple[int, ...]) -> None:
        """Make buffers and graph for patches of this shape, in place of those of another."""
        self._graph, self._static_in, self._static_out = None, torch.empty(0), torch.empty(0)
        self._buffers, self._shape = [], ()
        with self._on_device(), torch.inference_mode():
            self._buffers = [self._make_buffers(shape) for _ in range(self._n_buffers)]
            if self._cuda:
                torch.cuda.synchronize()  # weights and buffers were made in another stream
            if self._wants_graph:
                self._capture(shape)
        self._shape = shape

    def _make_buffers(self, patch_shape: tuple[int, ...]) -> _Buffers:
        def host(shape: tuple[int, ...]) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, pin_memory=self._cuda)

        def device(shape: tuple[int, ...]) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=self._device)

        patch, core = (1, 1, *patch_shape), tuple(n - 2 * self._halo for n in patch_shape)
        events = [self._event() for _ in range(3)]
        return _Buffers(host(patch), device(patch), device(core), host(core), *events)

    def _capture(self, shape: tuple[int, ...]) -> None:
        """Record the network once: one launch then replays it, with its memory as it was laid out here."""
        self._static_in = torch.zeros((1, 1, *shape), dtype=torch.float32, device=self._device)
        torch.cuda.synchronize()
        with self._lane(self._work):
            for _ in range(_WARM_UPS):  # libraries choose their kernels and workspaces at the first calls
                self._compute(self._static_in)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on reading, and allocating, meanwhile.
        with torch.cuda.graph(graph, stream=self._work, capture_error_mode="thread_local"):
            self._static_out = self._compute(self._static_in)
        torch.cuda.synchronize()
        self._graph = graph

    def run(
        self, patches: ReadAhead[NDArray[np.float32]], slot: AbstractContextManager[Any]
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the core of every patch, in order.

        `slot` is held while patches are on their way; it is let go of while waiting for one to be read.
        """
        free, busy = deque[_Buffers](), deque[_Buffers]()
        with ExitStack() as turn:
            try:
                while True:
                    if busy and (not free or not patches.is_ready):
                        yield self._collect(busy, free)
                        continue
                    if not busy:
                        turn.close()
                    patch = next(patches, None)
                    if patch is None:
                        break
                    while busy and patch.shape != self._shape:
                        yield self._collect(busy, free)
                    if not busy:
                        turn.close()
                        turn.enter_context(slot)
                        turn.enter_context(self._lock)
                        if patch.shape != self._shape:
                            self._fit(patch.shape)
                        free = deque(self._buffers)
                    self._submit(patch, free, busy)
                    del patch
                while busy:
                    yield self._collect(busy, free)
            finally:
                while busy:  # the buffers are used again: nothing may still be under way
                    self._collect(busy, free)

    def _submit(self, patch: NDArray[np.float32], free: deque[_Buffers], busy: deque[_Buffers]) -> None:
        buffers = free.popleft()
        busy.append(buffers)
        with self._on_device(), torch.inference_mode():
            buffers.host_in.copy_(torch.from_numpy(np.ascontiguousarray(patch)))
            with self._lane(self._in):
                buffers.device_in.copy_(buffers.host_in, non_blocking=True)
                buffers.copied_in.record()
            with self._lane(self._work):
                buffers.copied_in.wait()
                if self._graph is None:
                    buffers.device_out.copy_(self._compute(buffers.device_in))
                else:
                    self._static_in.copy_(buffers.device_in)
                    self._graph.replay()
                    buffers.device_out.copy_(self._static_out)
                buffers.computed.record()
            with self._lane(self._out):
                buffers.computed.wait()
                buffers.host_out.copy_(buffers.device_out, non_blocking=True)
                buffers.copied_out.record()

    def _collect(self, busy: deque[_Buffers], free: deque[_Buffers]) -> NDArray[np.float32]:
        buffers = busy.popleft()
        buffers.copied_out.synchronize()
        free.append(buffers)
        result: NDArray[np.float32] = buffers.host_out.numpy().copy()
        return result
