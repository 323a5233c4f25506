"""Weights in and out of files: strict, safe, whole."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from braincensus_kernels.models.calibrate import stored_calibration
from braincensus_kernels.models.checkpoints import load_checkpoint, load_weights, save_weights
from braincensus_kernels.models.wnet3d import WNet3D

CHANNELS = (4, 8, 12, 16)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(WNet3D(channels=CHANNELS).state_dict())


def encoder_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}


def test_round_trip_keeps_every_bit_and_the_metadata(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    digest = save_weights(path, state, {"steps": "7"})
    weights = load_weights(path)
    assert weights.sha256 == digest
    assert weights.channels == CHANNELS
    assert (weights.num_classes, weights.in_channels) == (2, 1)
    assert weights.metadata == {"steps": "7"}
    assert weights.source == str(path)
    assert set(weights.encoder) == set(encoder_of(state))
    assert all(torch.equal(weights.encoder[k], v) for k, v in encoder_of(state).items())
    assert os.listdir(tmp_path) == ["weights.safetensors"]


@pytest.mark.parametrize("part", ["whole", "encoder", "bare"])
def test_a_whole_network_or_an_encoder_from_pth(
    state: dict[str, torch.Tensor], tmp_path: Path, part: str
) -> None:
    kept = {
        "whole": state,
        "encoder": {k: v for k, v in state.items() if k.startswith("encoder.")},
        "bare": encoder_of(state),
    }[part]
    path = tmp_path / "weights.pth"
    torch.save(kept, path)
    weights = load_weights(str(path))
    torch.manual_seed(1)
    image = torch.rand(1, 1, 8, 8, 8)
    network = WNet3D(channels=CHANNELS, dropout=0.0)
    network.load_state_dict(state)
    with torch.inference_mode():
        torch.testing.assert_close(weights.build_encoder()(image), network.eval().encoder(image))


def test_the_shipped_weights() -> None:
    weights = load_weights("compact")
    assert weights.channels == (16, 32, 64, 128)
    assert weights.source == "compact"
    assert len(weights.sha256) == 64
    assert sum(v.numel() for v in weights.encoder.values()) < 1_600_000
    stored = stored_calibration(weights)
    assert stored is not None
    assert (stored.foreground_class, stored.windows) == (0, 34)


def test_lists_what_is_missing_unexpected_and_misshaped(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    broken = encoder_of(state)
    del broken["conv2.module.1.bias"]
    broken["extra.weight"] = torch.zeros(1)
    broken["deconv3.module.4.weight"] = torch.zeros(3)
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="not hold exactly") as caught:
        load_weights(tmp_path / "broken.safetensors")
    message = str(caught.value)
    assert "missing: conv2.module.1.bias" in message
    assert "unexpected: extra.weight" in message
    assert "deconv3.module.4.weight: (3,) for (8,)" in message


def changed(state: dict[str, torch.Tensor], change: str) -> dict[str, torch.Tensor]:
    """A state dict that is almost one of a network."""
    bad = dict(state)
    part, _, change = change.partition(" ")
    key = f"{part}.deconv2.module.5.weight"
    match change:
        case "missing":
            del bad[key]
        case "extra":
            bad[f"{part}.deconv2.module.10.weight"] = torch.zeros(3)
        case "renamed":
            bad[key.replace("deconv2", "deconv_2")] = bad.pop(key)
        case "prefixed":
            bad["module." + key] = bad.pop(key)
        case "bare":
            bad[key.partition(".")[2]] = bad.pop(key)
        case "wrong shape":
            bad[key] = bad[key].flip(0)[:-1].clone()
        case "turned":
            bad[key] = bad[key].unsqueeze(0)
        case "integer":
            bad[key] = bad[key].to(torch.int32)
        case "flat last":
            bad[f"{part}.out_b.module.8.weight"] = torch.zeros(())
        case "other width":
            other = WNet3D(channels=(8, 8, 12, 16)).state_dict()
            bad |= {k: v for k, v in other.items() if k.startswith(part)}
        case "alone":
            bad = {k: v for k, v in bad.items() if k.startswith(part)}
        case "beside a bare encoder":
            bad = {k: v for k, v in bad.items() if k.startswith(part)} | encoder_of(state)
        case _:
            raise AssertionError(change)
    return bad


@pytest.mark.parametrize("form", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "change",
    [
        *(
            f"{part} {what}"
            for part in ("encoder", "decoder")
            for what in (
                "missing", "extra", "renamed", "prefixed", "bare", "wrong shape", "turned", "integer",
                "flat last", "other width",
            )
        ),
        "decoder alone",
        "decoder beside a bare encoder",
    ],
)  # fmt: skip
def test_nothing_but_a_network_or_an_encoder_loads(
    state: dict[str, torch.Tensor], tmp_path: Path, change: str, form: str
) -> None:
    path = tmp_path / f"bad.{form}"
    (torch.save if form == "pth" else save_file)(changed(state, change), path)
    with pytest.raises(ValueError, match="does not hold"):
        load_weights(path)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_whole_network_comes_back(tmp_path: Path, classes: int) -> None:
    torch.manual_seed(0)
    network = WNet3D(channels=CHANNELS, num_classes=classes, dropout=0.0).eval()
    save_weights(tmp_path / "whole.safetensors", network.state_dict(), {})
    checkpoint = load_checkpoint(tmp_path / "whole.safetensors")
    image = torch.rand(1, 1, 8, 8, 8) * 100
    with torch.inference_mode():
        for found, expected in zip(checkpoint.build_network()(image), network(image), strict=True):
            assert torch.equal(found, expected)
    assert checkpoint.parameters == sum(p.numel() for p in network.parameters())


def test_an_encoder_alone_is_no_network(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(encoder_of(state), tmp_path / "encoder.pth")
    checkpoint = load_checkpoint(tmp_path / "encoder.pth")
    assert checkpoint.state.keys() == {k for k in state if k.startswith("encoder.")}
    with pytest.raises(ValueError, match="encoder alone"):
        checkpoint.build_network()


def test_another_network_is_refused(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold a WNet3D encoder"):
        load_weights(tmp_path / "other.safetensors")


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch " + os.environ["BRAINCENSUS_TEST_MARK"],)


def test_code_in_a_file_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "ran"
    monkeypatch.setenv("BRAINCENSUS_TEST_MARK", str(mark))
    for name, dump in (("torch.pth", torch.save), ("plain.pt", lambda o, p: p.write_bytes(pickle.dumps(o)))):
        dump({"weights": Malicious()}, tmp_path / name)
        with pytest.raises(ValueError, match="not a plain state dict"):
            load_weights(tmp_path / name)
    assert not mark.exists()


def test_damaged_or_wrong_files(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(path, state, {})
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut short"):
        load_weights(tmp_path / "cut.safetensors")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match="damaged"):
        load_weights(tmp_path / "cut.pth")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_weights(tmp_path / "absent.safetensors")
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"expected \.safetensors, \.pth or \.pt"):
        load_weights(tmp_path / "weights.onnx")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected a state dict"):
        load_weights(tmp_path / "list.pth")


def test_values_that_are_not_finite_are_neither_written_nor_read(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    bad = dict(encoder_of(state))
    bad["bot.module.0.bias"] = torch.full_like(bad["bot.module.0.bias"], torch.nan)
    with pytest.raises(ValueError, match=r"not finite in bot\.module\.0\.bias"):
        save_weights(tmp_path / "bad.safetensors", bad, {})
    assert not list(tmp_path.iterdir())
    save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"not finite in bot\.module\.0\.bias"):
        load_weights(tmp_path / "bad.safetensors")


def test_a_failed_write_leaves_the_old_file(
    state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(path, state, {"which": "old"})

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("braincensus_kernels.models.checkpoints.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        save_weights(path, state, {"which": "new"})
    assert load_weights(path).metadata == {"which": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]
