"""3x3x3 convolution in float32 with a quarter of the multiplications, for CPUs (Winograd, F(4x4, 3x3)).

Direct convolution is bound by multiplications: at 64 channels and more it runs at nine tenths of what the
processor can multiply, so only fewer multiplications make it faster. Along y and x, 4 outputs of 3 taps need
6 products instead of 12, so a tile of 4 x 4 outputs needs 36 instead of 144; z stays direct:

    6 x 6 inputs --into--> 36 numbers
    each of the 36: [tiles, 3 planes x channels] @ weights
    36 products --out of--> 4 x 4 outputs

The sums on the way in and out are linear and known (Lavin and Gray 2016; points 0, 1, -1, 2, -2, infinity).
In exact arithmetic nothing changes. In float32 the rounding error is about 3 times that of a direct
convolution (2e-5 against 7e-6 on outputs of 1), 100 times less than bfloat16's. Weights are transformed in
float64. A voxel's rounding depends on its place in its tile, and tiles begin where the patch does.

The products are torch's batched matrix product, the sums compiled loops over 16 channels at a time. Some
tiles of `_PLANES` planes are transformed at a time, so that they stay in the processor's caches; threads take
them one after another, each multiplying on its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

LEAST_CHANNELS, MOST_CHANNELS = 32, 256
"""Where it pays: with fewer channels the sums, with more the weights' memory, cost what the products save."""

_LANES = np.uint64(16)
_WIDTH = 16
_PLANES = 8
_TILES_TIMES_CHANNELS = 8192

ROOM_BYTES = 4 * 36 * (_PLANES + 2 + 2) * _TILES_TIMES_CHANNELS
"""Working memory that each thread keeps, at most."""

_U = (
    np.uint64
)  # indices without a sign: numba then need not look for negative ones, and the loops are vectors

_WEIGHTS_IN = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)

Floats = NDArray[np.float32]


def pays(weight: Tensor) -> bool:
    """Tell whether a convolution of this weight (out, in, z, y, x) is faster this way on a CPU."""
    outputs, inputs = weight.shape[:2]
    return (
        tuple(weight.shape[2:]) == (3, 3, 3)
        and outputs % _WIDTH == inputs % _WIDTH == 0
        and min(outputs, inputs) >= LEAST_CHANNELS
        and max(outputs, inputs) <= MOST_CHANNELS
    )


def transform(weight: Tensor) -> Tensor:
    """Transform the weight (out, in, 3, 3, 3) to (36, 3 x in, out), float32."""
    along = torch.tensor(_WEIGHTS_IN, dtype=torch.float64)
    transformed = torch.einsum("oizyx,ay,bx->abzio", weight.double().cpu(), along, along)
    return transformed.reshape(36, 3 * weight.shape[1], weight.shape[0]).float().contiguous()


@dataclass(frozen=True)
class Winograd:
    """A convolution without padding, made ready: bias and clamp of each output channel included.

    Attributes
    ----------
    weight
        From `transform`.
    bias, low, high
        float32; -infinity and infinity where nothing is clamped.
    """

    weight: Tensor
    bias: Floats
    low: Floats
    high: Floats

    def __call__(self, x: Tensor) -> Tensor:
        """Return the result, channels-last, of float32 features (1, in, z, y, x) on the CPU."""
        return _convolve(x, self.weight, self.bias, self.low, self.high)


