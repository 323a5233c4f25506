"""Several processes, one training: torchrun starts them, here they find each other. Beside the flow.

torchrun and not Dask: it gives every process one device and a place in the group, restarts none behind
our back, and passes signals on. Dask's workers come and go and share threads, which a group whose every
step waits for all of its members cannot bear.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from braincensus.errors import BraincensusError, ConfigError, explain

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that share a training; the first one writes."""

    rank: int
    count: int
    device: str
    """Of this process."""

    @property
    def first(self) -> bool:
        """Whether this process reads what is read once, writes, and talks."""
        return self.rank == 0

    def from_first(self, compute: Callable[[], T]) -> T:
        """Let the first process compute, and return its result, or raise its error, in all."""
        if self.count == 1:
            return compute()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = compute()
            except BraincensusError as err:
                answer[1] = (type(err), str(err))
        distributed.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            kind, text = answer[1]
            raise kind(text)
        result: T = answer[0]
        return result

    def any(self, flag: int) -> int:
        """Return the largest of all processes' flags."""
        if self.count == 1:
            return flag
        shared = torch.tensor([flag], device=self.device)
        distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
        return int(shared.item())


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the group of processes that torchrun started, if it did; leave it at the end.

    Raises
    ------
    ConfigError
        If the device is none that torch has here.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    alone = not distributed.is_available() or (count == 1 and not distributed.is_initialized())
    chosen = _device(device, local_rank=0 if alone else int(os.environ.get("LOCAL_RANK", "0")))
    if alone:
        yield Processes(0, 1, chosen)
        return
    if chosen != "cpu":
        torch.cuda.set_device(chosen)
    ours = not distributed.is_initialized()
    if ours:
        try:
            distributed.init_process_group("gloo" if chosen == "cpu" else "nccl")
        except (ValueError, RuntimeError) as err:
            raise ConfigError(
                explain(
                    f"WORLD_SIZE is {count}, and the other processes are not there",
                    found=str(err).splitlines()[0],
                    remedy="start with torchrun, or unset WORLD_SIZE to train in one process",
                )
            ) from err
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), chosen)
    finally:
        if ours:
            distributed.destroy_process_group()


def _device(name: str, *, local_rank: int) -> str:
    """Settle ``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            explain("no such device", expected="auto, cpu, cuda or cuda:NUMBER", found=repr(name))
        )
    if device.type == "cpu":
        return "cpu"
    index = local_rank if device.index is None else device.index
    there = torch.cuda.device_count() if cuda else 0
    if index >= there:
        raise ConfigError(
            explain(
                f"cannot train on {name}",
                expected=f"{index + 1} CUDA devices or more",
                found=f"{there} that torch {torch.__version__} can use",
                remedy="--device cpu, fewer processes, or the CUDA build of torch",
            )
        )
    return f"cuda:{index}"
