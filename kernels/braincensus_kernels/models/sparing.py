"""Patches through a device that may run out of memory: with less beside them, then elsewhere.

A patch's shape is part of the result and stays. What can go is what makes the device fast: the second set of
buffers, the graph with its own copy of all features, and what the allocator keeps back. After that, only
another device helps.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

Patch = NDArray[np.float32]

USUAL, SPARING, ELSEWHERE = "usual", "sparing", "elsewhere"
"""How a patch was predicted: as always; with as little memory as it takes; on another device."""


class Sparing(Protocol):
    """A network on a device that can do with less memory."""

    def predict(self, patch: Patch) -> Patch:
        """Return the foreground probability of a patch without its halo."""

    def economise(self) -> None:
        """Give back what only makes it faster, from now on."""


def predict_sparing(
    predictor: Sparing,
    patches: int,
    read: Callable[[int], Patch],
    *,
    predict_all: Callable[[Iterator[Patch]], Iterator[Patch]],
    elsewhere: Callable[[], Callable[[Patch], Patch]] | None,
) -> Iterator[tuple[Patch, str]]:
    """Yield the result of every patch, in order, and how it was come by.

    Parameters
    ----------
    predictor
        Whose device it is.
    patches
        How many.
    read
        Gives a patch by its number; one that found no memory is read again.
    predict_all
        Runs patches through `predictor`.
    elsewhere
        Loads what predicts on a device with more memory; None: there is none.

    Raises
    ------
    MemoryError
        If there is not enough memory, and nowhere else to go.
    """
    done = 0
    for how in (USUAL, SPARING):
        try:
            for result in predict_all(read(number) for number in range(done, patches)):
                yield result, how
                done += 1
            return
        except (RuntimeError, MemoryError) as err:
            if not out_of_memory(err):
                raise
        # Outside of `except`: what failed is let go of only now.
        predictor.economise()
        let_go()
    if elsewhere is None:
        raise MemoryError("not enough memory for one patch of the network and its halo, alone")
    predict = elsewhere()
    for number in range(done, patches):
        try:
            result = predict(read(number))
        except RuntimeError as err:
            if out_of_memory(err):
                raise MemoryError(str(err)) from err
            raise
        yield result, ELSEWHERE


def out_of_memory(err: BaseException) -> bool:
    """Whether an error of torch means that an allocation failed; only the GPU's own has a type."""
    if isinstance(err, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(err).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory", "status_alloc_failed")
    return isinstance(err, RuntimeError) and any(sign in text for sign in signs)


def let_go() -> None:
    """Return memory that nothing holds to the device, for others."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
