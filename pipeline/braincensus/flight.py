"""The tasks of one walk through blocks: which are in flight, what becomes of them, how many there may be."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from uuid import uuid4

from distributed import Client, Future, as_completed

from braincensus.errors import BraincensusError
from braincensus.heartbeats import Heartbeats
from braincensus.stragglers import AtWork, Straggler, Stragglers, at_work
from braincensus.watch.tell import Unwatched

IN_FLIGHT_PER_THREAD = 3
_ASK_AGAIN_S = 10.0
_MOST_AT_ONCE = 16  # results that the client holds


class Flight:
    """Computes blocks on a cluster, looking after it meanwhile.

    A worker that hangs is restarted. A block that takes far longer than the others is given to another worker
    too; if that is first, the worker that had it is restarted.

    Parameters
    ----------
    client
        Whose cluster to use.
    function, spec, stage, name, watch, hung_after_s
        As for :func:`braincensus.tasks.map_blocks`.
    """

    def __init__(
        self,
        client: Client,
        function: Callable[[Any, int], Any],
        spec: Any,
        *,
        stage: str,
        name: str,
        watch: Unwatched,
        hung_after_s: float,
    ) -> None:
        self._client, self._function, self._spec = client, function, spec
        self._stage, self._name, self._watch = stage, name, watch
        self._heartbeats = Heartbeats(client, hung_after_s=hung_after_s, stage=stage)
        # Twice: a worker that does not answer is restarted first.
        self._stragglers = Stragglers(self._at_work, at_least_s=2 * hung_after_s)
        self._futures = as_completed(loop=client.loop)
        self._numbers: dict[str, int] = {}  # of the tasks that are waited for
        self._arrived: deque[tuple[str, Callable[[], Any]]] = deque()
        self._given_twice: dict[int, str] = {}  # and the first task of each

    def __len__(self) -> int:
        return len(self._numbers)

    def submit(self, numbers: Sequence[int], **options: Any) -> None:
        """Give blocks to the cluster, in one message: a scheduler remembers something of each message."""
        # A new key each time: a lost task's is remembered. Dask groups tasks by the words before the number.
        keys = [f"{self._name}-{number}-{uuid4().hex[:12]}" for number in numbers]
        if not keys:
            return
        specs = [self._spec] * len(keys)
        futures = self._client.map(self._function, specs, list(numbers), key=keys, pure=False, **options)
        self._numbers.update(zip(keys, numbers, strict=True))
        self._futures.update(futures)
        for number, key in zip(numbers, keys, strict=True):
            self._watch.submitted(number, key)

    @property
    def idle(self) -> bool:
        """Whether no answer waits to be taken."""
        return not self._arrived and not self._futures.has_ready()

    def answers(self) -> Iterator[tuple[int, Callable[[], Any]]]:
        """Yield blocks as they come back, each once, and what gives its result or raises its error.

        Raises
        ------
        BlockError
            As `Heartbeats.look`.
        """
        while self._numbers:
            while self.idle:
                self._heartbeats.look()
                for straggler in self._stragglers.look(self._numbers):
                    self._give_to_another(straggler)
                with self._futures.thread_condition:
                    self._futures.thread_condition.wait(0.1)
            if not self._arrived:
                self._fetch()
            key, answer = self._arrived.popleft()
            if key not in self._numbers:
                continue  # another worker was first
            number = self._numbers.pop(key)
            self._stragglers.returned(key)
            self._watch.returned(key)
            if number in self._given_twice:
                self._drop_other(number, first=self._given_twice.pop(number))
            yield number, answer

    def close(self) -> None:
        """Forget what is still in flight."""
        for future in list(self._futures.futures):
            # To cancel it would wait for a scheduler that may hang.
            future.release()
        self._arrived.clear()
        self._numbers.clear()

    def _fetch(self) -> None:
        """Take what has come back, and get all results that are there in one go."""
        futures: list[Future] = []
        while self._futures.has_ready() and len(futures) < _MOST_AT_ONCE:
            futures.append(next(self._futures))
        finished = [future for future in futures if future.status == "finished"]

        def gather() -> list[Any]:
            try:
                results: list[Any] = self._client.gather(finished)
                return results
            except Exception:  # a worker died with one of them: which, each says for itself
                return []

        found = self._heartbeats.during(gather)  # it may be where a worker hangs
        results = {future.key: result for future, result in zip(finished, found, strict=False)}
        for future in futures:
            if future.key in results:
                self._arrived.append((future.key, partial(_given, results[future.key])))
                future.release()
            else:
                self._arrived.append((future.key, partial(self._heartbeats.during, future.result)))

    def _at_work(self) -> AtWork | None:
        try:
            found: AtWork = self._heartbeats.during(lambda: self._client.run_on_scheduler(at_work))
        except BraincensusError:
            raise
        except Exception:
            # A lost connection is told where results are waited for; a scheduler of another make may not know
            # what is asked of it. Neither ends a run that can go on.
            return None
        return found

    def _give_to_another(self, late: Straggler) -> None:
        number = self._numbers[late.key]
        if number in self._given_twice:
            return
        self._given_twice[number] = late.key
        why = f"at work for {late.seconds:.0f} s on {late.worker}, far longer than any before"
        self._watch.retried(self._stage, number, why)
        self.submit([number], workers=list(late.others) or None, allow_other_workers=bool(late.others))

    def _drop_other(self, number: int, *, first: str) -> None:
        """Forget the other task of a block that was given to two workers.

        Is it the first one, then its worker hangs: elsewhere the block was done in the meantime.
        """
        for key in [key for key, other in self._numbers.items() if other == number]:
            del self._numbers[key]
            self._watch.returned(key)
            worker = self._stragglers.dropped(key)
            for future in list(self._futures.futures):
                if future.key == key:
                    future.release()
            if worker and key == first:
                self._heartbeats.restart([worker])


def _given(result: Any) -> Any:
    return result


class Window:
    """How many tasks may be in flight: more where workers have come since."""

    def __init__(self, client: Client, at_once: int) -> None:
        self._client, self._at_once = client, at_once
        self._asked = time.monotonic()

    def free(self, in_flight: int) -> int:
        """Return how many tasks to submit now, beside those in flight; asks the scheduler now and then."""
        if time.monotonic() - self._asked >= _ASK_AGAIN_S:
            with suppress(OSError):  # a lost connection is told where results are waited for
                threads = sum(self._client.nthreads().values())
                self._at_once = max(self._at_once, IN_FLIGHT_PER_THREAD * threads)
            self._asked = time.monotonic()
        return max(0, self._at_once - in_flight)
