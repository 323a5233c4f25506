"""A block that hangs in a worker that still answers: another worker does it, and it counts once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster

from braincensus.stragglers import Stragglers
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


class FakeScheduler:
    def __init__(self) -> None:
        self.now, self.tasks = 0.0, {"a": ["x-0"], "b": ["x-1"], "c": []}

    @property
    def scheduler(self) -> FakeScheduler:
        return self

    def processing(self) -> dict[str, list[str]]:
        return self.tasks

    def sync(self, function: Callable[[], dict[str, list[str]]], callback_timeout: float) -> Any:
        return function()

    def clock(self) -> float:
        return self.now


@pytest.fixture
def client() -> FakeScheduler:
    return FakeScheduler()


@pytest.fixture
def stragglers(client: FakeScheduler) -> Stragglers:
    found: Any = client
    return Stragglers(found, at_least_s=60, clock=client.clock)


WANTED = ("x-0", "x-1", "x-2")


def late_until(client: FakeScheduler, stragglers: Stragglers, until: float) -> list[tuple[str, str, float]]:
    found = []
    while client.now < until:
        client.now += 1
        found += [(late.key, late.worker, client.now) for late in stragglers.look(WANTED)]
    return found


def test_late_is_ten_times_the_longest_and_told_once(client: FakeScheduler, stragglers: Stragglers) -> None:
    assert not late_until(client, stragglers, 20)
    stragglers.returned("x-0")  # seen at 3: it took 17 s, or up to 3 s more
    client.tasks["a"] = ["x-2"]
    found = late_until(client, stragglers, 1000)
    assert [(key, worker) for key, worker, _ in found] == [("x-1", "b"), ("x-2", "a")]
    (_, _, first), (_, _, second) = found
    assert 3 + 200 < first <= 3 + 200 + 3
    assert 21 + 200 < second <= 21 + 200 + 3


def test_nothing_is_late_before_anything_came_back(client: FakeScheduler, stragglers: Stragglers) -> None:
    assert not late_until(client, stragglers, 10_000)


def test_moving_to_another_worker_starts_the_clock_anew(
    client: FakeScheduler, stragglers: Stragglers
) -> None:
    late_until(client, stragglers, 16)
    stragglers.returned("x-0")
    client.tasks = {"a": [], "b": ["x-1"], "c": []}
    assert not late_until(client, stragglers, 150)
    client.tasks = {"a": ["x-1"], "b": [], "c": []}
    assert not late_until(client, stragglers, 300)
    assert [worker for _, worker, _ in late_until(client, stragglers, 400)] == ["a"]


def test_others_are_named_and_strangers_ignored(client: FakeScheduler, stragglers: Stragglers) -> None:
    client.tasks = {"a": ["another-client's"], "b": ["x-1"], "c": []}
    late_until(client, stragglers, 16)
    stragglers.returned("x-0")
    found = []
    while client.now < 1000:
        client.now += 1
        found += stragglers.look(WANTED)
    assert [(late.key, late.others) for late in found] == [("x-1", ("a", "c"))]


def test_a_scheduler_that_is_away_is_left_to_the_heartbeats(
    client: FakeScheduler, stragglers: Stragglers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise OSError("away")

    monkeypatch.setattr(client, "sync", away)
    assert not late_until(client, stragglers, 1000)
