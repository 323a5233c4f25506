"""A block that hangs in a worker that still answers: another worker does it, and it counts once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster

from braincensus.stragglers import AtWork, Straggler, Stragglers
from braincensus.tasks import map_blocks
from braincensus.watch.tell import Unwatched

HANGS = 7
FOREVER_S = 3600


def hanging_once() -> Callable[[str, int], int]:
    """Return a block's work; made in here, so that it is sent whole: workers cannot import this module."""
    hangs, forever_s = HANGS, FOREVER_S

    def hang_once(folder: str, number: int) -> int:
        """Hang for ever at one block, but only the first to compute it."""
        if number == hangs:
            try:
                (Path(folder) / "hung").touch(exist_ok=False)
            except FileExistsError:
                return os.getpid()
            (Path(folder) / "pid").write_text(str(os.getpid()))
            time.sleep(forever_s)
        time.sleep(0.05)
        return os.getpid()

    return hang_once


class Told(Unwatched):
    def __init__(self) -> None:
        self.retries: list[tuple[int, str]] = []
        self.in_flight: set[str] = set()

    def submitted(self, number: int, key: str) -> None:
        self.in_flight.add(key)

    def returned(self, key: str) -> None:
        self.in_flight.remove(key)

    def retried(self, stage: str, number: int, why: str) -> None:
        self.retries.append((number, why))


def test_another_worker_does_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(**options, silence_logs=50) as cluster, Client(cluster, set_as_default=False) as client:
        told = Told()
        blocks = map_blocks(
            hanging_once(),
            str(tmp_path),
            range(60),
            client=client,
            stage="label",
            name="label-block",
            watch=told,
            hung_after_s=4,  # workers that sleep answer at once
        )
        done = list(blocks)
        assert sorted(number for number, _ in done) == list(range(60)), "each once"
        hung = int((tmp_path / "pid").read_text())
        assert dict(done)[HANGS] != hung, "another worker's answer"
        # The worker that hung may have been given another block meanwhile, which is late with it.
        assert HANGS in dict(told.retries)
        assert "far longer than any before" in dict(told.retries)[HANGS]
        assert len(told.retries) <= 2
        assert not told.in_flight, "nothing is left on the map"
        client.wait_for_workers(2, timeout=30)
        deadline = time.monotonic() + 30
        while hung in client.run(os.getpid).values() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert hung not in client.run(os.getpid).values(), "it was restarted"


class FakeWorkers:
    """Workers whose tasks began at the times that are set."""

    def __init__(self) -> None:
        self.now = 0.0
        self.began: dict[str, dict[str, float]] | None = {"a": {"x-0": 0}, "b": {"x-1": 0}, "c": {}}

    def at_work(self) -> AtWork | None:
        if self.began is None:
            return None
        return {
            worker: {key: self.now - at for key, at in tasks.items()} for worker, tasks in self.began.items()
        }

    def clock(self) -> float:
        return self.now


@pytest.fixture
def workers() -> FakeWorkers:
    return FakeWorkers()


@pytest.fixture
def stragglers(workers: FakeWorkers) -> Stragglers:
    return Stragglers(workers.at_work, at_least_s=60, clock=workers.clock)  # looks every 3 s


def late_until(workers: FakeWorkers, stragglers: Stragglers, until: float) -> list[tuple[float, Straggler]]:
    found = []
    while workers.now < until:
        workers.now += 1
        found += [(workers.now, late) for late in stragglers.look(("x-0", "x-1", "x-2"))]
    return found


def test_late_is_ten_times_the_longest_and_told_once(workers: FakeWorkers, stragglers: Stragglers) -> None:
    assert not late_until(workers, stragglers, 20)
    stragglers.returned("x-0")  # it took 20 s
    workers.began = {"a": {"x-2": 20}, "b": {"x-1": 0}, "c": {}}
    (first, one), (second, two) = late_until(workers, stragglers, 1000)
    assert one == ("x-1", "b", first, ("a", "c"))
    assert two == ("x-2", "a", second - 20, ("b", "c"))
    assert 200 < first <= 200 + 3
    assert 220 < second <= 220 + 3


def test_the_least_time_is_never_too_long(workers: FakeWorkers, stragglers: Stragglers) -> None:
    late_until(workers, stragglers, 2)
    stragglers.returned("x-0")  # before the first look
    workers.began = {"a": {}, "b": {"x-1": 0}, "c": {}}
    assert not late_until(workers, stragglers, 60)
    assert [late.key for _, late in late_until(workers, stragglers, 70)] == ["x-1"]


def test_waiting_behind_a_late_task_is_not_taking_long(workers: FakeWorkers, stragglers: Stragglers) -> None:
    late_until(workers, stragglers, 40)
    workers.began = {"a": {"x-2": 40}, "b": {"x-1": 0}, "c": {}}
    late_until(workers, stragglers, 42)
    stragglers.returned("x-2")  # submitted long ago, and begun 2 s ago
    assert [now for now, _ in late_until(workers, stragglers, 100)] == [63]


def test_nothing_is_late_before_anything_came_back(workers: FakeWorkers, stragglers: Stragglers) -> None:
    assert not late_until(workers, stragglers, 10_000)


def test_a_task_begun_anew_elsewhere_has_all_its_time(workers: FakeWorkers, stragglers: Stragglers) -> None:
    late_until(workers, stragglers, 6)
    stragglers.returned("x-0")
    workers.began = {"a": {"x-1": 50}, "b": {}, "c": {}}
    assert not late_until(workers, stragglers, 110)
    assert [late.worker for _, late in late_until(workers, stragglers, 120)] == ["a"]


def test_strangers_are_ignored(workers: FakeWorkers, stragglers: Stragglers) -> None:
    workers.began = {"a": {"another-client's": 0}, "b": {}, "c": {}}
    stragglers.returned("x-0")
    assert not late_until(workers, stragglers, 1000)


def test_a_scheduler_that_is_away_is_left_to_the_heartbeats(
    workers: FakeWorkers, stragglers: Stragglers
) -> None:
    stragglers.returned("x-0")
    workers.began = None
    assert not late_until(workers, stragglers, 1000)


def test_the_worker_that_is_at_a_dropped_task_is_known(workers: FakeWorkers, stragglers: Stragglers) -> None:
    late_until(workers, stragglers, 6)
    assert stragglers.dropped("x-1") == "b"
    assert stragglers.dropped("x-2") == "", "no worker has begun it"
