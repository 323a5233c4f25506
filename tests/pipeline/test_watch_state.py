"""A run's state: rates, time left, blocks; and what the page makes of it. No cluster, no clock."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from braincensus.blocks import BlockGrid
from braincensus.watch import panels
from braincensus.watch.page import paint
from braincensus.watch.state import (
    BLOCK_STATES,
    DONE,
    FAILED,
    KEPT,
    RETRIED,
    RUNNING,
    WAITING,
    RunState,
    shares,
    unpack_states,
)


def state(**estimates: float) -> RunState:
    return RunState(
        "run", "in", "out", (40, 20, 10), (5.0, 5.0, 5.0), estimates or {"label": 10.0}, now=100.0
    )


class TestRates:
    def test_now_is_of_the_last_ten_seconds_and_mean_of_the_stage(self) -> None:
        run = state(label=60.0)
        run.start("label", 10_000, now=100.0)
        for second in range(1, 41):  # 100 voxels a second, then 10
            run.advance("label", 100 if second <= 20 else 10, now=100.0 + second)
        assert run.rate_now(now=140.0) == pytest.approx(10.0)
        told = run.snapshot(now=140.0)
        assert told["stages"][0]["rate"] == pytest.approx(2200 / 40)

    def test_rare_results_are_averaged_over_the_last_few(self) -> None:
        run = state()
        run.start("label", 10_000, now=0.0)
        for n in range(1, 7):  # one result every 30 s: a window of 10 s would see none
            run.advance("label", 300, now=30.0 * n)
        assert run.rate_now(now=185.0) == pytest.approx(4 * 300 / (185 - 60))

    def test_a_stage_that_hangs_slows_down(self) -> None:
        run = state()
        run.start("label", 1000, now=0.0)
        run.advance("label", 100, now=1.0)
        assert run.rate_now(now=1000.0) == pytest.approx(0.1)

    def test_blocks_of_an_earlier_run_do_not_count_as_speed(self) -> None:
        run = state()
        run.start("label", 1000, now=0.0)
        run.advance("label", 500, now=0.5, kept=True)
        run.advance("label", 100, now=10.0)
        assert run.rate_now(now=10.0) == pytest.approx(10.0)
        assert run.seconds_left(now=10.0) == pytest.approx(400 / 10)


class TestTimeLeft:
    def test_before_anything_is_known_the_plan_is_believed(self) -> None:
        assert state(segment=30.0, label=10.0).seconds_left(now=100.0) == 40.0

    def test_what_comes_is_scaled_by_what_was_seen(self) -> None:
        run = state(segment=1000.0, label=500.0)
        run.start("segment", 100, now=0.0)
        run.advance("segment", 100, now=2000.0)
        run.finish("segment", 2000.0)
        # Twice as slow as estimated, against a doubt of 10 s and a tenth of all estimates.
        assert run.seconds_left(now=2000.0) == pytest.approx(500 * (2000 + 160) / (1000 + 160))

    def test_the_current_stage_goes_by_its_own_pace(self) -> None:
        run = state(segment=1000.0)
        run.start("segment", 100, now=0.0)
        run.advance("segment", 25, now=50.0)
        assert run.seconds_left(now=50.0) == pytest.approx(150.0)

    def test_a_slow_start_of_a_short_stage_does_not_frighten(self) -> None:
        run = state(intensity=1.0, segment=100.0)
        run.start("intensity", 100, now=0.0)
        run.advance("intensity", 100, now=8.0)
        run.finish("intensity", 8.0)
        assert 100 < run.seconds_left(now=8.0) < 140

    def test_a_stage_that_never_came_is_not_waited_for(self) -> None:
        run = state(threshold=100.0, label=10.0)
        run.start("label", 10, now=0.0)
        assert run.stages["threshold"].status == "skipped"
        assert run.seconds_left(now=0.0) == pytest.approx(10.0)

    def test_fraction_weighs_stages_by_their_estimates(self) -> None:
        run = state(segment=30.0, label=10.0)
        run.start("segment", 10, now=0.0)
        run.finish("segment", 5.0)
        run.start("label", 10, now=5.0)
        run.advance("label", 5, now=6.0)
        assert run.fraction() == pytest.approx(35 / 40)
        run.end("finished", now=9.0)
        assert run.fraction() == 1.0

    def test_after_the_end_the_clock_stands_still(self) -> None:
        run = state()
        run.end("failed", now=130.0, failure="broken")
        told = run.snapshot(now=500.0)
        assert (told["elapsed_s"], told["left_s"], told["failures"]) == (30.0, 0.0, ["broken"])


class TestBlocks:
    def test_every_state(self) -> None:
        run = state()
        run.begin_blocks("label", "label-block", (2, 3, 1), (20, 7, 10), (40, 20, 10))
        for number in range(5):
            run.submitted(number, f"key-{number}")
        run.block_done(0, kept=False)
        run.block_done(1, kept=True)
        run.block_retried("label", 2, "its workers died each time")
        run.submitted(2, "key-2-again")
        run.block_done(2, kept=False)
        run.block_failed(3, "label, block 3: broken")
        assert run.blocks is not None
        assert run.blocks.states.tolist() == [DONE, KEPT, RETRIED, FAILED, RUNNING, WAITING]
        assert run.retries == run.stages["label"].retries == 1
        assert list(run.failures) == [
            "label, block 2: its workers died each time; tried again",
            "label, block 3: broken",
        ]
        run.end("failed", now=200.0, failure="label, block 3: broken")
        assert run.blocks.states[4] == WAITING  # it was not done
        assert len(run.failures) == 2  # said once

    def test_a_million_blocks_cost_a_byte_each_and_travel_small(self) -> None:
        run = state()
        run.begin_blocks("label", "label-block", (100, 100, 100), (8, 8, 8), (800, 800, 800))
        assert run.blocks is not None
        assert run.blocks.states.nbytes == 1_000_000
        for number in range(0, 500_000):
            run.block_done(number, kept=False)
        packed = run.snapshot(now=200.0)["blocks"]["states"]
        assert len(packed) < 20_000
        assert np.array_equal(unpack_states(packed), run.blocks.states)

    def test_the_history_keeps_its_span_and_not_its_length(self) -> None:
        run = state()
        run.start("label", 10**9, now=0.0)
        for second in range(5000):
            run.advance("label", 100, now=float(second))
            run.tick(now=float(second))
        assert len(run.history) <= 400
        assert run.history[0][0] < 0 <= run.history[-1][0]  # it began at 100
        assert run.history[-1][0] > 4800 - 100

    def test_lists_do_not_grow(self) -> None:
        run = state()
        for number in range(1000):
            run.block_failed(number, f"broken {number}")
            run.messages.append("said")
        assert len(run.failures) == len(run.messages) == 50
        assert run.failures[-1] == "broken 999"

    @pytest.mark.parametrize("counts", [(1, 1, 1), (2, 3, 4), (5, 1, 2)])
    def test_faces_are_counted_as_they_are_walked(self, counts: tuple[int, int, int]) -> None:
        grid = BlockGrid((counts[0] * 8, counts[1] * 8, counts[2] * 8), (8, 8, 8))
        assert grid.n_faces == len(list(grid.faces()))


class TestMap:
    def test_views_count_along_their_axis(self) -> None:
        states = np.zeros((2, 3, 4), np.uint8)
        states[0, 1, 2], states[1, 1, 2] = DONE, FAILED
        top = shares(states.reshape(-1), (2, 3, 4), axis=0)
        assert top["done"].shape == (3, 4)
        assert (top["done"][1, 2], top["failed"][1, 2], top["waiting"].sum()) == (1, 1, 22)

    def test_what_must_be_seen_is_on_top(self) -> None:
        one = {name: np.zeros((1, 4), np.int64) for name in BLOCK_STATES}
        one["waiting"][:] = 9
        one["done"][0, 1:] = 1
        one["running"][0, 2:] = 1
        one["failed"][0, 3] = 1
        middle = [tuple(rgba[:3]) for rgba in paint(one).view(np.uint8).reshape(4, 4)]
        wanted = [panels.COLOURS[name] for name in ("waiting", "running", "failed")]
        shown = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in (middle[0], middle[2], middle[3])]
        assert all(_near(a, b) for a, b in zip(shown, wanted, strict=True))
        assert middle[1] not in (middle[0], middle[2], middle[3])

    def test_colours_differ_for_every_kind_of_vision(self) -> None:
        # Luminance alone tells waiting, running, done and failed apart.
        names = ("waiting", "running", "done", "failed")
        light = [np.dot(_rgb(panels.COLOURS[name]), (0.2126, 0.7152, 0.0722)) for name in names]
        assert all(a - b > 15 for a, b in pairwise(light))


class TestPanels:
    def test_text_from_outside_is_escaped(self) -> None:
        run = state()
        run.input, run.output = "<script>in</script>", "/data/<b>.zarr"
        run.failures.append("<i>broken</i>")
        told = run.snapshot(now=100.0)
        page = panels.heading(told, silent_s=0, retries=0) + panels.notes(told, ["<u>lost</u>"])
        for tag in ("<script>", "<i>broken", "<u>", "<b>.zarr"):
            assert tag not in page

    def test_a_client_that_says_nothing_is_told(self) -> None:
        told = state().snapshot(now=100.0)
        assert "no news for 2 min" in panels.heading(told, silent_s=100.0, retries=0)
        assert "running" in panels.heading(told, silent_s=3.0, retries=0)

    def test_seams(self) -> None:
        run = state()
        assert "once all blocks are labelled" in panels.seams(run.snapshot(now=0.0))
        run.seams.faces_in_all, run.seams.faces = 4, 2
        assert "exact so far" in panels.seams(run.snapshot(now=0.0))
        run.seams.faces = 4
        assert ">exact<" in panels.seams(run.snapshot(now=0.0))
        run.seams.disagreeing = 1234
        assert "1,234 voxels disagree" in panels.seams(run.snapshot(now=0.0))

    def test_gpus_are_shown_where_there_are_some(self) -> None:
        plain = panels.Worker("a", 1, 2, 50.0, 2**30, 2**32)
        gpu = panels.Worker("b", 1, 2, 50.0, 2**30, 2**32, 87.0, 3 * 2**30, 2**34)
        assert "no GPU" in panels.workers([plain])
        both = panels.workers([plain, gpu])
        assert "no GPU" not in both
        assert "87 %" in both
        assert "3.0 of 16.0 GiB" in both
        assert "No worker is connected" in panels.workers([])


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _near(a: str, b: str) -> bool:
    return max(abs(x - y) for x, y in zip(_rgb(a), _rgb(b), strict=True)) <= 1
