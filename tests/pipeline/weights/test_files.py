"""Weights described, converted and calibrated, as a person does it; and a run with what came out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from braincensus import ConfigError, InputError, OutputError, RunConfig, run
from braincensus.cli import app
from braincensus.weights.files import convert_weights, describe_weights, read_weights
from braincensus_kernels.boxes import Box
from braincensus_kernels.models.calibrate import CALIBRATION, stored_calibration
from braincensus_kernels.models.checkpoints import Checkpoint, load_checkpoint, load_weights, save_weights
from braincensus_kernels.models.supervised.networks import build_network, network_metadata, save_supervised
from braincensus_kernels.models.wnet3d import WNet3D
from braincensus_kernels.phantom import Phantom

SHAPE = (40, 72, 64)


@pytest.fixture
def wnet(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    path = tmp_path / "whole.pth"
    torch.save(WNet3D(channels=(4, 8, 8, 8), dropout=0.0).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    return Phantom(shape=SHAPE, n_cells=40, seed=5, tissue="full").render(Box.whole(SHAPE))


@pytest.mark.parametrize("encoder_only", [False, True])
def test_converting_keeps_every_number(wnet: Path, tmp_path: Path, encoder_only: bool) -> None:
    out = tmp_path / "out.safetensors"
    sha256 = convert_weights(str(wnet), out, encoder_only=encoder_only)
    before, after = load_checkpoint(wnet), load_checkpoint(out)
    assert after.weights.sha256 == sha256
    assert (after.decoder is None) == encoder_only
    assert all(torch.equal(value, before.state[key]) for key, value in after.state.items())
    assert after.weights.metadata["converted_from"] == "whole.pth"
    with pytest.raises(OutputError, match="exists"):
        convert_weights(str(wnet), out)
    with pytest.raises(ConfigError, match="another name"):
        convert_weights(str(wnet), tmp_path / "out.pth")


def test_a_supervised_network_is_converted_and_described(tmp_path: Path) -> None:
    source, out = tmp_path / "seg.safetensors", tmp_path / "again.safetensors"
    about = network_metadata("segresnet", size=8, threshold=0.35, input_percentiles=(2.0, 98.0))
    save_supervised(source, build_network("segresnet", size=8), about)
    convert_weights(str(source), out)
    for path in (source, out):
        rows = describe_weights(str(path))
        assert rows["threshold"] == "0.35"
        assert "2 to 98" in rows["input"]
        assert "--foreground segresnet" in rows["use"]
    with pytest.raises(ConfigError, match="no decoder"):
        convert_weights(str(source), tmp_path / "encoder.safetensors", encoder_only=True)


def test_what_is_no_network_is_refused_with_both_reasons(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"layer.weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match=r"(?s)exactly a WNet3D.*as a WNet3D.*as the others"):
        describe_weights(str(path))


def test_a_mistyped_name_shows_the_names() -> None:
    with pytest.raises(ConfigError, match=r"(?s)compact, cellseg3d-wnet3d.*weights list"):
        read_weights("compcat")


def test_a_damaged_calibration_is_refused(tmp_path: Path, wnet: Path) -> None:
    state = load_checkpoint(wnet).state
    for text in ("{", "[1]", '{"mean/in_b.module.3": [0]}', load_weights_calibration(tmp_path, wnet)):
        path = tmp_path / "calibrated.safetensors"
        save_weights(path, state, {CALIBRATION: text})
        with pytest.raises(InputError, match="calibration"):
            describe_weights(str(path))


def load_weights_calibration(tmp_path: Path, wnet: Path) -> str:
    """Return the calibration of a network of other widths."""
    from braincensus_kernels.models.calibrate import calibrate

    windows = np.random.default_rng(0).uniform(0, 100, (1, 1, 16, 16, 16)).astype(np.float32)
    text = calibrate(load_weights("compact"), windows).to_json()
    return text.replace("in_b.module.3", "in_b.module.9")


def test_calibrated_once_and_used_for_another_volume(
    tmp_path: Path, volume: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "reference.npy", volume)
    np.save(tmp_path / "dim.npy", (volume // 2).astype(volume.dtype))
    out = tmp_path / "study.safetensors"
    result = CliRunner().invoke(
        app,
        ["weights", "calibrate", str(tmp_path / "reference.npy"), str(out), "--voxel-size", "5"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    assert "--calibration stored" in result.output
    stored = stored_calibration(load_weights(out))
    assert stored is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dim.npy", "reference.npy", "study.safetensors"]
    assert "voxels far with the stored calibration" in describe_weights(str(out))["looks"]

    config = RunConfig().merged(
        {
            "input": {"voxel_size_um": 5.0},
            "foreground": {"weights": str(out), "calibration": "stored"},
            "compute": {"workers": 1, "dashboard_port": 0},
        }
    )
    of_reference = run(tmp_path / "reference.npy", tmp_path / "a.zarr", config=config)
    own = run(
        tmp_path / "reference.npy",
        tmp_path / "b.zarr",
        config=config.merged({"foreground": {"calibration": "volume"}}),
    )
    assert of_reference.provenance["foreground"]["calibration"] == "stored"
    assert own.provenance["foreground"]["calibration"] == "volume"
    # On the volume that it was measured on, the stored calibration is the volume's own, to the bit.
    np.testing.assert_array_equal(of_reference.labels[:], own.labels[:])
    assert of_reference.n_cells > 20


def test_stored_without_a_calibration_is_refused_before_anything_runs(
    tmp_path: Path, volume: np.ndarray, wnet: Path
) -> None:
    config = RunConfig().merged(
        {"input": {"voxel_size_um": 5.0}, "foreground": {"weights": str(wnet), "calibration": "stored"}}
    )
    with pytest.raises(ConfigError, match=r"(?s)bring no calibration.*weights calibrate"):
        run(volume, tmp_path / "out.zarr", config=config)
    assert not (tmp_path / "out.zarr").exists()


def test_only_networks_with_norms_are_calibrated(tmp_path: Path, volume: np.ndarray) -> None:
    from braincensus.weights.calibrating import calibrate_weights

    config = RunConfig().merged({"foreground": {"model": "intensity"}})
    with pytest.raises(ConfigError, match="no norms"):
        calibrate_weights(volume, tmp_path / "out.safetensors", config=config)


def test_the_commands(tmp_path: Path, wnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINCENSUS_CACHE", str(tmp_path / "cache"))

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["weights", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "cellseg3d-wnet3d" in call("list")
    assert "shipped" in call("list")
    assert "encoder and decoder" in call("info", str(wnet))
    out = tmp_path / "out.safetensors"
    assert "SHA-256" in call("convert", str(wnet), str(out), "--encoder-only")
    assert isinstance(read_weights(str(out)), Checkpoint)
    failed = CliRunner().invoke(app, ["weights", "fetch", "cellseg3d"], catch_exceptions=False)
    assert failed.exit_code == 1
    assert "cellseg3d-wnet3d" in failed.output
