"""Phantoms that are nowhere stored open like any volume, and are the same as when they are."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import braincensus
from braincensus import ConfigError, InputError, RunConfig, open_volume
from braincensus.cli import app
from braincensus.formats.phantom import write_phantom_file
from braincensus.phantom import write_phantom
from braincensus_kernels.boxes import Box
from braincensus_kernels.phantom import Phantom

PHANTOM = Phantom(shape=(48, 56, 64), n_cells=20, seed=5, voxel_size_um=(4.0, 5.0, 5.0))


def test_the_same_voxels_as_a_stored_one(tmp_path: Path) -> None:
    write_phantom(tmp_path / "stored.zarr", PHANTOM, block_voxels=(32, 32, 32))
    write_phantom_file(tmp_path / "made.phantom.json", PHANTOM)
    box = Box((3, 10, 20), (40, 56, 64))
    stored, made = open_volume(tmp_path / "stored.zarr"), open_volume(tmp_path / "made.phantom.json")
    assert np.array_equal(made.read(box), stored.read(box))
    assert made.voxel_size_um == stored.voxel_size_um == (4.0, 5.0, 5.0)
    assert open_volume(PHANTOM).identity == made.identity, "the file and the value are one volume"
    assert open_volume(Phantom(shape=(48, 56, 64), n_cells=20, seed=6)).identity != made.identity
    assert np.array_equal(pickle.loads(pickle.dumps(made)).read(box), made.read(box))


def test_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "a" / "brain.phantom.json"
    options = ["--size", "4096,17000,17000", "--cells", "100000000", "--voxel-size", "2"]
    said = CliRunner().invoke(app, ["phantom", str(path), *options])
    assert said.exit_code == 0, said.output
    assert path.stat().st_size < 2000
    volume = open_volume(path)
    assert volume.n_bytes > 2e12
    assert volume.read(Box((2000, 8000, 8000), (2032, 8032, 8032))).mean() > 200
    again = CliRunner().invoke(app, ["phantom", str(path), *options])
    assert again.exit_code == 1
    assert "--overwrite" in again.output


def test_ten_terabytes_are_planned_at_once() -> None:
    phantom = Phantom(shape=(17_100, 17_100, 17_100), n_cells=10**9, voxel_size_um=(2.0, 2.0, 2.0))
    config = RunConfig().merged({"compute": {"block_voxels": 512}, "labelling": {"max_radius_um": 20}})
    plan = braincensus.plan(phantom, config=config)
    assert plan.volume.n_bytes > 1e13
    assert len(plan.label_grid) == 34**3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "does not describe a phantom"),
        (json.dumps({"kind": "braincensus phantom", "shape": [10, 10, 10], "cells": 3}), "cells"),
        (json.dumps({"kind": "braincensus phantom", "shape": [10, 10, -1]}), "does not describe"),
        (json.dumps({"kind": "other", "shape": [10, 10, 10]}), "of another kind"),
    ],
)
def test_what_is_no_phantom_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.phantom.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        open_volume(path)


def test_a_phantom_has_one_channel() -> None:
    with pytest.raises(ConfigError, match="a phantom has no channel 1"):
        open_volume(PHANTOM, channel=1)
