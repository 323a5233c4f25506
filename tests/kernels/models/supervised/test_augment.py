"""Augmentation: image and labels move together, labels stay labels, and a seed says it all."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from braincensus_kernels.models.supervised.augment import Augmentation

N = 24
ALWAYS = Augmentation(shift=0.0, affine_probability=0.5, elastic_probability=0.5)
FLIPS_AND_TURNS = Augmentation(shift_probability=0.0, affine_probability=0.0, elastic_probability=0.0)


@pytest.fixture
def crop() -> tuple[Tensor, Tensor]:
    """A few balls off the centre: no flip, turn or shift leaves them as they are."""
    grid = np.indices((N, N, N))
    centres = ((7, 9, 8), (15, 8, 12), (10, 16, 15))
    distance = np.min([np.sqrt(((grid - np.reshape(c, (3, 1, 1, 1))) ** 2).sum(0)) for c in centres], axis=0)
    image = np.clip((5.5 - distance) / 4, 0, 1).astype(np.float32)
    return torch.from_numpy(image), torch.from_numpy((image > 0.5).astype(np.float32))


def test_image_and_labels_move_together(crop: tuple[Tensor, Tensor]) -> None:
    moved_at_all = []
    for seed in range(12):
        image, labels = ALWAYS.apply(*crop, seed=seed)
        bright = image > 0.5
        dice = float(2 * (bright & (labels > 0)).sum() / (bright.sum() + labels.sum()))
        assert dice > 0.85  # what is left is nearest against linear, at the surface
        moved_at_all.append(bool((image != crop[0]).any()))
    assert all(moved_at_all)


def test_labels_stay_labels_and_intensities_in_range(crop: tuple[Tensor, Tensor]) -> None:
    for seed in range(12):
        image, labels = Augmentation(shift=0.5, shift_probability=1.0).apply(*crop, seed=seed)
        assert set(labels.unique().tolist()) == {0.0, 1.0}
        assert 0 <= float(image.min()) <= float(image.max()) <= 1
        assert image.dtype == labels.dtype == torch.float32
        assert type(image) is type(labels) is Tensor
        assert image.is_contiguous()
        assert labels.is_contiguous()


def test_flips_and_turns_only_carry_voxels_elsewhere() -> None:
    image = torch.rand(8, 8, 8, generator=torch.Generator().manual_seed(0))
    places = set()
    for seed in range(60):
        moved, labels = FLIPS_AND_TURNS.apply(image, (image > 0.5).float(), seed=seed)
        assert torch.equal(moved.flatten().sort().values, image.flatten().sort().values)
        assert torch.equal(labels, (moved > 0.5).float())
        places.add(tuple(np.argwhere(moved.numpy() == float(image[0, 1, 2]))[0]))
    assert len(places) > 20  # of 48 ways to lay a cube down, mirrored or not


def test_a_seed_says_it_all(crop: tuple[Tensor, Tensor]) -> None:
    def changed(seed: int) -> Tensor:
        return torch.cat(Augmentation().apply(*crop, seed=seed))

    first = changed(3)
    torch.manual_seed(99)
    np.random.default_rng(99)
    changed(4)
    assert torch.equal(first, changed(3))
    assert len({float(changed(seed).double().sum()) for seed in range(8)}) == 8


def test_the_callers_crop_and_random_state_stay(crop: tuple[Tensor, Tensor]) -> None:
    image, labels = crop
    before = image.clone(), labels.clone(), torch.random.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr] # noqa: NPY002
    for seed in range(5):
        Augmentation(shift_probability=1.0).apply(image, labels, seed=seed)
    assert torch.equal(image, before[0])
    assert torch.equal(labels, before[1])
    assert torch.equal(torch.random.get_rng_state(), before[2])
    assert np.array_equal(np.random.get_state()[1], before[3])  # type: ignore[index] # noqa: NPY002


@pytest.mark.parametrize("field", ["shift", "degrees", "elastic"])
def test_each_change_can_be_told_in_the_image(crop: tuple[Tensor, Tensor], field: str) -> None:
    off: dict[str, Any] = {"shift_probability": 0.0, "affine_probability": 0.0, "elastic_probability": 0.0}
    on = {"shift": "shift_probability", "degrees": "affine_probability", "elastic": "elastic_probability"}
    plain = Augmentation(**off)
    one = Augmentation(**{**off, on[field]: 1.0})
    different = [
        float((one.apply(*crop, seed=s)[0] - plain.apply(*crop, seed=s)[0]).abs().max()) for s in range(3)
    ]
    assert min(different) > 0.005
    if field == "shift":
        assert max(different) <= 0.1 + 1e-6


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Augmentation(shift=-1.0), "not negative"),
        (lambda: Augmentation(scale=1.0), "below 1"),
        (lambda: Augmentation(elastic_probability=0.8), "exclude each other"),
        (lambda: Augmentation(elastic_probability=1.5), r"\[0, 1\]"),
        (lambda: Augmentation().apply(torch.zeros(4, 4, 8), torch.zeros(4, 4, 8), seed=0), "cubes"),
        (lambda: Augmentation().apply(torch.zeros(4, 4, 4), torch.zeros(4, 4, 8), seed=0), "one size"),
        (lambda: Augmentation().apply(torch.zeros(4, 4, 4), torch.zeros(4, 4, 4), seed=2**32), "2\\^32"),
    ],
)
def test_refuses_what_it_cannot_do(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