def _convolve(x: Tensor, weight: Tensor, bias: Floats, low: Floats, high: Floats) -> Tensor:
    if x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    inputs, outputs = x.shape[1], weight.shape[2]
    z, y, x_ = (n - 2 for n in x.shape[2:])
    result = torch.empty((1, outputs, z, y, x_), memory_format=torch.channels_last_3d)
    source, extents, strides = _flat(x)
    target = result[0].permute(1, 2, 3, 0).numpy()
    across = -(-x_ // 4)
    tiles = across * -(-y // 4)

    def chunk(place: tuple[int, int]) -> None:
        plane, tile = place
        planes, count = min(_PLANES, z - plane), min(step, tiles - tile)
        columns = _room("columns", 36, count, planes + 2, inputs)
        products = _room("products", 36, count, outputs)
        _into(source, extents, strides, plane, tile, across, columns.numpy())
        for k in range(planes):
            torch.bmm(columns[:, :, k : k + 3].flatten(2), weight, out=products)
            _out_of(products.numpy(), target, plane + k, tile, across, bias, low, high)

    step = _TILES_TIMES_CHANNELS // inputs
    places = list(product(range(0, z, _PLANES), range(0, tiles, step)))
    _share(chunk, places)
    return result


def _flat(x: Tensor) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """Memory from the first to the last value, extents, and strides, of channels-last features."""
    extents = np.array(x.shape[2:], dtype=np.int64)
    strides = np.array(x.stride()[2:], dtype=np.int64)
    last = int(((extents - 1) * strides).sum())
    return x.as_strided((last + x.shape[1],), (1,)).numpy(), extents, strides


def _share(work: Callable[[Any], None], places: Sequence[Any]) -> None:
    """Do the work at every place, by as many threads as torch uses."""
    threads = min(torch.get_num_threads(), len(places))
    for _ in map(work, places) if threads == 1 else _helpers(threads).map(work, places):
        pass


_rooms = threading.local()


def _room(name: str, *shape: int) -> Tensor:
    """Return working memory of this thread, as it was left: new pages cost more than the sums."""
    held = getattr(_rooms, name, None)
    if held is None or held.numel() < prod(shape):
        held = torch.empty(prod(shape))
        setattr(_rooms, name, held)
    return held[: prod(shape)].view(shape)


@cache
def _helpers(threads: int) -> ThreadPoolExecutor:
    """Return threads that multiply on their own: chunk by chunk, all waiting for none."""
    started = threading.Barrier(threads + 1)

    def start() -> None:
        torch.set_num_threads(1)  # of this thread, and of those to come, which is put right below
        started.wait()

    helpers = ThreadPoolExecutor(threads, thread_name_prefix="winograd", initializer=start)
    for _ in range(threads):
        helpers.submit(int)
    started.wait()
    torch.set_num_threads(threads)
    return helpers


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})  # type: ignore[untyped-decorator]
def _into(
    source: Floats,
    extents: NDArray[np.int64],
    strides: NDArray[np.int64],
    plane: int,
    tile: int,
    across: int,
    columns: Floats,
) -> None:
    """Take 6 x 6 inputs of every tile of the chunk, in all its planes, to 36 numbers each.

    Beyond the edge the last inputs are repeated: what is computed of them is not kept.
    """
    _, y_end, x_end = extents
    z_step, y_step, x_step = strides
    _, tiles, planes, channels = columns.shape
    target = columns.reshape(-1)
    half = np.empty(36 * _WIDTH, np.float32)
    whole = np.empty(36 * _WIDTH, np.float32)
    for t in range(tiles):
        y, x = 4 * ((tile + t) // across), 4 * ((tile + t) % across)
        for z in range(planes):
            for channel in range(0, channels, _WIDTH):
                for j in range(6):
                    base = (plane + z) * z_step + min(x + j, x_end - 1) * x_step + channel
                    i0 = _U(base + min(y, y_end - 1) * y_step)
                    i1 = _U(base + min(y + 1, y_end - 1) * y_step)
                    i2 = _U(base + min(y + 2, y_end - 1) * y_step)
                    i3 = _U(base + min(y + 3, y_end - 1) * y_step)
                    i4 = _U(base + min(y + 4, y_end - 1) * y_step)
                    i5 = _U(base + min(y + 5, y_end - 1) * y_step)
                    o = _U(j * 6 * _WIDTH)
                    for c in range(_LANES):
                        d0, d1, d2 = source[i0 + c], source[i1 + c], source[i2 + c]
                        d3, d4, d5 = source[i3 + c], source[i4 + c], source[i5 + c]
                        p = d4 - np.float32(4) * d2
                        q = d3 - np.float32(4) * d1
                        r = d4 - d2
                        s = np.float32(2) * (d3 - d1)
                        half[o + c] = np.float32(4) * d0 - np.float32(5) * d2 + d4
                        half[o + _U(16) + c] = p + q
                        half[o + _U(32) + c] = p - q
                        half[o + _U(48) + c] = r + s
                        half[o + _U(64) + c] = r - s
                        half[o + _U(80) + c] = np.float32(4) * d1 - np.float32(5) * d3 + d5
                for i in range(6):
                    o, w = _U(i * _WIDTH), _U(i * 6 * _WIDTH)
                    for c in range(_LANES):
                        d0, d1, d2 = half[o + c], half[o + _U(96) + c], half[o + _U(192) + c]
                        d3, d4, d5 = half[o + _U(288) + c], half[o + _U(384) + c], half[o + _U(480) + c]
                        p = d4 - np.float32(4) * d2
                        q = d3 - np.float32(4) * d1
                        r = d4 - d2
                        s = np.float32(2) * (d3 - d1)
                        whole[w + c] = np.float32(4) * d0 - np.float32(5) * d2 + d4
                        whole[w + _U(16) + c] = p + q
                        whole[w + _U(32) + c] = p - q
                        whole[w + _U(48) + c] = r + s
                        whole[w + _U(64) + c] = r - s
                        whole[w + _U(80) + c] = np.float32(4) * d1 - np.float32(5) * d3 + d5
                for k in range(36):
                    o, w = _U(((k * tiles + t) * planes + z) * channels + channel), _U(k * _WIDTH)
                    for c in range(_LANES):
                        target[o + c] = whole[w + c]


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})  # type: ignore[untyped-decorator]
def _out_of(
    products: Floats,
    result: Floats,
    plane: int,
    tile: int,
    across: int,
    bias: Floats,
    low: Floats,
    high: Floats,
) -> None:
    """Take the 36 products of every tile of the chunk to 4 x 4 outputs, biased and clamped."""
    _, tiles, channels = products.shape
    _, y_end, x_end, _ = result.shape
    source, target = products.reshape(-1), result.reshape(-1)
    taken = np.empty(36 * _WIDTH, np.float32)
    half = np.empty(24 * _WIDTH, np.float32)
    whole = np.empty(16 * _WIDTH, np.float32)
    for t in range(tiles):
        y, x = 4 * ((tile + t) // across), 4 * ((tile + t) % across)
        for channel in range(0, channels, _WIDTH):
            b = _U(channel)
            for k in range(36):
                o, w = _U((k * tiles + t) * channels + channel), _U(k * _WIDTH)
                for c in range(_LANES):
                    taken[w + c] = source[o + c]
            for i in range(6):
                o, w = _U(i * 6 * _WIDTH), _U(i * 4 * _WIDTH)
                for c in range(_LANES):
                    m0, m5 = taken[o + c], taken[o + _U(80) + c]
                    p = taken[o + _U(16) + c] + taken[o + _U(32) + c]
                    q = taken[o + _U(16) + c] - taken[o + _U(32) + c]
                    r = taken[o + _U(48) + c] + taken[o + _U(64) + c]
                    s = taken[o + _U(48) + c] - taken[o + _U(64) + c]
                    half[w + c] = m0 + p + r
                    half[w + _U(16) + c] = q + np.float32(2) * s
                    half[w + _U(32) + c] = p + np.float32(4) * r
                    half[w + _U(48) + c] = q + np.float32(8) * s + m5
            for j in range(4):
                o = _U(j * _WIDTH)
                for c in range(_LANES):
                    m0, m5 = half[o + c], half[o + _U(320) + c]
                    p = half[o + _U(64) + c] + half[o + _U(128) + c]
                    q = half[o + _U(64) + c] - half[o + _U(128) + c]
                    r = half[o + _U(192) + c] + half[o + _U(256) + c]
                    s = half[o + _U(192) + c] - half[o + _U(256) + c]
                    whole[o + c] = m0 + p + r
                    whole[o + _U(64) + c] = q + np.float32(2) * s
                    whole[o + _U(128) + c] = p + np.float32(4) * r
                    whole[o + _U(192) + c] = q + np.float32(8) * s + m5
            for i in range(min(4, y_end - y)):
                for j in range(min(4, x_end - x)):
                    o = _U(((plane * y_end + y + i) * x_end + x + j) * channels + channel)
                    w = _U((i * 4 + j) * _WIDTH)
                    for c in range(_LANES):
                        v = whole[w + c] + bias[b + c]
                        v = v if v > low[b + c] else low[b + c]
                        target[o + c] = v if v < high[b + c] else high[b + c]
