"""What a client that waits for blocks does meanwhile: it looks whether the cluster is still alive.

Dask notices a process that ends. It does not notice, or notices late, one that hangs: a node that stopped, a
worker that paused for memory and finds no more, a scheduler that no longer answers. Here each of them has the
same time (`compute.hung_after_s`), after which a worker is restarted and its blocks go to others, and a run
without a scheduler or without workers ends with an error instead of waiting for ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from distributed import Client
from distributed.client import ClosedClientError, FutureCancelledError, FuturesCancelledError
from distributed.comm import CommClosedError

from braincensus.errors import BlockError, BraincensusError, explain

T = TypeVar("T")
_LOOK_EVERY_S = 15.0
_RESTART_S = 10.0
_START_S = 60.0  # a worker that is started anew must first import everything


@contextmanager
def telling_of_loss(doing: str) -> Iterator[None]:
    """Say in our own words that the connection to the cluster was lost, whatever Dask raises then.

    Parameters
    ----------
    doing
        What the error begins with.

    Raises
    ------
    BlockError
        If the connection was lost while the context lasted.
    """
    try:
        yield
    except BraincensusError:
        raise
    except Exception as err:
        if connection_lost(err):
            raise loss(doing) from err
        raise


def connection_lost(err: BaseException) -> bool:
    """Return whether an exception of Dask's means that the scheduler cannot be reached any more."""
    if isinstance(err, OSError) and "trying to connect" in str(err):  # as distributed words it
        return True
    lost = (CommClosedError, ClosedClientError, FutureCancelledError, FuturesCancelledError)
    return isinstance(err, lost)


def loss(doing: str) -> BlockError:
    """Return the error of a lost connection."""
    return BlockError(
        explain(
            f"{doing}: the connection to the cluster was lost",
            cause="the scheduler died, or the network did",
            remedy="start it again, then run again: done blocks are kept",
        )
    )


def ask_workers(
    client: Client, function: Callable[..., Any], *arguments: Any, hung_after_s: float, stage: str
) -> dict[str, Any]:
    """Run a function on every worker; one that hangs is restarted, so that nobody waits for it for ever.

    Returns
    -------
    dict
        What each gave, or the exception: a worker may go meanwhile, or lack the function.

    Raises
    ------
    BlockError
        As `Heartbeats.look`.
    """
    heartbeats = Heartbeats(client, hung_after_s=hung_after_s, stage=stage)
    answers: dict[str, Any] = heartbeats.during(lambda: client.run(function, *arguments, on_error="return"))
    return answers


class Heartbeats:
    """Looks at the workers of a cluster now and then.

    Parameters
    ----------
    client
        Connected to the cluster.
    hung_after_s
        How long a worker, or the scheduler, may be silent.
    stage
        What errors call it.
    """

    def __init__(self, client: Client, *, hung_after_s: float, stage: str) -> None:
        self._client, self._after, self._stage = client, hung_after_s, stage
        self._every = min(_LOOK_EVERY_S, hung_after_s / 4)
        self._next = time.monotonic() + self._every
        self._alive: dict[str, tuple[Any, float]] = {}  # last heartbeat, and when it was new to us
        self._some_worker = time.monotonic()

    def look(self) -> None:
        """Do what is to be done, if it is time; call it often.

        Raises
        ------
        BlockError
            If the scheduler is silent for too long, or there has been no worker for too long.
        """
        if time.monotonic() < self._next:
            return
        try:
            found = self._ask(self._client.scheduler.identity, n_workers=-1)
        except TimeoutError:
            raise BlockError(
                explain(
                    f"{self._stage}: the scheduler does not answer",
                    expected=f"an answer within {self._after:g} s (compute.hung_after_s)",
                    cause="its machine hangs, or the network does",
                    remedy="look at it, start it again if need be, then run again: done blocks are kept",
                )
            ) from None
        except OSError:
            found = None  # a lost connection: the blocks in flight tell of it
        now = time.monotonic()
        self._next = now + self._every
        if found is not None:
            self._judge(found["workers"], now)

    def during(self, function: Callable[[], T]) -> T:
        """Look while a function waits for the workers in a thread of its own.

        Raises
        ------
        BlockError
            As `look`.
        """
        answer: Future[T] = Future()

        def ask() -> None:
            try:
                answer.set_result(function())
            except BaseException as err:  # whatever it is, who waits must hear of it
                answer.set_exception(err)

        threading.Thread(target=ask, name="asking-workers", daemon=True).start()
        while not wait([answer], timeout=0.1).done:
            self.look()
        return answer.result()

    def _judge(self, workers: dict[str, dict[str, Any]], now: float) -> None:
        alive: dict[str, tuple[Any, float]] = {}
        for address, worker in workers.items():
            paused = worker["status"] == "paused" and not worker["metrics"].get("executing")
            sign = "paused" if paused else worker["last_seen"]
            before = self._alive.get(address)
            alive[address] = before if before and before[0] == sign else (sign, now)
        self._alive = alive
        hung = [address for address, (_, since) in alive.items() if now - since > self._after]
        if hung:
            self.restart(hung)
        if len(hung) < len(alive):
            self._some_worker = now
        elif now - self._some_worker > max(2 * self._after, _START_S):
            raise BlockError(
                explain(
                    f"{self._stage}: the cluster has no worker that works",
                    found=f"{len(alive)} workers, none alive for {now - self._some_worker:.0f} s",
                    cause="workers that ended (out of memory, out of time, lost nodes) and were not replaced",
                    remedy="start workers, then run again: done blocks are kept",
                )
            )

    def restart(self, workers: list[str]) -> None:
        """Have workers killed and started anew; those that nobody can kill are given up."""
        try:
            self._ask(
                self._client.scheduler.restart_workers,
                workers=workers,
                timeout=_RESTART_S,
                wait_for_workers=False,
                on_error="return",
                stimulus_id=f"braincensus-hung-{time.time()}",
            )
        except (OSError, TimeoutError):
            return  # it is tried again at the next look
        for address in workers:
            self._alive.pop(address, None)

    def _ask(self, function: Any, **arguments: Any) -> Any:
        return self._client.sync(function, callback_timeout=max(self._after, 2 * _RESTART_S), **arguments)
