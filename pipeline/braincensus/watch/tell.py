"""The client's side: a run tells what happens, and twice a second a picture of it goes to the scheduler.

`Watch` is a `Progress` that passes everything on to the user's, and what `tasks.map_blocks` tells about
blocks. Telling costs a few numbers in memory; one coroutine of the client sends. Whatever goes wrong in
the sending ends the page and leaves a message, never the run.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import uuid4

from distributed import Client

from braincensus.blocks import BlockGrid
from braincensus.planning import Plan
from braincensus.progress import Progress
from braincensus.store import Output
from braincensus.watch.plugin import NAME, WatchPlugin
from braincensus.watch.state import RunState

_log = logging.getLogger(__name__)

_EVERY_S = 0.5
_AT_LEAST_EVERY_S = 5.0
_PATIENCE_S = 10.0
_STAGES = ("intensity", "segment", "threshold", "label", "stitch", "relabel", "measure", "pyramid")


class Unwatched:
    """Takes what is told about blocks and forgets it: for work that no page shows."""

    def blocks(self, stage: str, step: str, grid: BlockGrid) -> None:
        """Begin a walk through a grid."""

    def submitted(self, number: int, key: str) -> None:
        """Give a block to the cluster."""

    def returned(self, key: str) -> None:
        """Take a task back, whatever became of it."""

    def done(self, stage: str, number: int, voxels: int, *, kept: bool) -> None:
        """Count a block as done."""

    def retried(self, stage: str, number: int, why: str) -> None:
        """Try a block again, now or later."""

    def failed(self, number: int, why: str) -> None:
        """Give a block up."""

    def cells(self, n: int) -> None:
        """Say how many cells there are, as far as is known."""

    def seams(self, *, in_all: int, faces: int, voxels: int, crossings: int, disagreeing: int) -> None:
        """Say what the audit has compared so far."""


UNWATCHED = Unwatched()


class Watch(Unwatched):
    """Takes what a run tells. Without a scheduler that shows it, it only passes the progress on."""

    def __init__(self, state: RunState, progress: Progress) -> None:
        self.state = state
        self._progress = progress
        self._lock = threading.Lock()
        self.changed = True
        self.picture: dict[str, Any] | None = None

    # Progress

    def message(self, text: str) -> None:
        """Show one line that stays."""
        with self._lock:
            self.state.messages.append(text)
            self.changed = True
        self._progress.message(text)

    def start(self, stage: str, voxels: int) -> None:
        """Begin a stage."""
        with self._lock:
            self.state.start(stage, voxels, now=time.monotonic())
            self.changed = True
        self._progress.start(stage, voxels)

    def advance(self, stage: str, voxels: int) -> None:
        """Pass the progress on; what is done is counted block by block."""
        self._progress.advance(stage, voxels)

    def finish(self, stage: str, seconds: float) -> None:
        """End a stage."""
        with self._lock:
            self.state.finish(stage, seconds)
            self.changed = True
        self._progress.finish(stage, seconds)

    # Blocks

    def blocks(self, stage: str, step: str, grid: BlockGrid) -> None:
        """Begin a walk through a grid."""
        with self._lock:
            self.state.begin_blocks(stage, step, grid.counts, grid.block_shape, grid.volume_shape)
            self.changed = True

    def submitted(self, number: int, key: str) -> None:
        """Give a block to the cluster."""
        with self._lock:
            self.state.submitted(number, key)
            self.changed = True

    def returned(self, key: str) -> None:
        """Take a task back, whatever became of it."""
        with self._lock:
            self.state.returned(key)

    def done(self, stage: str, number: int, voxels: int, *, kept: bool) -> None:
        """Count a block as done."""
        with self._lock:
            self.state.block_done(number, kept=kept)
            self.state.advance(stage, voxels, now=time.monotonic(), kept=kept)
            self.changed = True

    def retried(self, stage: str, number: int, why: str) -> None:
        """Try a block again, now or later."""
        with self._lock:
            self.state.block_retried(stage, number, why)
            self.changed = True
        self._progress.message(f"{stage}, block {number}: {why}; tried again")

    def failed(self, number: int, why: str) -> None:
        """Give a block up."""
        with self._lock:
            self.state.block_failed(number, why)
            self.changed = True

    # What stages find

    def cells(self, n: int) -> None:
        """Say how many cells there are, as far as is known."""
        with self._lock:
            self.state.cells = n
            self.changed = True

    def seams(self, *, in_all: int, faces: int, voxels: int, crossings: int, disagreeing: int) -> None:
        """Say what the audit has compared so far."""
        with self._lock:
            seams = self.state.seams
            seams.faces_in_all, seams.faces, seams.voxels = in_all, faces, voxels
            seams.crossings, seams.disagreeing = crossings, disagreeing
            self.changed = True

    # For the sender

    def end(self, status: Any, failure: str = "") -> None:
        """End the run."""
        with self._lock:
            self.state.end(status, now=time.monotonic(), failure=failure)
            self.changed = True

    def snapshot(self) -> dict[str, Any]:
        """Say everything, once."""
        with self._lock:
            self.changed = False
            return self.state.snapshot(now=time.monotonic())


@contextmanager
def watching(client: Client, plan: Plan, output: Output, progress: Progress) -> Iterator[Watch]:
    """Show a run on the scheduler's dashboard for as long as the context lasts.

    Parameters
    ----------
    client
        Whose scheduler shows it. One that has no braincensus, or no dashboard, is only told about.
    plan, output
        Of the run.
    progress
        The user's; told everything.

    Yields
    ------
    Watch
        To be told in place of `progress`.
    """
    estimates = {name: plan.seconds.get(name, 0.0) for name in _STAGES}
    if plan.config.labelling.threshold != "otsu":
        del estimates["threshold"]
    volume = plan.volume
    state = RunState(
        uuid4().hex,
        volume.source,
        str(output.path),
        volume.shape,
        volume.voxel_size_um,
        estimates,
        now=time.monotonic(),
    )
    watch = Watch(state, progress)
    with showing(client, watch, tell=progress.message):
        yield watch


@contextmanager
def showing(client: Client, watch: Watch, *, tell: Callable[[str], None]) -> Iterator[None]:
    """Send what a watch is told to the client's scheduler, for as long as the context lasts.

    Parameters
    ----------
    client, watch
        Whose scheduler shows what.
    tell
        Told where the page is, or why there is none.
    """
    sender = _Sender(client, watch, tell=tell)
    sender.start()
    try:
        yield
    except Exception as err:
        watch.end("failed", str(err))
        raise
    except BaseException:  # Ctrl-C, or the scheduler of a cluster
        watch.end("stopped")
        raise
    else:
        watch.end("finished")
    finally:
        sender.close()


class _Sender:
    """Sends pictures of a run from the client's event loop."""

    def __init__(self, client: Client, watch: Watch, *, tell: Callable[[str], None]) -> None:
        self._client, self._watch, self._tell = client, watch, tell
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._shown = False
        self._sent_picture: Any = None

    def start(self) -> None:
        """Bring the page to the scheduler and begin to send; says where the page is, or why there is none."""
        try:
            self._client.register_plugin(WatchPlugin(), name=NAME)
            found = self._client.sync(self._send, callback_timeout=_PATIENCE_S)
        except Exception as err:
            self._tell(f"no braincensus page on the Dask dashboard: {_why(err)}")
            return
        self._shown = True
        link = self._client.dashboard_link
        if found and found.get("page") and link:
            self._tell(f"this run: {link.rsplit('/', 1)[0]}/braincensus")
        else:
            why = (found or {}).get("why") or "the dashboard is off"
            self._tell(f"no braincensus page on the Dask dashboard: {why}")
        self._client.loop.add_callback(self._begin)

    def close(self) -> None:
        """Send the last picture and stop."""
        self._closed = True
        if self._shown:
            with suppress(Exception):
                self._client.sync(self._end, callback_timeout=_PATIENCE_S)

    async def _begin(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def _end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        if self._client.status == "running":
            await self._send()

    async def _run(self) -> None:
        sent = time.monotonic()
        while not self._closed:
            await asyncio.sleep(_EVERY_S)
            if not self._watch.changed and time.monotonic() - sent < _AT_LEAST_EVERY_S:
                continue
            try:
                await self._send()
            except OSError:  # the scheduler is away; the run itself will say so
                continue
            except Exception:
                _log.debug("the page is not told any more", exc_info=True)
                return
            sent = time.monotonic()

    async def _send(self) -> dict[str, Any]:
        picture = self._watch.picture
        message = {
            "client": self._client.id,
            "snapshot": self._watch.snapshot(),
            "picture": picture if picture is not self._sent_picture else None,
        }
        answer: dict[str, Any] = await self._client.scheduler.braincensus_watch(**message)
        self._sent_picture = picture
        return answer


def _why(err: Exception) -> str:
    if isinstance(err, ModuleNotFoundError | ImportError):
        return f"the scheduler cannot import it ({err}); install braincensus there, too"
    text = str(err).splitlines()[0] if str(err) else ""
    return f"{type(err).__name__}: {text}" if text else type(err).__name__
