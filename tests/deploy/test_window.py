"""Workers that come later get work, too."""

from __future__ import annotations

import time

import pytest
from distributed import Client, LocalCluster

from braincensus import flight, tasks


def slowly(spec: float, number: int) -> int:
    time.sleep(spec)
    return number


def test_tasks_in_flight_grow_with_the_cluster(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flight, "_ASK_AGAIN_S", 0.0)
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster) as client,
    ):
        seen = []
        results = tasks.map_blocks(
            slowly, 0.02, range(60), client=client, at_once=3, stage="test", name="test"
        )
        done = [next(results)[0]]
        cluster.scale(4)
        client.wait_for_workers(4)
        for number, _ in results:
            done.append(number)
            seen.append(len(client.futures))
        assert sorted(done) == list(range(60)), "each once"
        assert max(seen) > 6, "more than one worker can hold"
        assert max(seen) <= 13, "three for each thread, and the one that was just done"
