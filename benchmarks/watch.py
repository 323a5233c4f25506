"""What watching a run costs: trivial tasks through `map_blocks`, told to the page and not told.

    python benchmarks/watch.py [TASKS] [REPEATS]

The two take turns on one cluster of one process, so that what slows the machine slows both.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from typing import Any

from distributed import Client, LocalCluster

from braincensus.blocks import BlockGrid
from braincensus.progress import Silent
from braincensus.tasks import map_blocks
from braincensus.watch.state import RunState
from braincensus.watch.tell import UNWATCHED, Unwatched, Watch, showing


def nothing(spec: None, number: int) -> int:
    return number


def seconds_of(client: Client, tasks: int, *, told: bool) -> float:
    grid = BlockGrid((tasks, 1, 1), (1, 1, 1))
    watch: Unwatched = UNWATCHED
    context: Any = nullcontext()
    if told:
        state = RunState("run", "in", "out", (tasks, 1, 1), (1, 1, 1), {"label": 1.0}, now=time.monotonic())
        watch = Watch(state, Silent())
        watch.start("label", tasks)
        context = showing(client, watch, tell=lambda text: None)
    with context:
        watch.blocks("label", "label-block", grid)
        began = time.perf_counter()
        for number, _ in map_blocks(
            nothing, None, range(tasks), client=client, stage="label", name="label-block", watch=watch
        ):
            watch.done("label", number, 1, kept=False)
        return time.perf_counter() - began


def main() -> None:
    tasks = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        seconds_of(client, 1000, told=True)
        for _ in range(repeats):
            without = seconds_of(client, tasks, told=False)
            with_page = seconds_of(client, tasks, told=True)
            print(
                f"{tasks:,} tasks: {without:.2f} s, told to the page {with_page:.2f} s: "
                f"{1e6 * (with_page - without) / tasks:+.0f} us a task"
            )
    watch = Watch(
        RunState("run", "in", "out", (10**6, 1, 1), (1, 1, 1), {"label": 1.0}, now=time.monotonic()), Silent()
    )
    watch.start("label", 10**6)
    watch.blocks("label", "label-block", BlockGrid((10**6, 1, 1), (1, 1, 1)))
    began = time.perf_counter()
    for number in range(100_000):
        watch.submitted(number, f"label-block-{number}-0123456789ab")
        watch.returned(f"label-block-{number}-0123456789ab")
        watch.done("label", number, 1, kept=False)
    print(f"telling alone: {(time.perf_counter() - began) / 0.1:.1f} us a block")
    began = time.perf_counter()
    watch.snapshot()
    print(f"a picture of a million blocks: {1e3 * (time.perf_counter() - began):.1f} ms, twice a second")


if __name__ == "__main__":
    main()
