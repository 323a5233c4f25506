"""MONAI's networks and their files: the published shapes, strict names, clear refusals."""

from pathlib import Path

import pytest
import torch
from monai.networks.nets.segresnet import SegResNetVAE
from monai.networks.nets.swin_unetr import SwinUNETR
from safetensors.torch import save_file

from braincensus_kernels.models.checkpoints import load_weights, save_weights
from braincensus_kernels.models.supervised.networks import (
    Kind,
    build_network,
    load_supervised,
    network_metadata,
    save_supervised,
)
from braincensus_kernels.models.wnet3d import WNet3D

SMALL: dict[Kind, int] = {"segresnet": 8, "swinunetr": 12}
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def states() -> dict[Kind, State]:
    torch.manual_seed(0)
    return {kind: dict(build_network(kind, size=size).state_dict()) for kind, size in SMALL.items()}


def test_shapes_are_the_published_ones() -> None:
    """MONAI's own modules with the paper's parameters, and their sizes as the paper's archives have them."""
    published = {
        "segresnet": SegResNetVAE((64, 64, 64), out_channels=1, dropout_prob=0.3),
        "swinunetr": SwinUNETR(1, 1, feature_size=48, drop_rate=0.5, attn_drop_rate=0.5, use_v2=True),
    }
    for kind, module in published.items():
        ours = build_network(kind)  # type: ignore[arg-type]
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in module.state_dict().items()
        }
        dropouts = [
            sorted(m.p for m in n.modules() if isinstance(m, torch.nn.Dropout)) for n in (ours, module)
        ]
        dropouts[0] += [m.p for m in ours.modules() if isinstance(m, torch.nn.Dropout3d)]
        dropouts[1] += [m.p for m in module.modules() if isinstance(m, torch.nn.Dropout3d)]
        assert dropouts[0] == dropouts[1] != []
    assert sum(p.numel() for p in published["segresnet"].parameters()) == 1_993_146
    assert sum(p.numel() for p in published["swinunetr"].parameters()) == 72_762_019


@pytest.mark.parametrize("kind", SMALL)
def test_a_file_gives_monais_own_arithmetic(kind: Kind, states: dict[Kind, State], tmp_path: Path) -> None:
    monai = (
        SegResNetVAE((64, 64, 64), out_channels=1, dropout_prob=0.3)
        if kind == "segresnet"
        else SwinUNETR(1, 1, feature_size=12, drop_rate=0.5, attn_drop_rate=0.5, use_v2=True)
    )
    monai.load_state_dict(states[kind], strict=True)
    torch.save(states[kind], tmp_path / "published.pth")
    weights = load_supervised(tmp_path / "published.pth", kind=kind)
    image = torch.rand(2, 1, 32, 32, 64)
    with torch.inference_mode():
        expected = monai.eval()(image)
        expected = expected[0] if kind == "segresnet" else expected
        got = weights.build()(image)
    assert got.shape == image.shape
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert not any(key.startswith("vae_") for key in weights.state)


@pytest.mark.parametrize("kind", SMALL)
def test_round_trip_keeps_every_bit_and_what_is_said_of_it(kind: Kind, tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = build_network(kind, size=SMALL[kind], patch_voxels=64)
    about = network_metadata(kind, size=SMALL[kind], input_percentiles=(0.5, 99.5), threshold=0.45)
    path = tmp_path / "w.safetensors"
    digest = save_supervised(path, network, about | {"epochs": "3"})
    weights = load_supervised(path)
    assert (weights.kind, weights.size, weights.sha256) == (kind, SMALL[kind], digest)
    assert (weights.input_percentiles, weights.threshold) == ((0.5, 99.5), 0.45)
    assert weights.metadata["epochs"] == "3"
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in weights.state.items())


@pytest.mark.parametrize("patch", [16, 64, 96])
def test_the_variational_branch_of_any_patch_or_none(patch: int, tmp_path: Path) -> None:
    state = dict(build_network("segresnet", patch_voxels=patch).state_dict())
    torch.save(state, tmp_path / "whole.pth")
    torch.save({k: v for k, v in state.items() if not k.startswith("vae_")}, tmp_path / "bare.pth")
    whole, bare = (load_supervised(tmp_path / name) for name in ("whole.pth", "bare.pth"))
    assert whole.state.keys() == bare.state.keys()
    assert whole.parameters == bare.parameters == 1_176_177
    assert (whole.threshold, whole.input_percentiles) == (0.3, (1.0, 99.0))  # the published ones


def test_the_variational_branch_is_not_trained() -> None:
    network = build_network("segresnet").train()
    network(torch.rand(1, 1, 16, 16, 16)).sum().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == name.startswith("vae_"), name


