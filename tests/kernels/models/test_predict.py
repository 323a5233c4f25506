"""Folded, cropped prediction against the plain frozen network on a patch many times as large."""

import os
import platform
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from braincensus_kernels.boxes import Box
from braincensus_kernels.models.calibrate import NormStatistics, calibrate
from braincensus_kernels.models.checkpoints import Weights, load_weights
from braincensus_kernels.models.fold import fold, freeze
from braincensus_kernels.models.predict import Predictor, projected_bytes, resolve_precision
from braincensus_kernels.models.wnet3d import UNet
from braincensus_kernels.phantom import Phantom

CHANNELS = (4, 8, 12, 16)
SHAPE = (128, 128, 136)
CORE = (slice(56, 72), slice(56, 72), slice(56, 80))


def random_weights(classes: int = 2, channels: tuple[int, int, int, int] = CHANNELS) -> Weights:
    """A network whose norms have scales of both signs, so that every branch of the folding is used."""
    torch.manual_seed(0)
    net = UNet(1, classes, channels=channels, dropout=0.0, softmax=True)
    for layer in net.modules():
        if isinstance(layer, nn.GroupNorm):
            with torch.no_grad():
                layer.weight.uniform_(0.5, 1.5)[::2].neg_()
            nn.init.normal_(layer.bias, std=0.3)
    return Weights(net.state_dict(), channels, classes, 1, {}, "", "random")


def image(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.random((1, 1, *shape), dtype=np.float32))
    smooth = nn.functional.avg_pool3d(noise, 3, 1, 1)[0, 0].numpy()
    scaled = (smooth - smooth.min()) * (100 / (smooth.max() - smooth.min()))
    return scaled.astype(np.float32)


def around(volume: np.ndarray, halo: int) -> np.ndarray:
    return volume[tuple(slice(s.start - halo, s.stop + halo) for s in CORE)].copy()


@pytest.fixture(scope="module")
def setting() -> tuple[Weights, NormStatistics, np.ndarray, np.ndarray]:
    """Weights, statistics, a volume, and the core's probability by the plain network on all of it."""
    weights, volume = random_weights(), image()
    statistics = calibrate(weights, np.stack([volume[:32, :32, :32], volume[40:72, 40:72, 40:72]])[:, None])
    with torch.inference_mode():
        plain = freeze(weights.build_encoder(), statistics)(torch.from_numpy(volume)[None, None])
    return weights, statistics, volume, plain[0, statistics.foreground_class].numpy()[CORE]


Setting = tuple[Weights, NormStatistics, np.ndarray, np.ndarray]


def predictor(setting: Setting, halo: int, **options: object) -> Predictor:
    weights, statistics, _, _ = setting
    chosen: dict[str, object] = {"precision": "float32", **options}
    return Predictor(weights, statistics=statistics, halo_voxels=halo, **chosen)  # type: ignore[arg-type]


def test_the_setting_can_tell_right_from_wrong(setting: Setting) -> None:
    weights, _, _, plain = setting
    assert plain.std() > 0.02
    scales = [
        weights.encoder[f"{norm}.weight"] for norm in ("in_b.module.7", "conv1.module.9", "conv2.module.9")
    ]
    assert all((scale < 0).any() and (scale > 0).any() for scale in scales)  # mirrored before pooling


@pytest.mark.parametrize("halo", [48, 56])
def test_exact_at_a_halo_of_48(setting: Setting, halo: int) -> None:
    got = predictor(setting, halo).predict(around(setting[2], halo))
    np.testing.assert_allclose(got, setting[3], atol=1e-5)


def test_every_halo_works_and_more_context_is_never_much_worse(setting: Setting) -> None:
    worst = [
        float(np.abs(predictor(setting, halo).predict(around(setting[2], halo)) - setting[3]).max())
        for halo in (0, 8, 16, 24, 32, 40, 48)
    ]
    assert worst[-1] < 1e-5
    assert all(b <= 1.5 * a for a, b in pairwise(worst))
    assert worst[1] < 0.5


