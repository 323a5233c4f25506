"""What every format asks of a source before it becomes a volume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from braincensus.errors import ConfigError, InputError, explain
from braincensus.formats.readers import Axes, TripleFloat

MOST_VOXELS = 10**16  # 20 PB of uint16: nobody has imaged that; a header that claims it is damaged

LARGEST_CHUNK_BYTES = 4 * 2**30  # Blosc stops at 2 GiB

# Names of axes by number of dimensions, where nothing says better.
USUAL_AXES = {3: "zyx", 4: "czyx", 5: "tczyx"}

_UM_PER_UNIT = {
    "angstrom": 1e-4, "å": 1e-4,
    "nanometer": 1e-3, "nanometre": 1e-3, "nm": 1e-3,
    "micrometer": 1.0, "micrometre": 1.0, "micron": 1.0, "um": 1.0, "µm": 1.0, "μm": 1.0,
    "millimeter": 1e3, "millimetre": 1e3, "mm": 1e3,
    "centimeter": 1e4, "centimetre": 1e4, "cm": 1e4,
    "meter": 1e6, "metre": 1e6, "m": 1e6,
    "inch": 25400.0,
}  # fmt: skip


def um_per(unit: object) -> float | None:
    r"""Return how many micrometers a unit of length is; None if it is not one.

    Examples
    --------
    >>> um_per("nanometers"), um_per(r"\u00B5m"), um_per("pixel")
    (0.001, 1.0, None)
    """
    if not isinstance(unit, str):
        return None
    name = unit.strip().replace("\\u00B5", "µ").replace("\\u00b5", "µ").lower()
    return _UM_PER_UNIT.get(name, _UM_PER_UNIT.get(name.removesuffix("s")))


def as_voxel_size(value: object) -> TripleFloat:
    """Check a voxel size that someone gave: one positive number, or three for z, y, x.

    Raises
    ------
    ConfigError
        If it is anything else.
    """
    numbers = [value] * 3 if np.isscalar(value) and not isinstance(value, str) else value
    try:
        z, y, x = (float(v) for v in numbers)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        z = y = x = math.nan
    if not is_voxel_size((z, y, x)):
        raise ConfigError(
            explain(
                "not a voxel size",
                expected="three positive numbers, z, y, x in um (or one for all three)",
                found=repr(value),
                remedy="for example --voxel-size 5,5.26,5.26 or voxel_size_um=(5, 5.26, 5.26)",
            )
        )
    return z, y, x


def is_voxel_size(um: Sequence[float]) -> bool:
    """Whether these are finite and positive."""
    return all(math.isfinite(v) and v > 0 for v in um)


def check_volume(shape: Sequence[int], dtype: np.dtype[Any], *, what: str) -> None:
    """Refuse what is not a volume of real numbers.

    Raises
    ------
    InputError
        If an axis is empty or negative, the size is absurd, or voxels are not numbers.
    """
    if any(n < 0 for n in shape) or prod(shape) > MOST_VOXELS:
        raise InputError(
            explain(
                f"{what}: its metadata claims an impossible size",
                expected=f"at most {MOST_VOXELS:.0e} voxels",
                found=f"shape {tuple(shape)}",
                cause="damaged metadata",
            )
        )
    if prod(shape) == 0:
        raise InputError(
            explain(
                f"{what} is empty",
                expected="at least one voxel on every axis",
                found=f"shape {tuple(shape)}",
                cause="an acquisition or an export that stopped before the first plane",
            )
        )
    if dtype.kind not in "uifb":
        kind = {"c": "complex numbers", "O": "Python objects", "V": "records"}.get(dtype.kind, "not numbers")
        raise InputError(
            explain(
                f"{what}: voxels of dtype {dtype} are not intensities",
                expected="integers, floats or booleans",
                found=kind,
                remedy="take the magnitude of complex data" if dtype.kind == "c" else "save it as numbers",
            )
        )


def check_chunk(shape: Sequence[int], dtype: np.dtype[Any], *, what: str) -> None:
    """Refuse chunks that no memory holds: one is decoded whole, whatever is read of it.

    Raises
    ------
    InputError
        If one chunk is larger than `LARGEST_CHUNK_BYTES`.
    """
    n_bytes = prod(shape) * dtype.itemsize
    if any(n < 1 for n in shape) or n_bytes > LARGEST_CHUNK_BYTES:
        raise InputError(
            explain(
                f"{what}: its metadata claims impossible chunks",
                expected=f"at most {LARGEST_CHUNK_BYTES / 2**30:g} GiB in a chunk",
                found=f"chunks of {tuple(shape)}, {n_bytes / 2**30:,.1f} GiB",
                cause="damaged metadata, or a store that was written as one chunk",
                remedy="write it again with chunks of 64 to 256 voxels",
            )
        )


def choose_axes(
    names: Sequence[str],
    shape: Sequence[int],
    *,
    channel: int,
    timepoint: int,
    what: str,
    channels: Sequence[str] = (),
) -> Axes:
    """Select one channel and one time point, leaving z, y and x in that order.

    Axes beyond t, c, z, y, x are dropped where they have length 1.

    Raises
    ------
    InputError
        If there are no three axes z, y and x, or one that is not understood.
    ConfigError
        If the channel or time point does not exist.
    """
    free = [name for name in names if name in ("z", "y", "x")]
    stored = f"axes {''.join(names)}, shape {tuple(shape)}"
    if sorted(free) != ["x", "y", "z"]:
        raise InputError(
            explain(
                f"{what} is not a volume",
                expected="three axes z, y and x, with a channel and a time axis at most",
                found=stored,
                cause="a single plane or a projection" if "z" not in names else "",
                remedy="give the whole stack" if "z" not in names else "",
            )
        )
    wanted = {"c": ("channel", channel), "t": ("timepoint", timepoint)}
    select: list[int | None] = []
    for name, n in zip(names, shape, strict=True):
        if name in free:
            select.append(None)
        elif name in wanted:
            word, index = wanted.pop(name)
            check_index(index, n, word=word, what=what, names=channels if name == "c" else ())
            select.append(index)
        elif n == 1:
            select.append(0)
        else:
            raise InputError(
                explain(
                    f"{what} has an axis {name!r} of length {n} that is not understood",
                    expected="axes among t, c, z, y, x",
                    found=stored,
                    remedy="save one volume, or name its axes",
                )
            )
    for word, index in wanted.values():
        check_index(index, 1, word=word, what=what)
    return Axes(tuple(select), (free.index("z"), free.index("y"), free.index("x")))


def check_index(index: int, n: int, *, word: str, what: str, names: Sequence[str] = ()) -> None:
    """Refuse a channel, time point or level that does not exist.

    Raises
    ------
    ConfigError
        If `index` is not in ``range(n)``.
    """
    if not 0 <= index < n:
        named = f": {', '.join(f'{i} {name}' for i, name in enumerate(names))}" if names else ""
        raise ConfigError(
            explain(
                f"{what} has no {word} {index}",
                expected=f"{word} 0" if n == 1 else f"a {word} from 0 to {n - 1}{named}",
                found=str(index),
                remedy=f"choose with --{word} or {word}=",
            )
        )
