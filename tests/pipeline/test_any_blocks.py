"""Label, stitch, relabel and measure give the single shot's answer: any labeller, blocks, order, repetition.

The stages run in this process, their tasks in random order and some of them again, on foreground
probabilities made to be hard: flat tops, things that wind through every block, slabs one voxel thick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from braincensus import RunConfig, open_volume
from braincensus.cluster import GIB, Resources
from braincensus.labelling import WatershedLabeller
from braincensus.planning import make_plan
from braincensus.progress import Silent
from braincensus.stages import label, measure, numbering, relabel, stitch
from braincensus.stages.segment import PROBABILITY
from braincensus.store import create_output, open_cells
from braincensus.store.packing import pack, unpack
from braincensus.tasks import Context
from braincensus_kernels.boxes import Box
from braincensus_kernels.components import connected_components
from braincensus_kernels.intensity import scale_for
from braincensus_kernels.voronoi_otsu import voronoi_otsu
from braincensus_kernels.watershed import distance_watershed, watershed


@pytest.fixture(scope="module", autouse=True)
def few_cells_at_once():
    """Number and tabulate so few cells at once that a small volume has many slabs and parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbering, "_CELLS_PER_SLAB", 7)
        patch.setattr(measure, "_CELLS_PER_PART", 11)
        yield


TOP = 65535
VOXEL_SIZE_UM = (2.0, 1.0, 1.0)


@dataclass
class Shuffled(Context):
    """Runs tasks here, in a random order, a third of them again later on; results as marks keep them."""

    rng: np.random.Generator = field(default_factory=np.random.default_rng)

    def map(self, stage, function, spec, grid, *, name, classes=(), after=""):
        done: list[int] = []
        for number in self.rng.permutation(len(grid)).tolist():
            result = function(spec, number)
            done.append(number)
            if self.rng.random() < 1 / 3:
                function(spec, int(self.rng.choice(done)))
            yield number, unpack(pack(result), classes)


@dataclass(frozen=True)
class Found:
    labels: np.ndarray
    cells: pd.DataFrame
    seams: Any
    counts: dict[str, int]


def census(
    probability: np.ndarray, folder: Path, *, block=None, seed=0, gib=8.0, intensity=None, **changes: Any
) -> Found:
    """Run the stages from label on; `changes` are sections of the configuration."""
    shape = probability.shape
    image = probability if intensity is None else intensity
    volume = open_volume(image, voxel_size_um=VOXEL_SIZE_UM)
    config = RunConfig().merged(
        {"foreground": {"model": "intensity"}, "compute": {"block_voxels": block or shape}, **changes}
    )
    resources = Resources(1, 1, int(gib * GIB), "cpu", "local")
    plan = make_plan(volume, config, resources, channels=None, precision="float32")
    output = create_output(folder / "out.zarr", overwrite=True, voxel_size_um=VOXEL_SIZE_UM)
    output.create_array(PROBABILITY, shape=shape, dtype="uint16", chunk=shape, shard=shape)
    output.write_block(PROBABILITY, Box.whole(shape), probability)
    context = Shuffled(plan, output, None, Silent(), rng=np.random.default_rng(seed))
    scale = scale_for(volume.dtype, 0.0, 0.0)
    blocks = label.run(context, scale=scale, threshold=config.labelling.threshold * TOP)
    index, audit, counts = stitch.run(context, blocks, scale)
    relabel.run(context, index)
    measure.run(context, index, scale)
    return Found(
        output.read_block(relabel.LABELS, Box.whole(shape)), open_cells(output).to_pandas(), audit, counts
    )


def blobs(seed: int, shape: tuple[int, int, int], sigma: float = 1.2) -> np.ndarray:
    image = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), sigma)
    image = (image - image.min()) / max(np.ptp(image), 1e-9)
    return (np.clip(image * 1.6 - 0.3, 0, 1) * TOP).astype(np.uint16)


def winding(shape: tuple[int, int, int]) -> np.ndarray:
    """One thing that goes up and down through the whole volume, beside another."""
    image = np.zeros(shape, np.uint16)
    for n, y in enumerate(range(1, shape[1] - 1, 4)):
        image[1:-1, y, 1:-1:6] = TOP
        image[1 if n % 2 else -2, y : y + 4, 1:-1:6] = TOP
    image[0, 0, :] = TOP
    return image


METHODS: dict[str, dict[str, Any]] = {
    "voronoi-otsu": {"method": "voronoi-otsu", "threshold": 0.5, "max_radius_um": 6},
    "components": {"method": "components", "threshold": 0.5},
    "watershed": {
        "method": "watershed",
        "threshold": 0.4,
        "seed_threshold": 0.75,
        "max_radius_um": 6,
    },
    "distance": {
        "method": "watershed",
        "seeds": "distance",
        "threshold": 0.5,
        "seed_sigma": 0.5,
        "max_radius_um": 6,
    },
}


