"""The plan: a value that says what a run would cost, and refuses what cannot fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from braincensus import PlanError, RunConfig, open_volume
from braincensus.cluster import GIB, Resources
from braincensus.planning import make_plan

CHANNELS = (16, 32, 64, 128)


def resources(gib: float, threads: int = 2, workers: int = 1) -> Resources:
    return Resources(workers, threads, int(gib * GIB), "cpu", "local")


def planned(shape, changes=None, gib=8.0, channels=CHANNELS, **how):
    small = open_volume(np.zeros((1, 1, 1), np.uint16), voxel_size_um=(5.0, 2.0, 2.0))
    volume = replace(small, shape=shape)  # a plan reads no voxel
    config = RunConfig().merged(changes or {})
    return make_plan(volume, config, resources(gib, **how), channels=channels, precision="float32")


def test_the_halo_is_the_labellers_reach():
    plan = planned((300, 300, 300), {"labelling": {"max_radius_um": 20, "spot_sigma": 2, "outline_sigma": 1}})
    assert plan.labeller.max_steps == 10  # 20 um in steps of the finest voxel, 2 um
    assert plan.label_grid.halo == (20, 20, 20)  # 10 steps, 8 of the spot blur and 1, 1 for the audit


def test_sigmas_in_um_follow_the_voxel_size():
    plan = planned((64, 64, 64), {"labelling": {"spot_sigma": 5, "sigma_unit": "um"}})
    assert plan.labeller.spot_sigma == (1.0, 2.5, 2.5)


def test_patches_never_depend_on_the_label_blocks():
    grids = [
        planned((300, 200, 100), {"compute": {"block_voxels": block}}).segment_grid
        for block in (None, 48, (64, 96, 31))
    ]
    assert grids[0] == grids[1] == grids[2]
    assert all(n % 8 == 0 for n in grids[0].block_shape)


def test_a_larger_worker_gets_larger_blocks_and_never_more_than_it_holds():
    sides = []
    for gib in (1.5, 3, 8, 64):
        plan = planned(
            (4000, 4000, 4000), gib=gib, channels=None, changes={"foreground": {"model": "intensity"}}
        )
        assert plan.memory_bytes["label"] <= gib * GIB
        sides.append(plan.label_grid.block_shape[0])
    assert sides == sorted(sides)
    assert sides[0] < sides[-1]


def test_a_block_that_cannot_fit_is_refused_with_one_that_does():
    changes = {"foreground": {"model": "intensity"}, "compute": {"block_voxels": 512}}
    plan = planned((2000, 2000, 2000), changes, gib=4, channels=None)
    with pytest.raises(PlanError, match=r"--block-size (\d+),\1,\1 fits") as caught:
        plan.check()
    side = int(str(caught.value).split("--block-size ")[1].split(",")[0])
    planned((2000, 2000, 2000), {**changes, "compute": {"block_voxels": side}}, gib=4, channels=None).check()


def test_a_disk_that_is_too_small_is_refused():
    with pytest.raises(PlanError, match="disk"):
        planned((2000, 2000, 2000), gib=64).check(free_disk_bytes=GIB)


def test_a_patch_off_the_lattice_is_refused():
    with pytest.raises(PlanError, match="128,104,128"):
        planned((200, 200, 200), {"foreground": {"model": "wnet3d", "patch_voxels": (128, 100, 128)}})


def test_a_patch_that_cannot_fit_is_refused_with_the_largest_that_does():
    def with_patch(side):
        changes = {"foreground": {"model": "wnet3d", "patch_voxels": side}}
        return planned((2000, 2000, 2000), changes, gib=4, channels=(64, 128, 256, 512))

    with pytest.raises(PlanError, match=r"patch_voxels: \[(\d+), \1, \1\], the largest") as caught:
        with_patch(192).check()
    side = int(str(caught.value).split("patch_voxels: [")[1].split(",")[0])
    with_patch(side).check()
    with pytest.raises(PlanError, match=rf"\[{side}, "):
        with_patch(side + 8).check()


def test_a_terabyte_plans_at_once_and_stays_within_the_graph_budget():
    plan = planned((8000, 8000, 8000), gib=16)
    assert len(plan.segment_grid) <= 100_000
    assert len(plan.label_grid) <= 100_000