def test_random_weights_need_the_whole_context(setting: Setting) -> None:
    """The exactness at 48 is no accident of a network that looks less far."""
    volume = setting[2].copy()
    volume[:16] = 100 - volume[:16]  # 40 voxels and more before the core
    changed = predictor(setting, 48).predict(around(volume, 48))
    assert np.abs(changed - setting[3]).max() > 1e-4


def test_trained_weights_are_local() -> None:
    weights = load_weights("compact")
    phantom = Phantom(shape=(112, 112, 120), cells_per_mm3=8000.0, tissue="full", seed=1)
    counts = phantom.render(Box.whole(phantom.shape)).astype(np.float32)
    volume = np.clip((counts - 300) / 8, 0, 100).astype(np.float32)
    statistics = calibrate(weights, volume[None, None, :48, :48, :48].copy())
    with torch.inference_mode():
        plain = freeze(weights.build_encoder(), statistics)(torch.from_numpy(volume)[None, None])
    exact = plain[0, statistics.foreground_class].numpy()[CORE]
    assert exact.min() < 0.1 < 0.9 < exact.max()
    for halo in (32, 40):
        got = Predictor(weights, statistics=statistics, halo_voxels=halo, precision="float32")
        np.testing.assert_allclose(got.predict(around(volume, halo)), exact, atol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_more_context_than_the_reach_changes_no_bit(precision: str) -> None:
    weights = load_weights("compact")
    phantom = Phantom(shape=(80, 80, 80), cells_per_mm3=8000.0, tissue="full", seed=1)
    counts = phantom.render(Box.whole(phantom.shape)).astype(np.float32)
    volume = np.clip((counts - 300) / 8, 0, 100).astype(np.float32)
    statistics = calibrate(weights, volume[None, None, :48, :48, :48].copy())
    wide, narrow = (
        Predictor(weights, statistics=statistics, halo_voxels=halo, precision=precision) for halo in (24, 8)
    )
    assert narrow.reach_voxels <= 8
    probability = wide.predict(volume)
    assert probability.min() < 0.1 < 0.9 < probability.max()
    assert np.array_equal(probability, narrow.predict(volume[16:-16, 16:-16, 16:-16]))


def test_patches_meet_without_a_seam(setting: Setting) -> None:
    _, _, volume, plain = setting
    halves = []
    for start in (56, 64):
        box = (slice(start - 48, start + 8 + 48), slice(56 - 48, 72 + 48), slice(56 - 48, 80 + 48))
        halves.append(predictor(setting, 48).predict(volume[box].copy()))
    np.testing.assert_allclose(np.concatenate(halves), plain, atol=1e-5)


def test_the_same_bits_again_and_for_any_number_of_threads_in_bfloat16(setting: Setting) -> None:
    patch = around(setting[2], 16)
    first = predictor(setting, 16, precision="bfloat16", threads=1).predict(patch)
    again = predictor(setting, 16, precision="bfloat16", threads=1).predict(patch)
    two = predictor(setting, 16, precision="bfloat16", threads=2).predict(patch)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, two)


def test_bfloat16_is_close(setting: Setting) -> None:
    got = predictor(setting, 48, precision="bfloat16").predict(around(setting[2], 48))
    assert 0 < np.abs(got - setting[3]).max() < 0.1


