"""The architecture: names and sizes of the published checkpoints."""

from pathlib import Path

import pytest
import torch

from braincensus_kernels.models.wnet3d import COMPACT_CHANNELS, UNet, WNet3D

REFERENCE = Path(__file__).resolve().parents[3].parent / "shared" / "reference" / "wnet3d-keys.txt"

# A few names and shapes of the published state dict, one of each kind.
PUBLISHED = {
    "encoder.in_b.module.0.weight": (64, 1, 3, 3, 3),
    "encoder.in_b.module.7.bias": (64,),
    "encoder.conv1.module.1.weight": (128, 64, 1, 1, 1),
    "encoder.bot.module.5.weight": (512, 512, 3, 3, 3),
    "encoder.deconv2.module.0.weight": (512, 512, 3, 3, 3),
    "encoder.deconv3.module.9.weight": (128,),
    "encoder.out_b.module.8.weight": (2, 64, 1, 1, 1),
    "encoder.conv_trans2.weight": (512, 256, 2, 2, 2),
    "decoder.in_b.module.0.weight": (64, 2, 3, 3, 3),
    "decoder.out_b.module.8.weight": (1, 64, 1, 1, 1),
}


@pytest.fixture(scope="module")
def published_shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in WNet3D().state_dict().items()}


def test_names_and_shapes_of_the_published_network(published_shapes: dict[str, tuple[int, ...]]) -> None:
    assert len(published_shapes) == 168
    assert {key: published_shapes[key] for key in PUBLISHED} == PUBLISHED


@pytest.mark.skipif(not REFERENCE.exists(), reason="no list of the published names here")
def test_the_whole_published_list(published_shapes: dict[str, tuple[int, ...]]) -> None:
    lines = (line.split() for line in REFERENCE.read_text().splitlines() if line.strip())
    listed = {key: tuple(int(n) for n in shape.split(",")) for key, shape in lines}
    assert published_shapes == listed


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
