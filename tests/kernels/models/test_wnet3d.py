"""The architecture: names, sizes and arithmetic of the published checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as f

from braincensus_kernels.models.checkpoints import load_checkpoint
from braincensus_kernels.models.wnet3d import COMPACT_CHANNELS, FULL_CHANNELS, UNet, WNet3D

REFERENCE = Path(__file__).resolve().parents[3].parent / "shared" / "reference" / "wnet3d-keys.txt"

Shapes = dict[str, tuple[int, ...]]


def unet_shapes(ends: tuple[int, int], a: int, b: int, c: int, d: int) -> Shapes:
    """Names and shapes of one U-Net of the published state dict, from its rule."""
    shapes: Shapes = {}

    def layer(name: str, weight: tuple[int, ...], channels: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, (channels,)

    def convolution(name: str, given: int, channels: int, side: int) -> None:
        layer(name, (channels, given, side, side, side), channels)

    for block, given, taken in (("in_b", ends[0], a), ("out_b", 2 * a, a)):
        convolution(f"{block}.module.0", given, taken, 3)
        layer(f"{block}.module.3", (taken,), taken)
        convolution(f"{block}.module.4", taken, taken, 3)
        layer(f"{block}.module.7", (taken,), taken)
    convolution("out_b.module.8", a, ends[1], 1)
    for block, given, taken in (
        ("conv1", a, b), ("conv2", b, c), ("bot", c, d), ("deconv2", 2 * c, c), ("deconv3", 2 * b, b),
    ):  # fmt: skip
        convolution(f"{block}.module.0", given, given, 3)
        convolution(f"{block}.module.1", given, taken, 1)
        layer(f"{block}.module.4", (taken,), taken)
        convolution(f"{block}.module.5", taken, taken, 3)
        convolution(f"{block}.module.6", taken, taken, 1)
        layer(f"{block}.module.9", (taken,), taken)
    for name, given, taken in (("conv_trans2", d, c), ("conv_trans3", c, b), ("conv_trans_out", b, a)):
        layer(name, (given, taken, 2, 2, 2), taken)
    return shapes


def published_shapes(channels: tuple[int, int, int, int] = FULL_CHANNELS) -> Shapes:
    encoder, decoder = unet_shapes((1, 2), *channels), unet_shapes((2, 1), *channels)
    return {f"encoder.{k}": v for k, v in encoder.items()} | {f"decoder.{k}": v for k, v in decoder.items()}


def random_state(shapes: Shapes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Values of such sizes that every layer matters and nothing explodes; norms of both signs."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        fan_in = shape[0] if "conv_trans" in key else value[0].numel()
        if key.endswith("bias"):
            value *= 0.2
        elif len(shape) > 1:
            value *= (2.0 / fan_in) ** 0.5
        else:
            value = (1 + 0.3 * value) * torch.where(torch.arange(*shape) % 5 == 0, -1, 1)
        state[key] = value
    return state


def evaluate(p: dict[str, torch.Tensor], x: torch.Tensor, prefix: str = "") -> torch.Tensor:
    """One published U-Net up to its raw output, as arithmetic on a plain state dict."""

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = p[f"{prefix}{name}.weight"]
        return f.conv3d(x, weight, p[f"{prefix}{name}.bias"], padding=weight.shape[-1] // 2)

    def settle(x: torch.Tensor, name: str) -> torch.Tensor:
        """ReLU, then a norm over each quarter of the channels, written out."""
        x = x.clamp(min=0)
        n, channels = x.shape[:2]
        grouped = x.reshape(n, 4, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        x = (centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
        affine = (p[f"{prefix}{name}.{part}"].reshape(1, channels, 1, 1, 1) for part in ("weight", "bias"))
        scale, shift = affine
        return x * scale + shift

    def wide(x: torch.Tensor, name: str) -> torch.Tensor:
        x = settle(conv(x, f"{name}.module.0"), f"{name}.module.3")
        return settle(conv(x, f"{name}.module.4"), f"{name}.module.7")

    def pair(x: torch.Tensor, name: str) -> torch.Tensor:
        x = settle(conv(conv(x, f"{name}.module.0"), f"{name}.module.1"), f"{name}.module.4")
        return settle(conv(conv(x, f"{name}.module.5"), f"{name}.module.6"), f"{name}.module.9")

    def joined(skip: torch.Tensor, coarse: torch.Tensor, name: str) -> torch.Tensor:
        kernel, bias = p[f"{prefix}{name}.weight"], p[f"{prefix}{name}.bias"]
        return torch.cat([skip, f.conv_transpose3d(coarse, kernel, bias, stride=2)], 1)

    full = wide(x, "in_b")
    half = pair(f.max_pool3d(full, 2), "conv1")
    quarter = pair(f.max_pool3d(half, 2), "conv2")
    eighth = pair(f.max_pool3d(quarter, 2), "bot")
    up = pair(joined(quarter, eighth, "conv_trans2"), "deconv2")
    up = pair(joined(half, up, "conv_trans3"), "deconv3")
    return conv(wide(joined(full, up, "conv_trans_out"), "out_b"), "out_b.module.8")


def crop(side: int = 16) -> torch.Tensor:
    return torch.rand(1, 1, side, side, side, generator=torch.Generator().manual_seed(1)) * 100


def test_the_rule_gives_the_whole_published_list() -> None:
    assert len(published_shapes()) == 168
    if not REFERENCE.exists():
        pytest.skip("no list of the published names beside the repository")
    lines = (line.split() for line in REFERENCE.read_text().splitlines() if line.strip())
    listed = {key: tuple(int(n) for n in shape.split(",")) for key, shape in lines}
    assert published_shapes() == listed


def test_names_and_shapes_of_the_published_network() -> None:
    with torch.device("meta"):
        ours = {key: tuple(value.shape) for key, value in WNet3D().state_dict().items()}
    assert ours == published_shapes()


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    return random_state(published_shapes())


@pytest.mark.parametrize("form", ["pth", "safetensors"])
@pytest.mark.parametrize("part", ["whole", "encoder"])
def test_a_published_checkpoint_loads_and_computes_what_its_arithmetic_says(
    published: dict[str, torch.Tensor], tmp_path: Path, form: str, part: str
) -> None:
    kept = {k: v for k, v in published.items() if part == "whole" or k.startswith("encoder.")}
    path = tmp_path / f"wnet_latest.{form}"
    (torch.save if form == "pth" else save_file)(kept, path)
    checkpoint = load_checkpoint(path)
    assert checkpoint.weights.channels == FULL_CHANNELS
    assert checkpoint.state.keys() == kept.keys()
    image = crop()
    with torch.inference_mode():
        expected = evaluate(published, image, "encoder.").softmax(1)
        assert expected.std() > 0.1
        found = checkpoint.weights.build_encoder()(image)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        if part == "whole":
            network = checkpoint.build_network()
            rebuilt = evaluate(published, expected, "decoder.")
            assert rebuilt.std() > 0.1
            difference = (network.decoder(expected) - rebuilt).abs().max()
            assert float(difference) < 1e-5 * float(rebuilt.abs().max())  # raw output: of its own range
            probability, reconstruction = network.double()(image.double())
            exact = {key: value.double() for key, value in published.items()}
            expected = evaluate(exact, image.double(), "encoder.").softmax(1)
            torch.testing.assert_close(probability, expected, rtol=0, atol=1e-10)
            torch.testing.assert_close(
                reconstruction, evaluate(exact, expected, "decoder."), rtol=0, atol=1e-10
            )


def test_the_shipped_weights_compute_what_the_arithmetic_says() -> None:
    checkpoint = load_checkpoint("compact")
    image = crop(24)
    image[..., 12:] *= 0.2
    with torch.inference_mode():
        expected = evaluate(dict(checkpoint.weights.encoder), image).softmax(1)
        found = checkpoint.weights.build_encoder()(image)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_number_of_parameters() -> None:
    with torch.device("meta"):
        network = WNet3D()
    assert sum(p.numel() for p in network.encoder.parameters()) == 25_265_090
    assert sum(p.numel() for p in network.parameters()) == 50_531_843


def test_probabilities_and_reconstruction() -> None:
    torch.manual_seed(0)
    network = WNet3D(channels=(4, 8, 8, 12), num_classes=3, dropout=0.0).eval()
    image = torch.rand(2, 1, 16, 8, 24) * 100
    with torch.inference_mode():
        probabilities, reconstruction = network(image)
    assert probabilities.shape == (2, 3, 16, 8, 24)
    assert reconstruction.shape == image.shape
    assert float(probabilities.min()) >= 0
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2, 16, 8, 24))


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    network = WNet3D(channels=(4, 4, 4, 4), dropout=0.5)
    image = torch.rand(1, 1, 16, 16, 16)
    assert not torch.equal(network.train()(image)[0], network(image)[0])
    assert torch.equal(network.eval()(image)[0], network(image)[0])


def test_extents_must_be_multiples_of_eight() -> None:
    with pytest.raises(ValueError, match=r"multiples of 8, got \(1, 1, 8, 8, 12\)"):
        UNet(1, 2, channels=COMPACT_CHANNELS, dropout=0.0, softmax=True)(torch.zeros(1, 1, 8, 8, 12))


@pytest.mark.parametrize("channels", [(16, 32, 64), (16, 32, 64, 126), (0, 4, 4, 4)])
def test_channels_that_cannot_be(channels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        WNet3D(channels=channels)
