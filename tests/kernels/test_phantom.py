"""A phantom is one volume with one list of cells, whatever boxes are asked for."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import KDTree

from braincensus_kernels.boxes import Box
from braincensus_kernels.phantom import Phantom

SHAPE = (90, 130, 110)
PHANTOM = Phantom(shape=SHAPE, n_cells=700, seed=5, cluster_fraction=0.2, artefacts_per_mm3=40)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return PHANTOM.render(Box.whole(SHAPE))


def centres(cells: dict[str, np.ndarray]) -> np.ndarray:
    return np.stack([cells[axis] for axis in "zyx"], axis=1)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in SHAPE]
    return Box(*(tuple(end) for end in zip(*ends, strict=True)))


@settings(max_examples=30)
@given(box=boxes())
def test_voxels_cells_and_labels_do_not_depend_on_the_box(box: Box, image: np.ndarray) -> None:
    assert np.array_equal(PHANTOM.render(box), image[box.slices])
    every, here = PHANTOM.cells(), PHANTOM.cells(box)
    voxel = np.floor(centres(every) + 0.5)
    inside = ((voxel >= box.start) & (voxel < box.stop)).all(axis=1)
    for name in every:
        assert np.array_equal(here[name], every[name][inside])
    whole = PHANTOM.truth_labels(Box.whole(SHAPE))
    assert np.array_equal(PHANTOM.truth_labels(box), whole[box.slices])


@pytest.mark.parametrize(
    "parameters",
    [
        {"shape": (120, 120, 150)},
        {"shape": (33, 300, 77), "tissue": "full"},
        {"shape": (20, 20, 20), "tissue": "full"},
        {"shape": (90, 90, 90), "voxel_size_um": (10, 3, 3)},
        {"shape": (100, 100, 100), "cluster_fraction": 0.6},
        {"shape": (16, 16, 16)},
    ],
)
def test_as_many_cells_as_fit_are_placed_apart_and_one_more_is_refused(parameters: dict) -> None:
    most = Phantom(n_cells=0, **parameters).capacity
    phantom = Phantom(n_cells=most, seed=1, **parameters)
    cells = phantom.cells()
    assert np.array_equal(cells["label"], np.arange(1, most + 1))
    points = centres(cells) * phantom.voxel_size_um
    assert KDTree(points).query(points, k=2)[0][:, 1].min() >= phantom.separation_um
    assert (centres(cells) >= -0.5).all()
    assert (centres(cells) < np.array(phantom.shape) - 0.5).all()
    with pytest.raises(ValueError, match=f"at most {most}"):
        Phantom(n_cells=most + 1, **parameters)


@pytest.mark.parametrize("n_cells", [0, 1, 2, 17, 999])
def test_the_number_of_cells_is_the_one_asked_for(n_cells: int) -> None:
    for seed in range(3):
        phantom = Phantom(shape=(200, 64, 260), n_cells=n_cells, seed=seed)
        assert len(phantom.cells()["label"]) == n_cells
        halves = [Box((0, 0, 0), (100, 64, 260)), Box((100, 0, 0), (200, 64, 260))]
        assert sum(len(phantom.cells(half)["label"]) for half in halves) == n_cells


def test_cell_parts_are_the_cells_in_order() -> None:
    parts = list(PHANTOM.cell_parts())
    every = PHANTOM.cells()
    assert len(parts) > 1
    for name in every:
        assert np.array_equal(np.concatenate([part[name] for part in parts]), every[name])


def test_cells_are_where_the_image_is_bright() -> None:
    phantom = Phantom(
        shape=(80, 80, 80), n_cells=40, seed=9, texture=0, falloff=0, shading=0, artefacts_per_mm3=0
    )
    cells = phantom.cells()
    image = phantom.render(Box.whole(phantom.shape)).astype(float)
    middle = tuple(np.rint(centres(cells)).astype(int).T)
    assert (image[middle] > phantom.tissue_level + 0.4 * cells["brightness"]).all()
    # One cell alone: the centre of its light is its centroid.
    one = Phantom(shape=(60, 60, 60), n_cells=1, seed=3, texture=0, falloff=0, shading=0, artefacts_per_mm3=0,
                  tissue="full", counts_per_photon=0, read_noise=0)  # fmt: skip
    light = one.render(Box.whole(one.shape)).astype(float) - one.tissue_level
    centre = centres(one.cells())[0]
    assert (np.abs(centre - 30) < 26).all()
    measured = [
        (light.sum(axis=tuple({0, 1, 2} - {axis})) * np.arange(60)).sum() / light.sum() for axis in range(3)
    ]
    assert np.abs(measured - centre)[1:].max() < 0.05
    assert light.max() == pytest.approx(one.cells()["brightness"][0], rel=0.15)


def test_labels_are_the_balls_of_the_cells() -> None:
    phantom = Phantom(shape=(80, 80, 80), n_cells=60, seed=2, voxel_size_um=(2, 2, 2))
    cells = phantom.cells()
    voxels = np.bincount(phantom.truth_labels(Box.whole(phantom.shape)).ravel(), minlength=61)[1:]
    assert np.abs(voxels * 8 / cells["volume_um3"] - 1).max() < 0.15


def test_the_noise_is_that_of_a_camera() -> None:
    quiet = {"n_cells": 0, "texture": 0, "falloff": 0, "shading": 0, "artefacts_per_mm3": 0, "tissue": "full"}
    for level, gain, read in ((410.0, 1.0, 3.0), (130.0, 0.5, 2.0), (5000.0, 2.0, 0.0)):
        phantom = Phantom(
            shape=(64, 64, 64), tissue_level=level, counts_per_photon=gain, read_noise=read, **quiet
        )
        voxels = phantom.render(Box.whole(phantom.shape)).astype(float)
        signal = level - phantom.camera_offset
        assert voxels.mean() == pytest.approx(level, abs=0.02 * signal**0.5 + 0.1)
        assert voxels.var() == pytest.approx(gain * signal + read**2 + 1 / 12, rel=0.02)
        skew = ((voxels - voxels.mean()) ** 3).mean()
        assert skew == pytest.approx(gain**2 * signal, rel=0.25, abs=0.02 * voxels.std() ** 3)


def test_dark_outside_the_tissue(image: np.ndarray) -> None:
    assert np.abs(image[:4, :4, :4].mean() - 110) < 3
    assert image[45, 60:70, 50:60].mean() > 300


def test_the_default_looks_like_cleared_cortex(c5image_path) -> None:
    """Quantiles of intensity at the density of the real volume (its upper planes, darker, left out)."""
    import tifffile

    real = tifffile.imread(c5image_path)[30:]
    phantom = Phantom(shape=(300, 300, 300), cells_per_mm3=3000, seed=5, artefacts_per_mm3=0)
    made = phantom.render(Box((25, 90, 90), (119, 176, 184)))
    at = [5, 25, 50, 75, 95, 99, 99.9]
    assert np.percentile(made, at) == pytest.approx(np.percentile(real, at), rel=0.15)


def test_a_volume_of_a_trillion_voxels_costs_what_its_box_costs() -> None:
    Phantom(shape=(64, 64, 64), n_cells=10).render(Box.whole((64, 64, 64)))  # compile first
    began = time.perf_counter()
    phantom = Phantom(shape=(10_000, 10_000, 10_000), n_cells=200_000_000)
    box = Box((5000, 5001, 5002), (5064, 5065, 5066))
    image, cells = phantom.render(box), phantom.cells(box)
    assert time.perf_counter() - began < 20
    # As many cells as the density says, and labels that know of all cells before them.
    assert 15 < len(cells["label"]) < 160
    assert 2e7 < cells["label"].min() < cells["label"].max() < 1.8e8
    assert image.std() > 20


def test_the_same_in_another_process() -> None:
    code = (
        "import hashlib, pickle, sys; from braincensus_kernels.boxes import Box;"
        "phantom = pickle.loads(sys.stdin.buffer.read());"
        "print(hashlib.sha256(phantom.render(Box((9, 9, 9), (50, 60, 70))).tobytes()).hexdigest())"
    )
    sent = pickle.dumps(PHANTOM)
    assert len(sent) < 2000
    other = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    import hashlib

    here = hashlib.sha256(PHANTOM.render(Box((9, 9, 9), (50, 60, 70))).tobytes()).hexdigest()
    assert other.stdout.decode().strip() == here


def test_seeds_differ(image: np.ndarray) -> None:
    other = Phantom(shape=SHAPE, n_cells=700, seed=6)
    assert not np.array_equal(other.cells()["z"], PHANTOM.cells()["z"])
    assert (other.render(Box.whole(SHAPE)) != image).mean() > 0.5


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"shape": (0, 4, 4)}, "shape"),
        ({"voxel_size_um": (1, 0, 1)}, "voxel_size_um"),
        ({"seed": -1}, "seed"),
        ({"n_cells": -1}, "n_cells"),
        ({"n_cells": 1, "cells_per_mm3": 1}, "not both"),
        ({"radius_um": (2, 1)}, "radius_um"),
        ({"brightness": (5, 1)}, "brightness"),
        ({"psf_sigma_um": (1, 2)}, "psf_sigma_um"),
        ({"tissue": "cube"}, "tissue"),
        ({"cells_per_mm3": 1e6}, "do not fit"),
    ],
)
def test_what_makes_no_sense_is_refused(parameters: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phantom(**{"shape": (64, 64, 64), **parameters})


def test_a_box_outside_is_refused() -> None:
    with pytest.raises(ValueError, match="not inside"):
        PHANTOM.render(Box((0, 0, 0), (91, 10, 10)))