def single_shot(method: str, probability: np.ndarray) -> np.ndarray:
    how = METHODS[method]
    threshold = how["threshold"] * TOP
    if method == "voronoi-otsu":
        return voronoi_otsu(probability, 0.65, 0.65, threshold=threshold, max_radius=6)
    if method == "components":
        return connected_components(probability, threshold)
    if method == "watershed":
        return watershed(
            probability, threshold=threshold, seed_threshold=how["seed_threshold"] * TOP, max_radius=6
        )
    return distance_watershed(
        probability,
        threshold=threshold,
        seed_sigma=0.5,
        spacing=(2000, 1000, 1000),
        limit=6000,
        max_radius=6,
    )


@st.composite
def volumes(draw) -> np.ndarray:
    shape = tuple(draw(st.integers(1, 26)) for _ in range(3))
    kind = draw(st.sampled_from(["blobs", "flat", "binary", "winding", "empty", "full"]))
    image = blobs(draw(st.integers(0, 10**6)), shape, draw(st.sampled_from([0.7, 1.2, 2.5])))
    if kind == "flat":
        image = np.minimum(image, np.uint16(0.8 * TOP))
    elif kind == "binary":
        image = np.where(image > 0.5 * TOP, np.uint16(TOP), np.uint16(0))
    elif kind == "winding" and min(shape) > 2:
        image = winding(shape)
    elif kind in ("empty", "full"):
        image[:] = TOP if kind == "full" else 0
    return image


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(volumes(), st.tuples(*[st.integers(2, 24)] * 3), st.integers(0, 10**6))
def test_any_blocks_and_any_order_give_the_single_shot(method, tmp_path, image, block, seed):
    block = tuple(min(n, max(b, n * 2 // 5)) for b, n in zip(block, image.shape, strict=True))
    whole = census(image, tmp_path, labelling=METHODS[method])
    np.testing.assert_array_equal(whole.labels, single_shot(method, image))
    parts = census(image, tmp_path, block=block, seed=seed, labelling=METHODS[method])
    np.testing.assert_array_equal(parts.labels, whole.labels)
    pd.testing.assert_frame_equal(parts.cells, whole.cells, check_exact=True)
    assert parts.seams.exact
    assert not parts.seams.incomplete
    assert np.array_equal(np.bincount(parts.labels.ravel())[1:], parts.cells["volume_voxels"])


RULES: dict[str, dict[str, Any]] = {
    "closing": {"labelling": {"closing_radius_um": 2.5, "foreground_threshold": 0.45}},
    "merge_border": {"labelling": {"merge_border": (0.6, 1.0)}},
    "large_objects": {"filters": {"max_object_volume_um3": 1200}},
    "whole_cells": {
        "filters": {"min_volume_um3": 30, "max_volume_um3": 300, "min_sphericity": 0.6},
    },
    "intensity": {"filters": {"min_mean_intensity": 36_500, "max_mean_intensity": 42_000}},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["voronoi-otsu", "watershed"])
def test_rules_for_whole_cells_do_not_depend_on_blocks(rule, method, tmp_path):
    image = blobs(11, (22, 40, 40), 1.3)
    image[image < 0.54 * TOP] = 0
    changes = {**RULES[rule], "labelling": {**METHODS[method], **RULES[rule].get("labelling", {})}}
    plain = census(image, tmp_path, labelling=METHODS[method])
    whole = census(image, tmp_path, **changes)
    assert 0 < len(whole.cells) < len(plain.cells)
    for seed, block in enumerate([(11, 20, 20), (22, 13, 9), (5, 40, 17)]):
        parts = census(image, tmp_path, block=block, seed=seed, **changes)
        np.testing.assert_array_equal(parts.labels, whole.labels)
        pd.testing.assert_frame_equal(parts.cells, whole.cells, check_exact=True)
        assert parts.counts == whole.counts
        assert parts.seams.exact


def two_balls(gap_probability: float) -> np.ndarray:
    """Two bright boxes that touch across the plane x = 12, whose border is as bright as told."""
    image = np.zeros((8, 8, 24), np.uint16)
    image[2:6, 2:6, 4:20] = TOP
    image[2:6, 2:6, 10:14] = int(gap_probability * TOP)
    return image


@pytest.mark.parametrize(("border", "cells"), [(0.3, 2), (0.36, 1), (0.7, 1)])
def test_touching_cells_merge_where_their_border_is_as_bright_as_asked(border, cells, tmp_path):
    """The paper's skull nuclei: labels whose touching border lies between 35 and 100 on a scale of 100."""
    image = two_balls(border)
    labelling = METHODS["watershed"] | {"threshold": 0.2, "merge_border": (0.35, 1.0)}
    for block in (None, (8, 8, 12), (4, 4, 7)):
        found = census(image, tmp_path, block=block, labelling=labelling)
        assert len(found.cells) == cells
        assert found.counts["merged_by_border"] == 2 - cells
    # one cell's surface is that of the whole bar, without the border inside it
    if cells == 1:
        alone = census(image, tmp_path, labelling=METHODS["components"] | {"threshold": 0.2})
        assert found.cells["surface_um2"].tolist() == alone.cells["surface_um2"].tolist()


def test_an_artefact_is_removed_whole_with_all_the_cells_that_it_was_taken_for(tmp_path):
    """The paper removes objects above a size before it tells cells apart; here after, the same objects."""
    image = blobs(2, (24, 48, 48), 1.0)
    image[image < 0.55 * TOP] = 0
    image[8:16, 8:40, 8:40] = np.maximum(image[8:16, 8:40, 8:40], int(0.7 * TOP))
    changes = {"labelling": METHODS["voronoi-otsu"], "filters": {"max_object_volume_um3": 2000}}
    plain = census(image, tmp_path, labelling=METHODS["voronoi-otsu"])
    for block in (None, (12, 24, 24)):
        found = census(image, tmp_path, block=block, **changes)
        assert not found.labels[9:15, 9:39, 9:39].any()
        assert found.counts["removed_by_filters"] > 20
        assert len(found.cells) + found.counts["removed_by_filters"] == len(plain.cells)


def test_filters_judge_whole_cells_not_their_parts(tmp_path):
    """A cell cut by a face into a large and a tiny part is one cell of its full size (igneous drops it)."""
    image = np.zeros((12, 12, 24), np.uint16)
    image[4:8, 4:8, 5:13] = TOP  # x = 12 is its last plane
    image[2, 2, 20] = TOP  # and a speck of one voxel, 2 um^3
    for method in METHODS:
        if method == "distance":
            continue  # blurs the speck away
        labelling = METHODS[method] | {"outline_sigma": 0.0}
        labelling |= {"spot_sigma": 0.5} if method == "voronoi-otsu" else {}
        labelling |= {"min_seed_voxels": 1} if method == "watershed" else {}
        found = census(
            image, tmp_path, block=(12, 12, 12), labelling=labelling, filters={"min_volume_um3": 40}
        )
        assert found.cells["volume_voxels"].tolist() == [4 * 4 * 8], method


def test_a_larger_halo_is_read_where_the_planned_one_does_not_decide(tmp_path):
    """A flood that may come from beyond the halo: noticed, and followed until it is certain."""
    image, labelling = long_flood()
    whole = census(image, tmp_path, labelling=labelling)
    parts = census(image, tmp_path, block=(8, 8, 50), labelling=labelling)
    assert parts.seams.blocks_with_larger_halo > 0
    assert not parts.seams.incomplete
    np.testing.assert_array_equal(parts.labels, whole.labels)


def test_what_memory_cannot_decide_is_counted_and_listed(tmp_path):
    """The same with no memory for more than the planned halo: the run goes on, and says where."""
    image, labelling = long_flood()
    parts = census(image, tmp_path, block=(8, 8, 50), labelling=labelling, gib=0.5)
    listed = parts.seams.summary()["incomplete"]
    assert parts.seams.summary()["incomplete_blocks"] == len(listed) > 0
    for entry in listed:
        assert entry["start"] == [0, 0, entry["block"] * 50]
        assert entry["stop"] == [8, 8, entry["block"] * 50 + 50]
    assert parts.labels.max() == len(parts.cells) > 0


def long_flood() -> tuple[np.ndarray, dict[str, Any]]:
    """Many seeds in one bar with hardly any relief: what floods a voxel might come from beyond the halo."""
    image = np.full((8, 8, 400), int(0.6 * TOP), np.uint16)
    image[:, :, ::2] -= np.uint16(500)
    image[3:5, 3:5, 5:395:6] = TOP
    return image, METHODS["watershed"] | {"max_radius_um": 3, "seed_threshold": 0.7, "min_seed_voxels": 1}


def test_a_threshold_above_the_seeds_own_is_theirs_too(tmp_path):
    """Otsu's threshold is found in the run, long after the configuration was checked."""
    image = blobs(4, (12, 16, 16))
    labeller = WatershedLabeller((0.0, 0.0, 0.0), 0.3 * TOP, 1, 4)
    box = Box.whole(image.shape)
    found = labeller.label(image, outer=box, core=box, volume_shape=image.shape, threshold=0.6 * TOP)
    np.testing.assert_array_equal(found.labels > 0, image > 0.6 * TOP)
