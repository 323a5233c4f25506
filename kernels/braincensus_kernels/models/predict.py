"""Foreground probability of one patch: the network's inference, on CPU or CUDA.

    patch = core + halo, in [0, 100] -> folded encoder, unpadded, cropped level by level -> core

Each level computes only what the core needs of it. Voxels beyond the core, on each side:

    level     takes          gives          because the next needs
    full      46 (input)     44             44 to pool; 2 of it beside the upsampled features
    half      22             20             20 to pool; 4
    quarter   10             8              8 to pool; 4
    eighth    4              2              2

So 46 voxels of context are enough to be exact, and the halo, a multiple of 8, is 48. Where the coarser
levels are left out (see `fold.py`), less is: 30, 14 or 4. With a smaller halo, what a level lacks at its
outer edge is filled with its outermost computed features, repeated. That is a rule of the patch alone:
no result depends on what else is computed, or in which batch.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from braincensus_kernels.boxes import Triple
from braincensus_kernels.models import winograd
from braincensus_kernels.models.calibrate import NormStatistics
from braincensus_kernels.models.checkpoints import Weights
from braincensus_kernels.models.fold import Convolution, FoldedEncoder, UpStep, fold
from braincensus_kernels.models.stream import PATCHES_AT_ONCE, Lanes, ReadAhead, predict_ahead

LATTICE = 8
"""Patches start, and extend, at multiples of this many voxels: the network halves three times."""

EXACT_HALO_VOXELS = 48
"""With this much context the core is what it would be in an endless volume."""

Norm = Literal["calibrated", "window"]

# Context that each level takes at most, full resolution first, for each number of levels; and at least.
_MOST = {1: (4,), 2: (14, 6), 3: (30, 14, 6), 4: (46, 22, 10, 4)}
_LEAST = (4, 6, 6, 4)
_SKIPPED = (2, 4, 4, 2)
"""Context of what a level hands to the way up."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_threads_lock = threading.Lock()


def resolve_precision(precision: str, device: str) -> str:
    """Return ``float32`` or ``bfloat16``; ``auto`` is bfloat16 where the device is faster with it.

    Notes
    -----
    Decided by what the processor is, not by timing it: the same machine gives the same bits, however busy.
    float16 is not offered. Nothing holds folded activations below its largest number (see the tests), and no
    processor at hand multiplied it faster than float32.

    Raises
    ------
    ValueError
        If `precision` is none of the three.

    Examples
    --------
    >>> resolve_precision("float32", "cpu")
    'float32'
    """
    if precision in _DTYPES:
        return precision
    if precision != "auto":
        raise ValueError(f"precision must be auto, float32 or bfloat16, got {precision!r}")
    if torch.device(device).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if _cpu_is_faster_in_bfloat16() else "float32"


