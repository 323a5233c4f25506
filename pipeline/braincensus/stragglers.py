"""Blocks that take far longer than the others: a read that never returns, a device that hangs.

`heartbeats` looks at workers. One of which a single thread hangs still answers, and Dask would wait for it
for ever. Which block it is at is seen here; whether it hangs or only has more to do, nobody can see. So the
block is given to another worker, too: they write the same bytes, and whoever is first counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from contextlib import suppress
from typing import NamedTuple

from distributed import Client

_LOOK_EVERY_S = 15.0
_TIMES_LONGER = 10.0


class Straggler(NamedTuple):
    """A task that takes far longer than all before it."""

    key: str
    worker: str
    seconds: float
    """For how long it has been there."""
    others: tuple[str, ...]
    """The other workers."""


class Stragglers:
    """Looks now and then at which worker has which task.

    A task is late if a worker has had it for ten times as long as any that came back, and for the given time
    at the least. While none has come back there is nothing to compare with, and none is late.

    Parameters
    ----------
    client
        Connected to the cluster.
    at_least_s
        What is never too long.
    clock
        Steady, in seconds.
    """

    def __init__(
        self, client: Client, *, at_least_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client, self._at_least, self._clock = client, at_least_s, clock
        self._every = min(_LOOK_EVERY_S, at_least_s / 20)
        self._next = clock() + self._every
        self._at_work: dict[str, tuple[str, float]] = {}  # on which worker, and since when as far as was seen
        self._told: set[str] = set()
        self._longest: float | None = None

    def returned(self, key: str) -> None:
        """Learn from a task that came back how long one may take."""
        _, since = self._at_work.pop(key, ("", self._clock()))
        # It may have begun right after the look before the one that saw it.
        self._longest = max(self._longest or 0.0, self._clock() - since + self._every)
        self._told.discard(key)

    def dropped(self, key: str) -> str:
        """Forget a task that nobody waits for any more; returns the worker that still has it, or nothing."""
        self._told.discard(key)
        worker, _ = self._at_work.pop(key, ("", 0.0))
        return worker

    def look(self, wanted: Container[str]) -> list[Straggler]:
        """Return which of the wanted tasks have become late since the last look; call it often."""
        now = self._clock()
        if now < self._next:
            return []
        self._next = now + self._every
        processing: dict[str, list[str]] | None = None
        with suppress(OSError, TimeoutError):  # `heartbeats` tells of a scheduler that is away
            processing = self._client.sync(self._client.scheduler.processing, callback_timeout=self._every)
        if processing is None:
            return []
        at_work = {}
        for worker, keys in processing.items():
            for key in filter(wanted.__contains__, keys):
                before = self._at_work.get(key)
                at_work[key] = before if before and before[0] == worker else (worker, now)
        self._at_work = at_work
        if self._longest is None:
            return []
        limit = max(self._at_least, _TIMES_LONGER * self._longest)
        late = [
            Straggler(key, worker, now - since, tuple(other for other in processing if other != worker))
            for key, (worker, since) in at_work.items()
            if now - since > limit and key not in self._told
        ]
        self._told.update(straggler.key for straggler in late)
        return late
