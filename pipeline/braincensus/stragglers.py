"""Blocks that take far longer than the others: a read that never returns, a device that hangs.

`heartbeats` looks at workers. One of which a single thread hangs still answers, and Dask would wait for it
for ever. Which block it is at is seen here; whether it hangs or only has more to do, nobody can see. So the
block is given to another worker, too: they write the same bytes, and whoever is first counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping
from typing import NamedTuple

from distributed import Scheduler

_LOOK_EVERY_S = 15.0
_TIMES_LONGER = 10.0

AtWork = Mapping[str, Mapping[str, float]]
"""For each worker, what its threads are at, and for how many seconds."""


def at_work(dask_scheduler: Scheduler) -> AtWork:
    """Return what each worker is at; runs on the scheduler, which hears it with every heartbeat."""
    return {
        address: {str(task.key): seconds for task, seconds in worker.executing.items()}
        for address, worker in dask_scheduler.workers.items()
    }


class Straggler(NamedTuple):
    """A task that takes far longer than all before it."""

    key: str
    worker: str
    seconds: float
    """For how long it has been at it."""
    others: tuple[str, ...]
    """The other workers."""


class Stragglers:
    """Looks now and then at what the workers are at.

    A task is late if a worker has been at it for ten times as long as at any that came back, and for the
    given time at the least. While none has come back there is nothing to compare with, and none is late.

    Parameters
    ----------
    ask
        Gives what the workers are at; None: not known.
    at_least_s
        What is never too long.
    clock
        Steady, in seconds.
    """

    def __init__(
        self,
        ask: Callable[[], AtWork | None],
        *,
        at_least_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask, self._at_least, self._clock = ask, at_least_s, clock
        self._every = min(_LOOK_EVERY_S, at_least_s / 20)
        self._looked = clock()
        self._seen: dict[str, tuple[str, float]] = {}  # at the last look: on which worker, and how long
        self._told: set[str] = set()
        self._longest: float | None = None

    def returned(self, key: str) -> None:
        """Learn from a task that came back how long one may take."""
        _, seconds = self._seen.pop(key, ("", 0.0))
        # It may have gone on until now.
        self._longest = max(self._longest or 0.0, seconds + self._clock() - self._looked)
        self._told.discard(key)

    def dropped(self, key: str) -> str:
        """Forget a task that nobody waits for any more; returns the worker that is at it, or nothing."""
        self._told.discard(key)
        worker, _ = self._seen.pop(key, ("", 0.0))
        return worker

    def look(self, wanted: Container[str]) -> list[Straggler]:
        """Return which of the wanted tasks have become late since the last look; call it often."""
        if self._clock() - self._looked < self._every:
            return []
        found = self._ask()
        self._looked = self._clock()
        if found is None:
            return []
        self._seen = {
            key: (worker, seconds)
            for worker, tasks in found.items()
            for key, seconds in tasks.items()
            if key in wanted
        }
        if self._longest is None:
            return []
        limit = max(self._at_least, _TIMES_LONGER * self._longest)
        late = [
            Straggler(key, worker, seconds, tuple(other for other in found if other != worker))
            for key, (worker, seconds) in self._seen.items()
            if seconds > limit and key not in self._told
        ]
        self._told.update(straggler.key for straggler in late)
        return late
