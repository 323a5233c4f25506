"""Frozen norms, reach and locality of the supervised networks, against evaluations written apart."""

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from braincensus_kernels.models.calibrate import NormStatistics
from braincensus_kernels.models.supervised.networks import Kind, SupervisedWeights, build_network
from braincensus_kernels.models.supervised.norms import calibrate_norms, freeze_norms
from braincensus_kernels.models.supervised.predict import (
    SEGRESNET_REACH_VOXELS,
    SupervisedPredictor,
    projected_supervised_bytes,
    resolve_supervised_precision,
)

SIZE: dict[Kind, int] = {"segresnet": 8, "swinunetr": 12}


def random_weights(kind: Kind) -> SupervisedWeights:
    torch.manual_seed(0)
    network = build_network(kind, size=SIZE[kind])
    for layer in network.modules():
        if isinstance(layer, nn.GroupNorm):
            with torch.no_grad():
                layer.weight.uniform_(0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("vae_")}
    return SupervisedWeights(state, kind, SIZE[kind], {}, "", "random", (1.0, 99.0), 0.5)


def image(*shape: int) -> np.ndarray:
    noise = torch.from_numpy(np.random.default_rng(0).random((1, 1, *shape), dtype=np.float32))
    smooth = nn.functional.avg_pool3d(noise, 3, 1, 1)[0, 0].numpy()
    scaled: np.ndarray = ((smooth - smooth.min()) / (smooth.max() - smooth.min())).astype(np.float32)
    return scaled


@pytest.fixture(scope="module")
def segresnet() -> SupervisedWeights:
    return random_weights("segresnet")


@pytest.fixture(scope="module")
def swinunetr() -> SupervisedWeights:
    return random_weights("swinunetr")


@pytest.fixture(scope="module")
def statistics(segresnet: SupervisedWeights) -> NormStatistics:
    volume = image(32, 32, 64)
    return calibrate_norms(segresnet, np.stack([volume[..., :32], volume[..., 32:] ** 2])[:, None])


@pytest.fixture(params=["segresnet", "swinunetr"])
def weights(request: pytest.FixtureRequest) -> SupervisedWeights:
    found: SupervisedWeights = request.getfixturevalue(request.param)
    return found


