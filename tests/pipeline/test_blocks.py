"""Blocks tile the volume exactly, whatever the shapes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from braincensus.blocks import BlockGrid
from braincensus_kernels.boxes import Box

shapes = st.tuples(*[st.integers(1, 13)] * 3)
sides = st.tuples(*[st.integers(1, 6)] * 3)
halos = st.tuples(*[st.integers(0, 8)] * 3)


@given(shapes, sides, halos)
def test_cores_cover_every_voxel_once_and_outers_stay_inside(shape, side, halo):
    grid = BlockGrid(shape, side, halo)
    written = np.zeros(shape, dtype=np.int32)
    for number, block in enumerate(grid):
        assert block.number == number
        assert grid.at(block.index) == block
        written[block.core.slices] += 1
        assert Box.whole(shape).contains(block.outer)
        assert block.outer.contains(block.core)
        assert block.outer == block.core.dilate(halo).clip(shape)
    assert (written == 1).all()


@given(shapes, sides)
def test_faces_join_neighbours_once(shape, side):
    grid = BlockGrid(shape, side)
    faces = list(grid.faces())
    assert len({(face.low, face.high) for face in faces}) == len(faces)
    nz, ny, nx = grid.counts
    assert len(faces) == (nz - 1) * ny * nx + nz * (ny - 1) * nx + nz * ny * (nx - 1)
    for face in faces:
        low, high = grid[face.low].core, grid[face.high].core
        assert low.stop[face.axis] == high.start[face.axis]
        assert all(
            low.start[axis] == high.start[axis] and low.stop[axis] == high.stop[axis]
            for axis in range(3)
            if axis != face.axis
        )


@given(shapes, sides, st.integers(0, 15), st.data())
def test_neighbours_are_the_blocks_within_a_distance(shape, side, distance, data):
    grid = BlockGrid(shape, side)
    block = grid[data.draw(st.integers(0, len(grid) - 1))]
    near = block.core.dilate(distance)
    assert grid.neighbours(block, distance) == [b.number for b in grid if near.intersect(b.core).size > 0]


def test_a_grid_refuses_nonsense_and_numbers_outside():
    with pytest.raises(ValueError, match="positive shapes"):
        BlockGrid((0, 4, 4), (2, 2, 2))
    with pytest.raises(IndexError, match="block 8 of 8"):
        BlockGrid((4, 4, 4), (2, 2, 2))[8]


def test_a_grid_of_a_terabyte_is_a_value():
    grid = BlockGrid((8000, 8000, 8000), (256, 256, 256), (16, 16, 16))
    assert len(grid) == 32**3
    assert grid[len(grid) - 1].core.stop == (8000, 8000, 8000)
