"""Touching: every contact counted from both sides in any blocks, and cells put together as if never apart."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braincensus_kernels.boxes import Box
from braincensus_kernels.measure import DIRECTIONS, measure_labels, merge_partials
from braincensus_kernels.touching import (
    TOUCHING_COLUMNS,
    border_within,
    crossing_correction,
    merge_touching,
    touching_pairs,
)


def rows_of(columns):
    return np.stack([columns[name] for name in TOUCHING_COLUMNS], axis=1).tolist()


def literal_rows(labels, probability):
    """One voxel at a time."""
    rows = {}
    for u in product(*map(range, labels.shape)):
        for k, step in enumerate(DIRECTIONS.tolist()):
            v = tuple(i + d for i, d in zip(u, step, strict=True))
            if not all(0 <= i < n for i, n in zip(v, labels.shape, strict=True)):
                continue
            a, b = sorted((int(labels[u]), int(labels[v])))
            if a == 0 or a == b:
                continue
            row = rows.setdefault((a, b), [0] * 15)
            row[k] += 2
            if sum(map(abs, step)) == 1:
                row[13] += 2
                row[14] += 2 * (int(probability[u]) + int(probability[v]))
    return [[a, b, *row] for (a, b), row in sorted(rows.items())]


def whole_pairs(labels, probability):
    box = Box.whole(labels.shape)
    return touching_pairs(
        labels, kept=box, core=box, n_labels=int(labels.max(initial=0)), probability=probability
    )


def in_blocks(labels, block):
    """Core, kept and local labels of each block, and the labels of the volume that they stand for."""
    whole = Box.whole(labels.shape)
    for core in whole.tiles(block):
        kept = core.dilate(1).clip(whole.shape)
        ids, local = np.unique(np.append(0, labels[kept.slices]), return_inverse=True)
        yield core, kept, local[1:].reshape(kept.shape).astype(np.uint32), ids.astype(np.int64)


def pairs_in_blocks(labels, probability, block):
    parts = []
    for core, kept, local, ids in in_blocks(labels, block):
        rows = touching_pairs(
            local, kept=kept, core=core, n_labels=len(ids) - 1, probability=probability[kept.slices]
        )
        # ids whose order is not that of the local labels: the smaller local label may be the larger cell
        parts.append({**rows, "a": -ids[rows["a"]], "b": -ids[rows["b"]]})
    return parts


def measured_in_blocks(labels, block):
    parts = []
    for core, kept, local, ids in in_blocks(labels, block):
        rows = measure_labels(
            local,
            kept=kept,
            core=core,
            n_labels=len(ids) - 1,
            intensity_q=np.ones(core.shape, np.uint32),
            probability=np.ones(core.shape, np.uint16),
        )
        parts.append({"seed": ids[1:], **rows})
    return merge_partials(parts)


@st.composite
def labelled(draw):
    shape = tuple(draw(st.integers(1, 9)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = rng.integers(1, draw(st.integers(2, 40)), shape)
    labels[rng.random(shape) < draw(st.sampled_from([0.0, 0.3, 0.9]))] = 0
    dtype = draw(st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64]))
    return labels.astype(dtype), rng.integers(0, 65536, shape, dtype=np.uint16)


@settings(max_examples=60, deadline=None)
@given(labelled())
def test_contacts_are_those_of_the_definition(case):
    labels, probability = case
    found = whole_pairs(labels, probability)
    assert tuple(found) == TOUCHING_COLUMNS
    assert all(column.dtype == np.int64 for column in found.values())
    assert rows_of(found) == literal_rows(labels, probability)


@settings(max_examples=60, deadline=None)
@given(labelled(), st.tuples(*[st.integers(1, 10)] * 3))
def test_blocks_add_up_to_the_whole(case, block):
    labels, probability = case
    whole = whole_pairs(labels, probability)
    parts = pairs_in_blocks(labels, probability, block)
    merged = merge_touching([merge_touching(parts[::2]), *parts[1::2]])
    expected = sorted([-b, -a, *row] for a, b, *row in rows_of(whole))
    assert rows_of(merged) == expected


def subtract(together, correction):
    at = np.searchsorted(together["seed"], correction.pop("seed"))
    for name, too_much in correction.items():
        together[name][at] -= too_much


def test_a_cell_that_one_block_alone_knows_by_two_labels():
    """The right block sees where both meet, the left one does not: each corrects what it counted."""
    cell = np.ones((1, 2, 2), np.uint8)
    left, right = Box((0, 0, 0), (1, 2, 1)), Box((0, 0, 1), (1, 2, 2))
    views = {left: np.array([[[1, 1], [2, 2]]], np.uint32), right: np.array([[[1, 1], [1, 1]]], np.uint32)}
    kept, p = Box.whole(cell.shape), np.ones(cell.shape, np.uint16)
    parts = []
    corrections = []
    for core, view in views.items():
        ones = np.ones(core.shape, np.uint32)
        rows = measure_labels(
            view, kept=kept, core=core, n_labels=2, intensity_q=ones, probability=ones.astype(np.uint16)
        )
        parts.append({"seed": np.ones(2, np.int64), **rows})
        pairs = touching_pairs(view, kept=kept, core=core, n_labels=2, probability=p)
        corrections.append(crossing_correction(np.ones(len(pairs["a"]), np.int64), pairs))
    together = merge_partials(parts)
    for correction in corrections:
        subtract(together, correction)
    for name, column in measured_in_blocks(cell, (1, 2, 1)).items():
        np.testing.assert_array_equal(together[name], column, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(labelled(), st.tuples(*[st.integers(1, 10)] * 3), st.integers(1, 5))
def test_cells_put_together_measure_as_if_never_apart(case, block, n_cells):
    labels, probability = case
    cell_of = np.arange(41) % n_cells + 1  # several labels, touching or not, are one cell
    cell_of[0] = 0
    cells = np.where(labels > 0, cell_of[labels.astype(np.int64)], 0)
    apart = measured_in_blocks(labels, block)
    together = merge_partials([{**apart, "seed": cell_of[apart["seed"]]}])
    for pairs in pairs_in_blocks(labels, probability, block):
        a, b = cell_of[-pairs["a"]], cell_of[-pairs["b"]]
        subtract(together, crossing_correction(np.where(a == b, a, -1), pairs))
    expected = measured_in_blocks(cells, block)
    assert list(together) == list(expected)
    for name, column in expected.items():
        np.testing.assert_array_equal(together[name], column, err_msg=name)


def test_the_border_of_two_boxes():
    labels = np.zeros((4, 5, 6), np.uint32)
    labels[1:3, 1:4, :3], labels[1:3, 1:4, 3:] = 2, 1
    probability = np.full(labels.shape, 60000, np.uint16)
    probability[1:3, 1:4, 2], probability[1:3, 1:4, 3] = 20000, 30000
    merged = merge_touching([whole_pairs(labels, probability)])
    assert (merged["a"].tolist(), merged["b"].tolist()) == ([1], [2])
    assert merged["face_contacts"].tolist() == merged["contacts_00"].tolist() == [12]
    assert merged["sum_probability"].tolist() == [12 * 50000]
    # of the 3 x 2 voxels of the border, a step aside leads past the last row, or plane, or both
    seen_from_one_side = [int(merged[f"contacts_{k:02d}"][0]) // 2 for k in range(13)]
    assert seen_from_one_side == [6, 4, 0, 4, 2, 0, 2, 3, 0, 3, 2, 0, 2]
    mean = 25000 / 65535
    assert border_within(merged, mean, mean).tolist() == [[1, 2]]
    assert border_within(merged, 0.3, 0.4).tolist() == [[1, 2]]
    for low, high in ((0.0, mean - 1e-9), (mean + 1e-9, 1.0)):
        assert border_within(merged, low, high).shape == (0, 2)
    with pytest.raises(ValueError, match="lower end"):
        border_within(merged, 0.5, 0.4)


def test_cells_that_touch_along_an_edge_have_no_border():
    labels = np.array([[[1, 0], [0, 2]]], np.uint32)
    merged = merge_touching([whole_pairs(labels, np.full(labels.shape, 65535, np.uint16))])
    assert (merged["contacts_03"].tolist(), merged["face_contacts"].tolist()) == ([2], [0])
    assert border_within(merged, 0, 1).shape == (0, 2)


def test_many_pairs():
    """More than the first table holds, several times over: every voxel a cell."""
    labels = np.arange(1, 12 * 13 * 14 + 1, dtype=np.uint32).reshape(12, 13, 14)
    found = whole_pairs(labels, np.ones(labels.shape, np.uint16))
    for k, step in enumerate(np.abs(DIRECTIONS)):
        assert found[f"contacts_{k:02d}"].sum() == 2 * np.prod(np.array(labels.shape) - step)
    assert max(int(found[f"contacts_{k:02d}"].max()) for k in range(13)) == 2
    keys = found["a"] * labels.size * 2 + found["b"]
    assert (np.diff(keys) > 0).all()
    assert (found["a"] < found["b"]).all()


def test_nothing_touches():
    labels = np.zeros((5, 5, 5), np.uint32)
    labels[::2, ::2, ::2] = np.arange(1, 28).reshape(3, 3, 3)
    empty = merge_touching([whole_pairs(labels, np.ones(labels.shape, np.uint16))])
    none = merge_touching([])
    for table in (empty, none):
        assert tuple(table) == TOUCHING_COLUMNS
        assert all(column.size == 0 and column.dtype == np.int64 for column in table.values())
    assert border_within(none, 0, 1).shape == (0, 2)
    assert crossing_correction(np.empty(0, np.int64), none)["seed"].size == 0


def test_what_does_not_fit_is_refused():
    box, half = Box.whole((4, 4, 4)), Box((2, 0, 0), (4, 4, 4))
    labels, p = np.ones(box.shape, np.uint32), np.ones(box.shape, np.uint16)
    labels[0] = 2
    with pytest.raises(ValueError, match="label 2 is larger than n_labels 1"):
        touching_pairs(labels, kept=box, core=box, n_labels=1, probability=p)
    beyond = np.array([[[1], [5]]], np.uint32)  # in the halo
    with pytest.raises(ValueError, match="label 5 is larger"):
        touching_pairs(
            beyond,
            kept=Box.whole((1, 2, 1)),
            core=Box.whole((1, 1, 1)),
            n_labels=1,
            probability=np.ones((1, 2, 1), np.uint16),
        )
    with pytest.raises(ValueError, match="expected labels"):
        touching_pairs(labels, kept=box, core=box, n_labels=2, probability=p[1:])
    with pytest.raises(ValueError, match="one voxel more"):
        touching_pairs(labels, kept=box, core=half, n_labels=2, probability=p)
    with pytest.raises(TypeError, match="uint16"):
        touching_pairs(labels, kept=box, core=box, n_labels=2, probability=labels)
    rows = whole_pairs(labels, p)
    with pytest.raises(ValueError, match="with itself"):
        merge_touching([{**rows, "b": rows["a"]}])
    with pytest.raises(ValueError, match="columns"):
        merge_touching([{"a": rows["a"], "b": rows["b"]}])
    with pytest.raises(TypeError, match="int64"):
        merge_touching([{**rows, "a": rows["a"].astype(np.uint32)}])
    with pytest.raises(ValueError, match="one int64 cell"):
        crossing_correction(np.zeros(3, np.int64), rows)
