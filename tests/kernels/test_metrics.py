"""Matching is one to one, nearest first, and scores follow their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from braincensus_kernels.metrics import f1_of_labels, match_centroids, match_labels


def test_scores_of_a_case_counted_by_hand() -> None:
    true = [[0, 0, 0], [10, 0, 0], [20, 0, 0], [30, 0, 0]]
    found = [[1, 0, 0], [10, 0, 0.5], [50, 0, 0], [20, 0, 3], [60, 0, 0]]
    match = match_centroids(found, true, max_distance_um=2)
    assert match.found_index.tolist() == [1, 0]
    assert match.true_index.tolist() == [1, 0]
    assert match.quality.tolist() == [0.5, 1.0]
    assert match.extra.tolist() == [2, 3, 4]
    assert match.missed.tolist() == [2, 3]
    assert (match.precision, match.recall, match.f1, match.count_error) == (2 / 5, 2 / 4, 4 / 9, 1 / 4)


def test_one_true_cell_has_one_partner_the_nearest() -> None:
    match = match_centroids([[0, 0, 1], [0, 0, 0.5], [0, 0, -2]], [[0, 0, 0]], max_distance_um=5)
    assert match.found_index.tolist() == [1]
    assert match.extra.tolist() == [0, 2]
    # Split cells cost precision, merged cells recall.
    assert match.precision == pytest.approx(1 / 3)
    assert match_centroids([[0, 0, 0]], [[0, 0, 1], [0, 0, -1]], max_distance_um=5).recall == 0.5


def test_ties_go_to_the_first() -> None:
    match = match_centroids([[0, 0, 1], [0, 0, -1]], [[0, 0, 0]], max_distance_um=5)
    assert match.found_index.tolist() == [0]


@pytest.mark.parametrize(
    ("found", "true", "expected"),
    [
        ([], [], (1.0, 1.0, 1.0, 0.0)),
        ([], [[0, 0, 0]], (1.0, 0.0, 0.0, -1.0)),
        ([[0, 0, 0]], [], (0.0, 1.0, 0.0, float("inf"))),
    ],
)
def test_empty_sides(found: list, true: list, expected: tuple) -> None:
    match = match_centroids(found, true, 3)
    assert (match.precision, match.recall, match.f1, match.count_error) == expected


points = st.lists(st.tuples(*[st.integers(0, 12)] * 3), max_size=25)


@given(found=points, true=points, reach=st.integers(0, 6))
def test_matching_is_the_greedy_one(found: list, true: list, reach: int) -> None:
    match = match_centroids(found, true, reach)
    pairs = sorted(
        (sum((a - b) ** 2 for a, b in zip(p, q, strict=True)), i, j)
        for i, p in enumerate(found)
        for j, q in enumerate(true)
    )
    expected = []
    for square, i, j in pairs:
        if square <= reach**2 and all(i != a and j != b for a, b in expected):
            expected.append((i, j))
    assert list(zip(match.found_index.tolist(), match.true_index.tolist(), strict=True)) == expected
    back = match_centroids(true, found, reach)
    assert (back.n_matched, back.precision) == (match.n_matched, match.recall)


def test_many_points_are_matched_in_seconds() -> None:
    rng = np.random.default_rng(0)
    true = rng.random((200_000, 3)) * 4300
    found = true + rng.normal(0, 1, true.shape)
    match = match_centroids(found, true, 10)
    assert (match.found_index == match.true_index).mean() > 0.999
    assert match.f1 > 0.999


@pytest.mark.parametrize("bad", [[[1, 2]], [1, 2, 3], [[np.nan, 0, 0]]])
def test_points_that_are_not_are_refused(bad: list) -> None:
    with pytest.raises(ValueError, match="found_zyx_um"):
        match_centroids(bad, [[0, 0, 0]], 1)
    with pytest.raises(ValueError, match="max_distance_um"):
        match_centroids([], [], -1)


def test_labels_match_at_half_overlap_and_not_below() -> None:
    a = np.zeros((4, 6, 6), np.uint32)
    b = np.zeros((4, 6, 6), np.int64)
    a[0, 0, :4], b[0, 0, 1:5] = 9, 4  # 3 of 5
    a[1, 0, :2], b[1, 0, 1:3] = 3, 8  # 1 of 3
    a[2, 0, :2], b[2, 0, :4] = 5, 6  # exactly one half
    a[3, 0, 0] = 70  # not in b
    match = match_labels(a, b)
    assert match.found_index.tolist() == [9, 5]
    assert match.true_index.tolist() == [4, 6]
    assert match.quality.tolist() == [0.6, 0.5]
    assert match.extra.tolist() == [3, 70]
    assert match.missed.tolist() == [8]
    assert f1_of_labels(a, b) == 4 / 7
    assert match_labels(a, b, iou=0.51).n_matched == 1
    assert match_labels(a, b, iou=1 / 3).n_matched == 3


def test_labels_equal_up_to_numbering_score_one() -> None:
    rng = np.random.default_rng(1)
    a = rng.integers(0, 50, (20, 20, 20))
    numbers = np.append(0, rng.permutation(1000)[:49] + 1)
    assert f1_of_labels(a, numbers[a]) == 1.0
    assert f1_of_labels(a, np.zeros_like(a)) == 0.0
    assert f1_of_labels(np.zeros((0, 3), np.uint32), np.zeros((0, 3), np.uint8)) == 1.0
    assert f1_of_labels(np.zeros(9, np.uint64), np.zeros(9, np.uint8)) == 1.0
    # Without background, and with labels beyond 32 bits.
    assert f1_of_labels(a + 1, (a + 1).astype(np.uint64) << np.uint64(33)) == 1.0


def test_labels_that_are_not_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        match_labels([1, 2], [1])
    with pytest.raises(ValueError, match="negative"):
        match_labels([-1], [1])
    with pytest.raises(TypeError, match="integer"):
        match_labels([0.5], [1])
    with pytest.raises(ValueError, match="iou"):
        match_labels([1], [1], iou=0)