def _cpu_is_faster_in_bfloat16() -> bool:
    if not (torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64") or torch.cpu._is_amx_tile_supported():
        return True
    # Intel's cores with float16 instructions have their bfloat16 products in AMX tiles. Without (a virtual
    # machine may hide them) what is left multiplies at half the rate of float32. AMD's, at twice the rate.
    return not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def projected_bytes(
    core: Triple, halo: int, channels: Sequence[int], precision: str, *, threads: int = 1
) -> int:
    """Project the peak memory of a `Predictor` at work, in bytes.

    A sum over the level that needs most, weights, the two patches that `predict_all` holds and what `threads`
    need to work in; on the safe side.
    """
    item = _DTYPES[precision].itemsize
    a, b, c, d = channels
    context = min(halo, _MOST[4][0])

    def voxels(scale: int, margin: int) -> int:
        return prod(n // scale + 2 * margin for n in core)

    full, half = voxels(1, context), voxels(2, min(context // 2, _MOST[4][1]) + 2)
    patch = prod(n + 2 * halo for n in core)
    skip = voxels(1, 2) * a * item
    # Two copies of the widest features at a time, and one that the convolution may reorder.
    at_full = full * (item + 3 * a * item)
    at_half = skip + half * (a + 2 * b + b) * item
    at_out = 2 * skip + voxels(1, 1) * 3 * a * item + voxels(2, 1) * b * item + voxels(1, 0) * 12
    at_half_up = skip + voxels(2, 4) * 5 * b * item
    # Full precision weights of both forms, and the working copies that a convolution makes of its own.
    parameters = 27 * (a * a + 2 * b * b + 2 * c * c + 2 * d * d) + 27 * 8 * (a * a + b * b + c * c)
    fast = 0
    if precision == "float32":  # the weights of `winograd.py`, and what its threads keep to work in
        fast = 4 * 108 * 4 * (a * a + b * b + c * c) + threads * winograd.ROOM_BYTES
    work = int(1.15 * max(at_full, at_half, at_out, at_half_up))
    return work + PATCHES_AT_ONCE * patch * 4 + parameters * 8 + fast


class Predictor:
    """Foreground probability, patch by patch.

    Parameters
    ----------
    weights
        Of the encoder.
    norm
        ``calibrated``: frozen statistics, folded; a fixed local function. ``window``: statistics of
        the patch itself, as the published plugin; the caller passes its 64^3 windows.
    statistics
        From `calibrate`. With ``window`` they only tell which class is foreground.
    halo_voxels
        Context on each side of the core, a multiple of 8. 48 is exact.
    precision
        ``auto``, ``float32`` or ``bfloat16``; see `resolve_precision`.
    device
        As torch names it.
    threads
        CPU threads of one prediction; None for torch's current setting.

    Raises
    ------
    ValueError
        On an argument that cannot be used, or statistics of another network.

    Notes
    -----
    Against the plain network with the same frozen norms, in float32, at a halo of 48 (all tested):

    - folded, cropped, levels left out: 1e-5;
    - with the convolutions of `winograd.py` (float32 on a CPU, 32 to 256 channels): 1e-5, too;
    - bfloat16: 0.1 (0.02 with random weights of full size, 0.05 with the shipped ones).

    One prediction at a time in a process: the number of threads is torch's, and shared.
    Source: the architecture and inference of CellSeg3D's WNet3D; freezing, folding and cropping are ours.

    Examples
    --------
    >>> import numpy as np
    >>> from braincensus_kernels.models.calibrate import calibrate
    >>> from braincensus_kernels.models.checkpoints import load_weights
    >>> weights = load_weights("compact")
    >>> windows = np.random.default_rng(0).uniform(0, 100, (1, 1, 32, 32, 32)).astype(np.float32)
    >>> predictor = Predictor(weights, statistics=calibrate(weights, windows), halo_voxels=8)
    >>> predictor.predict(windows[0, 0]).shape
    (16, 16, 16)
    """

    def __init__(
        self,
        weights: Weights,
        *,
        norm: Norm = "calibrated",
        statistics: NormStatistics | None,
        halo_voxels: int,
        precision: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        if norm not in ("calibrated", "window"):
            raise ValueError(f"norm must be calibrated or window, got {norm!r}")
        if halo_voxels < 0 or halo_voxels % LATTICE:
            raise ValueError(f"the halo must be a multiple of {LATTICE} voxels, got {halo_voxels}")
        if statistics is None:
            raise ValueError(
                "no norm statistics: calibrate() gives them, and tells which class is foreground"
            )
        if weights.in_channels != 1:
            raise ValueError(
                f"an encoder of one image channel is needed, these weights have {weights.in_channels}"
            )
        self.norm = norm
        self.halo_voxels = halo_voxels
        self.precision = resolve_precision(precision, device)
        self.device = device
        self.threads = threads
        self._foreground = statistics.foreground_class
        self._dtype = _DTYPES[self.precision]
        encoder = weights.build_encoder()
        if norm == "calibrated":
            self._folded: FoldedEncoder | None = fold(encoder, statistics).to(device, self._dtype)
        else:
            self._folded = None
            self._encoder = encoder.to(device)
        if self._cuda:
            self._lanes = Lanes(
                self._compute, halo_voxels=halo_voxels, device=device, graph=norm == "calibrated"
            )

    def economise(self) -> None:
        """Give back the memory that only makes a GPU faster: the graph, and the second set of buffers."""
        if self._cuda:
            self._lanes = Lanes(
                self._compute, halo_voxels=self.halo_voxels, device=self.device, graph=False, buffers=1
            )

    @property
    def reach_voxels(self) -> int:
        """How far the network looks: with a halo of this or more the core is exact."""
        return LATTICE if self._folded is None else _MOST[len(self._folded.down)][0]

    def predict(self, patch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the foreground probability of the core.

        Parameters
        ----------
        patch
            float32 (z, y, x) in [0, 100], core plus halo on both sides, extents in multiples of 8, starting
            at a multiple of 8 of the volume's voxels (else pooling falls elsewhere, and so does the result).

        Returns
        -------
        float32 (z, y, x)
            In [0, 1].

        Raises
        ------
        ValueError
            On a patch of a wrong shape or dtype.
        """
        core = self._core_shape(patch)
        if self._cuda:
            (result,) = self.predict_all([patch])
            return result
        with cpu_threads(self.threads), torch.inference_mode():
            x = torch.from_numpy(np.ascontiguousarray(patch))[None, None]
            result = self._compute(x).numpy()
        assert result.shape == core
        return result

    def predict_all(
        self,
        patches: Iterable[NDArray[np.float32]],
        *,
        slot: AbstractContextManager[Any] | None = None,
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the foreground probability of every core, in order: the bits that `predict` gives.

        Parameters
        ----------
        patches
            As `predict` takes them, advanced in a thread of its own, so that the next one is read while one
            is computed. At most `stream.PATCHES_AT_ONCE` of them are in memory. On CUDA, where they are of
            one shape, copying in, computing and copying out overlap too.
        slot
            Held while the device works, as a lock that others who use it take too; not while a patch is read.

        Raises
        ------
        ValueError
            On a patch of a wrong shape or dtype.

        Notes
        -----
        Exceptions of `patches` are raised where the patch would have come. A caller who stops early
        closes the iterator (or lets go of it): reading then stops after the patch that is being read.

        Examples
        --------
        >>> from braincensus_kernels.models.calibrate import calibrate
        >>> from braincensus_kernels.models.checkpoints import load_weights
        >>> weights, window = load_weights("compact"), np.full((32, 32, 32), 50, np.float32)
        >>> window[8:16] = 10
        >>> predictor = Predictor(weights, statistics=calibrate(weights, window[None, None]), halo_voxels=8)
        >>> [core.shape for core in predictor.predict_all(window for _ in range(2))]
        [(16, 16, 16), (16, 16, 16)]
        """
        slot = nullcontext() if slot is None else slot
        if not self._cuda:
            yield from predict_ahead(self.predict, self._checked(patches), slot=slot)
            return
        with ReadAhead(self._checked(patches)) as ready:
            yield from self._lanes.run(ready, slot)

    def _checked(self, patches: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        for patch in patches:
            self._core_shape(patch)
            yield patch
            del patch

    @property
    def _cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def _compute(self, x: Tensor) -> Tensor:
        """Probability of the core (z, y, x), float32, of a patch (1, 1, z, y, x) on the device."""
        if self._folded is None:
            return self._window(x)
        # TF32 is no float32 (10 bits), and kernels that are chosen by timing differ from run to run.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return _run(self._folded, x, self.halo_voxels, self._dtype)

    def _core_shape(self, patch: NDArray[np.float32]) -> Triple:
        h = self.halo_voxels
        if patch.dtype != np.float32 or patch.ndim != 3:
            raise ValueError(f"expected a float32 patch (z, y, x), got {patch.dtype} of shape {patch.shape}")
        core = (patch.shape[0] - 2 * h, patch.shape[1] - 2 * h, patch.shape[2] - 2 * h)
        if any(n <= 0 or n % LATTICE for n in core):
            raise ValueError(
                f"expected core + 2 * {h} voxels, the core a multiple of {LATTICE}, got {patch.shape}: "
                f"a core of {core}"
            )
        return core

    def _window(self, x: Tensor) -> Tensor:
        """Run the network as published: norms over the patch, softmax, then crop to the core."""
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=self._dtype is torch.bfloat16):
            logits = self._encoder.logits(x)
        probability = torch.softmax(logits.float(), dim=1)[:, self._foreground : self._foreground + 1]
        return _crop(probability, self.halo_voxels)[0, 0].contiguous()


@contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Hold the process's one prediction at a time, with torch on so many threads; None: as it is."""
    if threads is None:
        yield
        return
    with _threads_lock:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        yield


def _run(net: FoldedEncoder, x: Tensor, halo: int, dtype: torch.dtype) -> Tensor:
    """Compute the core of a patch (1, 1, z, y, x); `margin` is the context beyond the core, per level."""
    levels = len(net.down)
    most = _MOST[levels]
    margin = min(halo, most[0])
    x = _channels_last(_widen(_crop(x, halo - margin).to(dtype), margin, max(_LEAST[0], margin)))
    margin = max(_LEAST[0], margin)
    handed = []
    for level, block in enumerate(net.down):
        if level > 0:
            x, margin = _pool(x, margin, most[level])
            wanted = max(_LEAST[level], min(most[level], halo // 2**level + 2))
            x, margin = _widen(x, margin, wanted), wanted
        x, margin = _down(block, x), margin - 2
        skip = _crop(x, margin - _SKIPPED[level])
        handed.append(skip.clone(memory_format=torch.channels_last_3d))  # lets go of the rest of x

    x = handed.pop() if levels == 4 else torch.empty(0)
    for step in net.up:
        skip = handed.pop()
        # Context of skip and coarse features, then of the result: 4 and 2 -> 2; at last 2 and 1 -> 0.
        x = _up(step, skip, x if handed or isinstance(step.up, Tensor) else _crop(x, 1))

    logits = functional.linear(x.permute(0, 2, 3, 4, 1)[0].float(), net.head_weight, net.head_bias)
    if net.head_weight.shape[0] == 1:
        return torch.sigmoid_(logits[..., 0])
    return torch.softmax(logits, dim=-1)[..., 0].contiguous()


def _channels_last(x: Tensor) -> Tensor:
    """Lay out one channel as channels-last: the same memory, but the strides must say so to be followed."""
    x = x.contiguous()
    z, y, x_ = x.shape[2:]
    return x.as_strided(x.shape, (z * y * x_, 1, y * x_, x_, 1))


def _convolve(x: Tensor, conv: Convolution) -> Tensor:
    if conv.fast is not None:
        return conv.fast(x)
    y = _plain_convolution(x, conv.weight, conv.bias)
    if conv.bounds is not None:
        return torch.clamp_(y, *conv.bounds)
    return y.relu_() if conv.relu else y


def _plain_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype is torch.float32 and x.device.type == "cpu":
        # Where torch judges a convolution too small for oneDNN, its own lays the features out anew, twice.
        if weight.shape[2:] == (1, 1, 1):
            y = functional.linear(x.permute(0, 2, 3, 4, 1), weight[..., 0, 0, 0], bias)
            return y.permute(0, 4, 1, 2, 3)
        if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return torch.mkldnn_convolution(x, weight, bias, (0, 0, 0), (1, 1, 1), (1, 1, 1), 1)
    return functional.conv3d(x, weight, bias).contiguous(memory_format=torch.channels_last_3d)


def _down(block: tuple[Convolution, ...], x: Tensor) -> Tensor:
    """Two 3x3x3 convolutions, among others of 1x1x1: 2 voxels less on each side."""
    for conv in block:
        x = _convolve(x, conv)
    return x


def _up(step: UpStep, skip: Tensor, coarse: Tensor) -> Tensor:
    """Join finer and coarser features; 2 voxels less on each side than `skip`."""
    x = _convolve(skip, step.skip)
    channels, (z, y, x_) = x.shape[1], (n // 2 for n in x.shape[2:])
    # Slots to voxels, as views: (z, 2, y, 2, x, 2, channel) of both.
    fine = x.permute(0, 2, 3, 4, 1).view(z, 2, y, 2, x_, 2, channels)
    if isinstance(step.up, Tensor):
        fine += step.up.view(1, 2, 1, 2, 1, 2, channels)
    else:
        slots = _convolve(coarse, step.up).permute(0, 2, 3, 4, 1).view(z, y, x_, 2, 2, 2, channels)
        fine += slots.permute(0, 3, 1, 4, 2, 5, 6)
    return _convolve(x.relu_(), step.second)


def _crop(x: Tensor, margin: int) -> Tensor:
    """Cut `margin` voxels off each side."""
    if margin == 0:
        return x
    inner = slice(margin, -margin)
    return x[:, :, inner, inner, inner]


def _pool(x: Tensor, margin: int, most: int) -> tuple[Tensor, int]:
    """Halve the resolution, keeping at most `most` voxels of context; pooling starts on the lattice."""
    kept = min(margin // 2, most)
    return functional.max_pool3d(_crop(x, margin - 2 * kept), 2), kept


def _widen(x: Tensor, margin: int, wanted: int) -> Tensor:
    """Repeat the outermost features until there are `wanted` voxels of context, or crop to them."""
    if margin >= wanted:
        return _crop(x, margin - wanted)
    wider = functional.pad(x, (wanted - margin,) * 6, mode="replicate")
    return wider.contiguous(memory_format=torch.channels_last_3d)
