"""Cellpose and StarDist as labellers, with stand-ins for both: one model a process, all options."""

from __future__ import annotations

import pickle
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from braincensus import BlockError, ConfigError, label_blocks, worker
from braincensus.labellers import cellpose, stardist

VOLUME = np.full((1, 8, 16), 100, np.uint16)
VOLUME[0, 2:5, 3:13] = 300


def labels_of(scaled: np.ndarray) -> np.ndarray:
    return (scaled > 0.5).astype(np.int32)


class FakeCellpose:
    made: tuple[dict[str, Any], ...] = ()
    calls: tuple[dict[str, Any], ...] = ()

    def __init__(self, **options):
        type(self).made += (options,)

    def eval(self, x, **options):
        nested = options.pop("tiles")
        type(self).calls += (
            {**options, "tiles": dict(nested), "range": (x.min(), x.max()), "type": x.dtype},
        )
        nested.clear()  # a model that changes what it was given
        return labels_of(x).squeeze(), ["flows"], ["styles"]


class FakeStarDist:
    made: tuple[Any, ...] = ()
    calls: tuple[dict[str, Any], ...] = ()

    def __init__(self, config, name, basedir):
        type(self).made += ((config, name, basedir),)

    @classmethod
    def from_pretrained(cls, name):
        return cls("pretrained", name, None) if name == "3D_demo" else None

    def predict_instances(self, x, **options):
        type(self).calls += (options,)
        return labels_of(x), {"points": []}


@pytest.fixture
def packages(monkeypatch):
    """Put stand-ins in place of both packages, and forget models kept before."""
    for fake in (FakeCellpose, FakeStarDist):
        monkeypatch.setattr(fake, "made", ())
        monkeypatch.setattr(fake, "calls", ())
    modules = {
        "cellpose": {},
        "cellpose.core": {"use_gpu": lambda: False},
        "cellpose.models": {
            "CellposeModel": FakeCellpose,
            "MODEL_NAMES": ["cpsam_v2", "cpsam"],
            "get_user_models": lambda: ["mine"],
        },
        "stardist": {},
        "stardist.models": {"StarDist3D": FakeStarDist},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(worker, "_kept", {})
    return SimpleNamespace(cellpose=FakeCellpose, stardist=FakeStarDist)


def census(labeller):
    labels, audit = label_blocks(VOLUME, labeller, block_size=(1, 8, 4), halo=(0, 0, 2))
    np.testing.assert_array_equal(labels[:], VOLUME == 300)
    assert audit.exact
    return audit


def test_cellpose_is_loaded_once_and_gets_the_same_options_for_every_block(packages):
    labeller = cellpose("cpsam", low=100, high=300, anisotropy=2.5, tiles={"side": 8})
    for _ in range(2):
        census(labeller)
    census(pickle.loads(pickle.dumps(labeller)))
    assert packages.cellpose.made == ({"gpu": False, "pretrained_model": "cpsam"},)
    assert len(packages.cellpose.calls) == 3 * 4
    for call in packages.cellpose.calls:
        assert call["tiles"] == {"side": 8}
        assert (call["do_3D"], call["z_axis"], call["anisotropy"]) == (True, 0, 2.5)
        assert call["normalize"] == {"normalize": False}
        assert call["max_size_fraction"] == 1.0
        assert call["type"] == np.float32
    assert labeller.options == {"max_size_fraction": 1.0, "anisotropy": 2.5, "tiles": {"side": 8}}


def test_intensities_are_scaled_alike_in_every_block(packages):
    census(cellpose(low=50, high=350, tiles={}))
    ranges = [call["range"] for call in packages.cellpose.calls]
    assert ranges[0] == pytest.approx((50 / 300, 250 / 300))
    empty, _ = label_blocks(VOLUME[:, :2], cellpose(low=50, high=350, tiles={}), block_size=8, halo=1)
    assert not empty[:].any()
    assert packages.cellpose.calls[-1]["range"] == pytest.approx((50 / 300, 50 / 300))


def test_options_of_the_caller_win_where_they_may(packages):
    census(cellpose("mine", low=0, high=400, gpu=True, max_size_fraction=0.5, tiles={}))
    assert packages.cellpose.made == ({"gpu": True, "pretrained_model": "mine"},)
    assert packages.cellpose.calls[0]["max_size_fraction"] == 0.5
    with pytest.raises(ConfigError, match="normalize"):
        cellpose(low=0, high=1, normalize=True)
    with pytest.raises(ConfigError, match="normalizer"):
        stardist(low=0, high=1, normalizer=None)


def test_an_unknown_cellpose_model_is_refused_instead_of_replaced_by_the_default(packages, tmp_path):
    with pytest.raises(ConfigError, match="no Cellpose model 'cpsma'"):
        cellpose("cpsma", low=0, high=400)(VOLUME)
    with pytest.raises(BlockError, match="no Cellpose model 'cpsma'"):
        census(cellpose("cpsma", low=0, high=400))
    weights = tmp_path / "weights"
    weights.touch()
    census(cellpose(str(weights), low=0, high=400, tiles={}))
    assert packages.cellpose.made[-1]["pretrained_model"] == str(weights)


def test_stardist_is_loaded_once_by_name_or_from_a_folder(packages, tmp_path):
    labeller = stardist(low=100, high=300, prob_thresh=0.6)
    for _ in range(2):
        census(labeller)
    assert packages.stardist.made == (("pretrained", "3D_demo", None),)
    assert packages.stardist.calls == ({"axes": "ZYX", "prob_thresh": 0.6},) * 8
    (tmp_path / "nuclei").mkdir()
    census(stardist(tmp_path / "nuclei", low=100, high=300))
    assert packages.stardist.made[-1] == (None, "nuclei", str(tmp_path))
    with pytest.raises(ConfigError, match="no StarDist model"):
        stardist("3D_dmeo", low=0, high=1)(VOLUME)


@pytest.mark.parametrize(("factory", "package"), [(cellpose, "cellpose"), (stardist, "stardist")])
def test_a_missing_package_names_the_extra(factory, package, monkeypatch):
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr("braincensus.labellers.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"braincensus\[{package}\]"):
        factory(low=0, high=1)


def test_intensities_that_span_nothing_are_refused(packages):
    for low, high in ((1, 1), (2, 1), (0, float("inf"))):
        with pytest.raises(ConfigError, match="span nothing"):
            stardist(low=low, high=high)
