"""The picture shows what it is given: every claim is read back from its pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

import braincensus.report.picture as picture
from braincensus.errors import ConfigError, OutputError
from braincensus.report.picture import Projection, draw_census, project
from braincensus.volume import open_volume
from braincensus_kernels.boxes import Box
from braincensus_kernels.metrics import match_centroids

BIN_UM = (100.0, 100.0, 100.0)
DARK = Projection(np.zeros((200, 300), np.uint16), (4.0, 4.0), (-2.0, -2.0), (400.0, 800.0, 1200.0))


def table(*points: tuple[float, float], radius: float = 12.0) -> dict[str, np.ndarray]:
    y, x = np.array(points, dtype=float).reshape(-1, 2).T
    return {"z_um": np.zeros(len(y)), "y_um": y, "x_um": x, "radius_um": np.full(len(y), radius)}


def draw(path: Path, **changes: Any) -> np.ndarray:
    arguments = {
        "image": DARK,
        "cells": table((400, 600)),
        "density": np.zeros((4, 8, 12)),
        "density_bin_um": BIN_UM,
        "title": "a census",
    }
    draw_census(path, **{**arguments, **changes})
    pixels = imread(path)[..., :3]
    assert pixels.shape == (1080, 1920, 3)
    return pixels


def where(pixels: np.ndarray, color: str, *, tolerance: float = 0.12) -> np.ndarray:
    """Pixels of a colour inside of the left map (the legend, below it, has the same colours)."""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    hits = np.argwhere(np.abs(pixels - rgb).max(axis=-1) < tolerance)
    left, right, top, bottom = map_box(pixels)
    inside = (hits[:, 1] > left) & (hits[:, 1] < right) & (hits[:, 0] > top) & (hits[:, 0] < bottom)
    return hits[inside]


def map_box(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """Left, right, top, bottom of the left map: the first large run of pure black."""
    black = (pixels < 0.004).all(axis=-1)
    rows = np.flatnonzero(black[:, :960].sum(axis=1) > 300)
    columns = np.flatnonzero(black[rows[0] : rows[-1], :960].sum(axis=0) > 100)
    return columns[0], columns[-1], rows[0], rows[-1]


def place(pixels: np.ndarray, y_um: float, x_um: float) -> tuple[float, float]:
    left, right, top, bottom = map_box(pixels)
    return top + (y_um + 2) / 800 * (bottom - top), left + (x_um + 2) / 1200 * (right - left)


def test_a_cell_is_circled_where_it_is_as_large_as_it_is(tmp_path: Path) -> None:
    pixels = draw(tmp_path / "p.png", cells=table((250, 900), radius=60))
    ring = where(pixels, picture._FOUND)
    left, right, _, _ = map_box(pixels)
    assert ring.mean(axis=0) == pytest.approx(place(pixels, 250, 900), abs=3)
    expected = 2 * 1.4 * 60 / 1200 * (right - left)
    assert np.ptp(ring, axis=0) == pytest.approx([expected, expected], abs=5)


def test_found_missed_and_extra_have_their_colours(tmp_path: Path) -> None:
    found, truth = table((200, 200), (600, 1000)), table((200, 204), (200, 1000))
    match = match_centroids([[0, 200, 200], [0, 600, 1000]], [[0, 200, 204], [0, 200, 1000]], 10)
    pixels = draw(tmp_path / "p.png", cells=found, truth=truth, match=match)
    for color, y, x in (
        (picture._MATCHED, 200, 200),
        (picture._MISSED, 200, 1000),
        (picture._EXTRA, 600, 1000),
    ):
        assert where(pixels, color).mean(axis=0) == pytest.approx(place(pixels, y, x), abs=3)
    assert len(where(pixels, picture._FOUND)) == 0


def test_the_density_is_the_mean_along_z_on_the_same_scale(tmp_path: Path) -> None:
    density = np.zeros((4, 8, 12))
    density[:, 2, 9] = [0, 0, 0, 4000]
    pixels = draw(tmp_path / "p.png", density=density, cells=table())
    bright = np.argwhere(pixels[..., 0] + pixels[..., 1] > 1.7)
    left, right, top, bottom = map_box(pixels)
    wide, tall = right - left, bottom - top
    # The brightest square of the right map is one bin, at the bin's place.
    right_map = bright[(bright[:, 1] > 960) & (bright[:, 0] > top) & (bright[:, 0] < bottom)]
    rows, counts = np.unique(right_map[:, 0], return_counts=True)
    rows = rows[counts > 0.8 * wide / 12]
    assert np.ptp(rows) == pytest.approx(tall / 8, abs=4)
    assert rows.mean() == pytest.approx(top + 2.5 / 8 * tall, abs=4)


@pytest.mark.parametrize("n", [0, 1, 300, 30_000])
def test_any_number_of_cells(tmp_path: Path, n: int) -> None:
    rng = np.random.default_rng(n)
    points = list(zip(rng.random(n) * 790, rng.random(n) * 1190, strict=True))
    pixels = draw(tmp_path / "p.png", cells=table(*points))
    marked = len(where(pixels, picture._FOUND, tolerance=0.5))
    assert (marked > 0) == (n > 0)


def test_tables_of_any_kind_draw_the_same(tmp_path: Path) -> None:
    import pandas as pd
    import pyarrow as pa

    cells = table((250, 900), (100, 100))
    drawn = draw(tmp_path / "dict.png", cells=cells)
    assert np.array_equal(drawn, draw(tmp_path / "pandas.png", cells=pd.DataFrame(cells)))
    assert np.array_equal(drawn, draw(tmp_path / "arrow.png", cells=pa.table(cells)))
    diameters = {**table((250, 900), (100, 100), radius=1.0), "equivalent_diameter_um": np.full(2, 24.0)}
    assert np.array_equal(drawn, draw(tmp_path / "diameter.png", cells=diameters))


@pytest.mark.parametrize("max_side", [1, 7, 40, 100, 1000])
@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_a_projection_read_in_pieces_is_the_projection(
    monkeypatch: pytest.MonkeyPatch, max_side: int, dtype: str
) -> None:
    voxels = (
        np.random.default_rng(0).normal(-50, 300, (11, 53, 100)).clip(0 if dtype == "uint16" else -900)
    ).astype(dtype)
    volume = open_volume(voxels, voxel_size_um=(5, 2, 3))
    monkeypatch.setattr(picture, "_read_shape", lambda _: (4, 20, 33))
    projection = project(volume, max_side=max_side)
    step = -(-100 // max_side)
    whole = voxels.max(axis=0)
    expected = np.array(
        [[whole[y : y + step, x : x + step].max() for x in range(0, 100, step)] for y in range(0, 53, step)]
    )
    assert np.array_equal(projection.pixels, expected)
    assert projection.pixel_size_um == (2 * step, 3 * step)
    assert projection.size_um == (55, 106, 300)


def test_what_is_read_at_once_is_bounded() -> None:
    class Recorder:
        shape, chunks, voxel_size_um = (3000, 4000, 5000), (64, 64, 64), (1.0, 1.0, 1.0)

    z, y, x = picture._read_shape(Recorder())  # type: ignore[arg-type]
    assert z * y * x <= picture._READ_VOXELS
    assert (z % 64, y % 64) == (0, 0)
    assert z * y * x > picture._READ_VOXELS / 4


def test_a_volume_on_disk_is_drawn_from_its_path(tmp_path: Path) -> None:
    from braincensus.phantom import read_truth, write_phantom
    from braincensus_kernels.phantom import Phantom

    phantom = Phantom(shape=(40, 60, 60), n_cells=20, seed=1)
    write_phantom(tmp_path / "p.zarr", phantom)
    truth = read_truth(tmp_path / "p.zarr")
    drawn = draw(tmp_path / "path.png", image=tmp_path / "p.zarr", cells=truth)
    voxels = phantom.render(Box.whole(phantom.shape))
    volume = open_volume(voxels, voxel_size_um=phantom.voxel_size_um)
    assert np.array_equal(drawn, draw(tmp_path / "array.png", image=volume, cells=truth))


def test_a_constant_image_and_an_empty_census_draw(tmp_path: Path) -> None:
    flat = Projection(np.full((10, 40), 7.0), (5.0, 5.0), (0.0, 0.0), (50.0, 50.0, 200.0))
    drawn = draw(tmp_path / "p.png", image=flat, cells=table(), density=np.zeros((1, 1, 2)))
    assert drawn.shape[:2] == (1080, 1920)
    assert len(np.unique(drawn)) > 10  # titles, axes and the colour bar are there


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both"):
        draw(tmp_path / "p.png", truth=table((1, 1)))
    with pytest.raises(ConfigError, match="three dimensions"):
        draw(tmp_path / "p.png", density=np.zeros((3, 3)))
    with pytest.raises(ConfigError, match="no y_um"):
        draw(tmp_path / "p.png", cells={"x_um": np.zeros(3)})
    with pytest.raises(ConfigError, match="the match is of"):
        draw(tmp_path / "p.png", truth=table((1, 1)), match=match_centroids([], [[1, 1, 1]], 2))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        draw(tmp_path / "file" / "p.png")