CHANGES = {
    "missing": lambda s, k: s.pop(k),
    "extra": lambda s, k: s.update({f"{k}.more": torch.zeros(1)}),
    "renamed": lambda s, k: s.update({f"module.{k}": s.pop(k)}),
    "reshaped": lambda s, k: s.update({k: s[k].flip(0)[:-1].clone()}),
    "integer": lambda s, k: s.update({k: s[k].to(torch.int32)}),
    "nan": lambda s, k: s.update({k: s[k] * torch.nan}),
}
KEYS = {
    "segresnet": ("down_layers.2.1.conv2.conv.weight", "vae_fc2.bias", "vae_fc1.weight"),
    "swinunetr": ("decoder3.conv_block.conv2.conv.weight", "swinViT.layers2c.0.layer.conv1.conv.weight"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in KEYS.items() for key in keys])
def test_nothing_else_loads(
    kind: Kind, key: str, change: str, states: dict[Kind, State], tmp_path: Path
) -> None:
    if change == "nan" and key.startswith("vae_fc1"):
        pytest.skip("the same as the other")
    bad = dict(states[kind])
    CHANGES[change](bad, key)
    save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"does not hold exactly|not finite") as caught:
        load_supervised(tmp_path / "bad.safetensors")
    assert key in str(caught.value) or key.startswith("vae_fc1")


def test_positions_inside_a_window_must_be_monais(states: dict[Kind, State], tmp_path: Path) -> None:
    key = "swinViT.layers1.0.blocks.0.attn.relative_position_index"
    bad = dict(states["swinunetr"])
    bad[key] = bad[key].flip(0).contiguous()
    save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="constants that are not MONAI's"):
        load_supervised(tmp_path / "bad.safetensors")


def test_each_kind_of_weights_is_refused_where_another_is_meant(
    states: dict[Kind, State], tmp_path: Path
) -> None:
    for kind in SMALL:
        save_file(states[kind], tmp_path / f"{kind}.safetensors")
    save_weights(tmp_path / "wnet.safetensors", WNet3D(channels=(4, 8, 8, 8)).state_dict(), {})
    with pytest.raises(ValueError, match="holds a SwinUNETR, expected a SegResNet"):
        load_supervised(tmp_path / "swinunetr.safetensors", kind="segresnet")
    with pytest.raises(ValueError, match="they are a WNet3D's"):
        load_supervised(tmp_path / "wnet.safetensors", kind="segresnet")
    for kind in SMALL:
        with pytest.raises(ValueError, match="does not hold a WNet3D encoder"):
            load_weights(tmp_path / f"{kind}.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="neither SegResNet's nor SwinUNETR's"):
        load_supervised(tmp_path / "other.safetensors")


def test_where_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"give a \.safetensors or \.pth"):
        load_supervised(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="published, not shipped"):
        load_supervised("cellseg3d-segresnet")


def test_what_is_said_must_be_true(tmp_path: Path) -> None:
    network = build_network("segresnet")
    path = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match="does not say which network"):
        save_supervised(path, network, {})
    with pytest.raises(ValueError, match="does not hold exactly"):
        save_supervised(path, network, network_metadata("swinunetr", size=12))
    for about, message in (
        ({"network": '{"kind": "segresnet", "size": 16}'}, "but holds segresnet of size 8"),
        ({"network": "{"}, "is damaged"),
        ({"network": "[]"}, "not a network's"),
        ({"input_percentiles": "[99, 1]"}, "not two percentiles"),
        ({"threshold": "1.5"}, "not a probability"),
    ):
        save_weights(path, network.state_dict(), about)
        with pytest.raises(ValueError, match=message):
            load_supervised(path)


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="segresnet or swinunetr, got 'unet'"):
        build_network("unet")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of 8, got 12"):
        build_network("segresnet", size=12)
    with pytest.raises(ValueError, match="multiple of 12, got 16"):
        build_network("swinunetr", size=16)
    with pytest.raises(ValueError, match="multiple of 32 voxels, 64 or more, got 32"):
        build_network("swinunetr", size=12, patch_voxels=32)
    with pytest.raises(ValueError, match="low before high"):
        network_metadata("segresnet", input_percentiles=(99.0, 1.0))


def test_reading_draws_no_random_numbers(states: dict[Kind, State], tmp_path: Path) -> None:
    """A training that writes a checkpoint goes on as if it had not."""
    save_file(states["segresnet"], tmp_path / "w.safetensors")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_supervised(tmp_path / "w.safetensors").build()
    assert torch.equal(torch.rand(3), expected)