@pytest.mark.parametrize(
    ("silenced", "levels", "reach"), [("bot", 3, 30), ("deconv2", 2, 14), ("deconv3", 1, 4)]
)
def test_levels_that_cannot_matter_are_left_out(
    setting: Setting, silenced: str, levels: int, reach: int
) -> None:
    weights, _, volume, with_all = setting
    state = {k: v.clone() for k, v in weights.encoder.items()}
    state[f"{silenced}.module.6.weight"] *= 1e-30
    quiet = replace(weights, encoder=state)
    statistics = calibrate(quiet, np.stack([volume[:32, :32, :32], volume[40:72, 40:72, 40:72]])[:, None])
    with torch.inference_mode():
        plain = freeze(quiet.build_encoder(), statistics)(torch.from_numpy(volume)[None, None])
    expected = plain[0, statistics.foreground_class].numpy()[CORE]
    assert len(fold(quiet.build_encoder(), statistics).down) == levels
    halo = -(-reach // 8) * 8
    got = Predictor(quiet, statistics=statistics, halo_voxels=halo, precision="float32")
    assert got.reach_voxels == reach
    np.testing.assert_allclose(got.predict(around(volume, halo)), expected, atol=1e-5)
    assert np.abs(expected - with_all).max() > 1e-3


def test_no_level_is_left_out_without_need(setting: Setting) -> None:
    weights, statistics, _, _ = setting
    assert len(fold(weights.build_encoder(), statistics).down) == 4
    assert predictor(setting, 48).reach_voxels == 46


def test_three_classes() -> None:
    weights, volume = random_weights(3), image((64, 64, 64))
    statistics = calibrate(weights, volume[None, None, :32, :32, :32].copy())
    with torch.inference_mode():
        plain = freeze(weights.build_encoder(), statistics)(torch.from_numpy(volume)[None, None])
    got = Predictor(weights, statistics=statistics, halo_voxels=24, precision="float32").predict(volume)
    # Far from exact at this halo; far from what another class would give, too.
    inner = plain[0, :, 24:-24, 24:-24, 24:-24].numpy()
    distance = [float(np.abs(got - inner[k]).mean()) for k in range(3)]
    assert int(np.argmin(distance)) == statistics.foreground_class
    assert min(distance) < 0.02


def test_window_norm_is_the_published_inference(setting: Setting) -> None:
    weights, statistics, volume, _ = setting
    window = volume[:64, :64, :64].copy()
    with torch.inference_mode():
        plain = weights.build_encoder()(torch.from_numpy(window)[None, None])
    got = predictor(setting, 8, norm="window").predict(window)
    assert got.shape == (48, 48, 48)
    np.testing.assert_allclose(
        got, plain[0, statistics.foreground_class, 8:-8, 8:-8, 8:-8].numpy(), atol=1e-6
    )


def test_folding_saves_a_quarter_of_the_work() -> None:
    """Multiply-adds per voxel, of the full-size network, known from its own layers."""
    weights = random_weights(channels=(64, 128, 256, 512))
    net = weights.build_encoder()
    names = [name for name, layer in net.named_modules() if isinstance(layer, nn.GroupNorm)]
    ones = {name: np.ones(4) for name in names}
    folded = fold(net, NormStatistics(ones, ones, np.array([0.0, 1.0]), 1))
    down = sum(conv.weight.numel() / 8**level for level, convs in enumerate(folded.down) for conv in convs)
    up = sum(
        (step.skip.weight.numel() + step.up.weight.numel() / 8 + step.second.weight.numel()) / 8**level
        for level, step in zip((2, 1, 0), folded.up, strict=True)
    )
    published = 1_009_000
    assert 0.7 < (down + up) / published < 0.75


def test_refusals(setting: Setting) -> None:
    weights, _, volume, _ = setting
    with pytest.raises(ValueError, match="multiple of 8 voxels, got 12"):
        predictor(setting, 12)
    with pytest.raises(ValueError, match="norm must be"):
        predictor(setting, 8, norm="batch")
    with pytest.raises(ValueError, match="no norm statistics"):
        Predictor(weights, statistics=None, halo_voxels=8)
    with pytest.raises(ValueError, match="another network"):
        Predictor(load_weights("compact"), statistics=NormStatistics({}, {}, np.zeros(2), 1), halo_voxels=8)
    with pytest.raises(ValueError, match="precision must be"):
        resolve_precision("float16", "cpu")
    ready = predictor(setting, 16)
    with pytest.raises(ValueError, match="float32 patch"):
        ready.predict(volume.astype(np.float64))
    with pytest.raises(ValueError, match="a core of"):
        ready.predict(volume[:32, :48, :48].copy())
    with pytest.raises(ValueError, match="a core of"):
        ready.predict(volume[:44, :48, :48].copy())


@pytest.mark.parametrize(
    ("machine", "bf16", "amx", "fp16", "expected"),
    [
        ("x86_64", False, False, False, "float32"),
        ("x86_64", True, False, False, "bfloat16"),  # AMD from Zen 4 on
        ("x86_64", True, True, True, "bfloat16"),  # Intel with AMX
        ("x86_64", True, False, True, "float32"),  # the same with AMX hidden by the virtual machine
        ("aarch64", True, False, True, "bfloat16"),
    ],
)
def test_automatic_precision_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, machine: str, bf16: bool, amx: bool, fp16: bool, expected: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: fp16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_precision("auto", "cpu") == expected


def test_folded_features_leave_the_range_of_float16() -> None:
    """Why it is not offered: scaling a norm up and the next weights down changes nothing, but overflows."""
    weights = random_weights()
    state = {k: v.clone() for k, v in weights.encoder.items()}
    for name in ("weight", "bias"):
        state[f"in_b.module.0.{name}"] *= 1e4
    large = replace(weights, encoder=state)
    volume = image((24, 24, 24))
    statistics = calibrate(large, volume[None, None].copy())
    first = fold(large.build_encoder(), statistics).down[0][0]
    features = nn.functional.conv3d(torch.from_numpy(volume)[None, None].double(), first.weight, first.bias)
    assert features.max() > torch.finfo(torch.float16).max
    found = Predictor(large, statistics=statistics, halo_voxels=8, precision="bfloat16").predict(volume)
    exact = Predictor(large, statistics=statistics, halo_voxels=8, precision="float32").predict(volume)
    np.testing.assert_allclose(found, exact, atol=0.1)


MEASURE = """
import sys
from pathlib import Path
import numpy as np
from braincensus_kernels.models.calibrate import calibrate
from braincensus_kernels.models.checkpoints import Weights
from braincensus_kernels.models.predict import Predictor
from braincensus_kernels.models.wnet3d import COMPACT_CHANNELS, UNet
core, halo, precision = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
encoder = UNet(1, 2, channels=COMPACT_CHANNELS, dropout=0.0, softmax=True)
weights = Weights(encoder.state_dict(), COMPACT_CHANNELS, 2, 1, {}, "", "random")
rng = np.random.default_rng(0)
statistics = calibrate(weights, (rng.random((1, 1, 16, 16, 16)) * 100).astype(np.float32))
ready = Predictor(weights, statistics=statistics, halo_voxels=8, precision=precision, threads=1)
ready.predict(np.zeros((24, 24, 24), np.float32))
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
before = peak()
ready = Predictor(weights, statistics=statistics, halo_voxels=halo, precision=precision, threads=1)
patch = np.zeros((core + 2 * halo,) * 3, np.float32)
patch += 1
ready.predict(patch)
print(peak() - before)
"""


KEPT = {name: str(1 << 30) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
KEPT["MALLOC_ARENA_MAX"] = "1"
"""As in a worker: freed memory stays with the process."""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(("core", "halo", "precision"), [(96, 32, "bfloat16"), (64, 48, "float32")])
def test_projected_memory_covers_the_measured_peak(core: int, halo: int, precision: str) -> None:
    command = [sys.executable, "-c", MEASURE, str(core), str(halo), precision]
    measured = int(
        subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | KEPT).stdout
    )
    projected = projected_bytes((core,) * 3, halo, (16, 32, 64, 128), precision)
    assert measured <= projected <= 3 * measured