def heard(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What each norm gives."""
    outputs: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, __, output: outputs.update({name: output.clone()})

    kinds = ("GroupNorm", "InstanceNorm3d", "_Frozen")
    hooks = [
        module.register_forward_hook(listen(name))
        for name, module in network.named_modules()
        if type(module).__name__ in kinds
    ]
    with torch.inference_mode():
        network(images)
    for hook in hooks:
        hook.remove()
    return outputs


def test_statistics_of_one_window_are_the_windows_own(weights: SupervisedWeights) -> None:
    """Each norm then gives what it gave unfrozen, on that window."""
    window = image(32, 32, 64)[None, None]
    network = weights.build()
    frozen = freeze_norms(network, calibrate_norms(weights, window))
    images = torch.from_numpy(window)
    plain, fixed = heard(network, images), heard(frozen, images)
    assert plain.keys() == fixed.keys()
    assert len(plain) == (25 if weights.kind == "segresnet" else 34)
    for name, expected in plain.items():
        assert (fixed[name] - expected).abs().max() < 5e-3, name


def test_statistics_of_several_windows_are_joint(segresnet: SupervisedWeights) -> None:
    """Without weight and bias, every frozen norm gives mean 0 and variance 1 over both windows at once."""
    plain = {k: v.clone() for k, v in segresnet.state.items()}
    for key in plain:
        if "norm" in key or key.startswith("conv_final.0"):
            plain[key] = (
                torch.ones_like(plain[key]) if key.endswith("weight") else torch.zeros_like(plain[key])
            )
    unit = SupervisedWeights(plain, "segresnet", 8, {}, "", "random", (1.0, 99.0), 0.5)
    volume = image(32, 32, 64)
    windows = np.stack([volume[..., :32], volume[..., 32:] ** 2])[:, None]
    found = heard(freeze_norms(unit.build(), calibrate_norms(unit, windows)), torch.from_numpy(windows))
    for name, output in found.items():
        groups = output.double().reshape(2, 8, -1).transpose(0, 1).reshape(8, -1)
        assert groups.mean(1).abs().max() < 1e-4, name
        assert (groups.var(1, correction=0) - 1).abs().max() < 2e-3, name
        each = output.double().reshape(2, 8, -1).mean(2)
        assert each.abs().max() > 0.01, name  # a window on its own has another mean


def test_statistics_survive_storing(segresnet: SupervisedWeights, statistics: NormStatistics) -> None:
    read = NormStatistics.from_json(statistics.to_json())
    patch = image(24, 24, 24)
    first, second = (
        SupervisedPredictor(segresnet, statistics=s, halo_voxels=0).predict(patch) for s in (statistics, read)
    )
    np.testing.assert_array_equal(first, second)


def test_reach_is_what_gradients_show(segresnet: SupervisedWeights) -> None:
    """Without signs that cancel and rectifiers that block, gradients reach as far as anything can."""
    network = segresnet.build().double()
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.GroupNorm):
            network.set_submodule(name, nn.Identity())
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    for parameter in network.parameters():
        parameter.data.abs_()
    far = []
    first = 128
    for voxel in range(first, first + 8):
        x = torch.rand(1, 1, 264, 8, 8, dtype=torch.float64, requires_grad=True)
        network(x)[0, 0, voxel, 4, 4].backward()
        assert x.grad is not None
        (seen,) = torch.nonzero(x.grad[0, 0].abs().sum((1, 2)), as_tuple=True)
        far += [first - int(seen.min()), int(seen.max()) - (first + 7)]
    assert max(far) == SEGRESNET_REACH_VOXELS == 122


def test_frozen_segresnet_is_local(segresnet: SupervisedWeights, statistics: NormStatistics) -> None:
    """Cropping along one axis changes nothing from a halo of the reach on, and little before."""
    volume = torch.from_numpy(image(416, 8, 8))[None, None]
    network = freeze_norms(segresnet.build(), statistics).double()
    core = slice(200, 216)

    def cropped(halo: int) -> Tensor:
        out: Tensor = network(volume[:, :, core.start - halo : core.stop + halo].double())
        return out[:, :, halo : halo + 16]

    with torch.inference_mode():
        whole = network(volume.double())[:, :, core]
        errors = {halo: float((cropped(halo) - whole).abs().max()) for halo in (8, 32, 64, 120, 128, 136)}
    assert errors[128] == errors[136] == 0 or max(errors[128], errors[136]) < 1e-12
    assert errors[120] > 0  # the last voxels count, if hardly
    assert errors[8] > errors[32] > errors[64] > 1e-9


def test_off_the_lattice_is_another_function(
    segresnet: SupervisedWeights, statistics: NormStatistics
) -> None:
    """Why patches start at multiples of 8."""
    volume = image(416, 8, 8)
    network = freeze_norms(segresnet.build(), statistics)
    with torch.inference_mode():
        outs = [network(torch.from_numpy(volume[s : s + 400].copy())[None, None])[0, 0] for s in (0, 4, 8)]
    assert (outs[1][200:-150] - outs[0][204:-146]).abs().max() > 1e-4
    assert (outs[2][200:-150] - outs[0][208:-142]).abs().max() < 1e-5


def test_the_predictor_gives_the_core(weights: SupervisedWeights) -> None:
    patch = image(64, 32, 32)
    predictor = SupervisedPredictor(weights, norm="window", statistics=None, halo_voxels=8, threads=1)
    got = predictor.predict(patch)
    with torch.inference_mode():
        expected = torch.sigmoid(weights.build()(torch.from_numpy(patch)[None, None]))[0, 0].numpy()
    assert got.shape == (48, 16, 16)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_allclose(got, expected[8:-8, 8:-8, 8:-8], atol=1e-6)
    np.testing.assert_array_equal(got, predictor.predict(patch))
    assert predictor.reach_voxels is None


def test_reach_is_stated_where_there_is_one(
    segresnet: SupervisedWeights, swinunetr: SupervisedWeights, statistics: NormStatistics
) -> None:
    frozen = SupervisedPredictor(segresnet, statistics=statistics, halo_voxels=32)
    assert frozen.reach_voxels == 122
    other = calibrate_norms(swinunetr, image(64, 32, 32)[None, None])
    assert SupervisedPredictor(swinunetr, statistics=other, halo_voxels=8).reach_voxels is None


def test_bfloat16_is_close(segresnet: SupervisedWeights, statistics: NormStatistics) -> None:
    patch = image(48, 48, 48)
    full, half = (
        SupervisedPredictor(segresnet, statistics=statistics, halo_voxels=8, precision=p).predict(patch)
        for p in ("float32", "bfloat16")
    )
    assert 0 < np.abs(full - half).max() < 0.05


def test_automatic_precision_on_a_cpu_is_float32() -> None:
    assert resolve_supervised_precision("auto", "cpu") == "float32"
    assert resolve_supervised_precision("bfloat16", "cpu") == "bfloat16"
    with pytest.raises(ValueError, match="precision must be"):
        resolve_supervised_precision("float16", "cpu")


def test_refusals(
    segresnet: SupervisedWeights, swinunetr: SupervisedWeights, statistics: NormStatistics
) -> None:
    with pytest.raises(ValueError, match="multiple of 8 voxels, got 12"):
        SupervisedPredictor(segresnet, statistics=statistics, halo_voxels=12)
    with pytest.raises(ValueError, match="norm must be"):
        SupervisedPredictor(segresnet, norm="batch", statistics=None, halo_voxels=8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no norm statistics"):
        SupervisedPredictor(segresnet, statistics=None, halo_voxels=8)
    with pytest.raises(ValueError, match="another network: 25 norms, expected 34"):
        SupervisedPredictor(swinunetr, statistics=statistics, halo_voxels=8)
    ready = SupervisedPredictor(segresnet, statistics=statistics, halo_voxels=8)
    wrongs: list[np.ndarray] = [image(32, 32, 32).astype(np.float64), image(3, 32, 32)[0]]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="float32 patch"):
            ready.predict(wrong)
    for shape in ((16, 32, 32), (36, 32, 32)):
        with pytest.raises(ValueError, match="a core of"):
            ready.predict(image(*shape))
    swin = SupervisedPredictor(swinunetr, norm="window", statistics=None, halo_voxels=8)
    with pytest.raises(ValueError, match="multiples of 32 voxels, halo included"):
        swin.predict(image(64, 64, 40))
    with pytest.raises(ValueError, match="a larger patch"):
        swin.predict(image(32, 32, 32))


def test_calibration_refuses(segresnet: SupervisedWeights, swinunetr: SupervisedWeights) -> None:
    good: np.ndarray = image(32, 32, 32)[None, None]
    cases: tuple[tuple[np.ndarray, str], ...] = (
        (good[0], "expected windows"),
        (good[..., :28].copy(), "multiples of 8"),
        (good.astype(np.float64), "finite float32"),
        (good * np.float32(np.nan), "finite float32"),
        (good * 100, r"in \[0, 1\]"),
        (good * 0, "constant"),
    )
    for windows, message in cases:
        with pytest.raises(ValueError, match=message):
            calibrate_norms(segresnet, windows)
    with pytest.raises(ValueError, match="multiples of 32"):
        calibrate_norms(swinunetr, good[..., :24].copy())


MEASURE = """
import sys
from pathlib import Path
import numpy as np
from braincensus_kernels.models.supervised.networks import SupervisedWeights, build_network
from braincensus_kernels.models.supervised.norms import calibrate_norms
from braincensus_kernels.models.supervised.predict import SupervisedPredictor
kind, size, side, windows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
state = {k: v for k, v in build_network(kind, size=size).state_dict().items() if not k.startswith("vae_")}
weights = SupervisedWeights(state, kind, size, {}, "", "random", (1.0, 99.0), 0.5)
def work(side, windows):
    images = np.zeros((windows, 1, side, side, side), np.float32)
    images[..., 0] = 1
    if windows > 1:
        calibrate_norms(weights, images, threads=1)
    else:
        ready = SupervisedPredictor(weights, norm="window", statistics=None, halo_voxels=8, threads=1)
        ready.predict(images[0, 0])
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
work(64 if kind == "swinunetr" else 32, windows)
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
before = peak()
work(side, windows)
print(peak() - before)
"""


KEPT = {name: str(1 << 30) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
KEPT["MALLOC_ARENA_MAX"] = "1"
"""As in a worker: freed memory stays with the process."""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("kind", "side", "windows"),
    [
        ("segresnet", 112, 1),
        ("segresnet", 64, 4),
        pytest.param("swinunetr", 96, 1, marks=pytest.mark.slow),
        pytest.param("swinunetr", 64, 4, marks=pytest.mark.slow),
    ],
)
def test_projected_memory_covers_the_measured_peak(kind: Kind, side: int, windows: int) -> None:
    command = [sys.executable, "-c", MEASURE, kind, str(SIZE[kind]), str(side), str(windows)]
    measured = int(
        subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | KEPT).stdout
    )
    projected = projected_supervised_bytes(
        kind, SIZE[kind], (side,) * 3, precision="float32", at_once=windows
    )
    assert measured <= projected <= 3 * measured
