"""Many patches one after another: in order, the same bits as one by one, bounded, and without a deadlock."""

import threading
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from braincensus_kernels.models.calibrate import calibrate
from braincensus_kernels.models.checkpoints import load_weights
from braincensus_kernels.models.predict import Predictor
from braincensus_kernels.models.stream import BUFFERS, PATCHES_AT_ONCE, Lanes, ReadAhead

HALO = 8
SIDE = 16 + 2 * HALO


def some_patches(count: int, *, side: int = SIDE) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return [rng.uniform(0, 100, (side, side, side)).astype(np.float32) for _ in range(count)]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    weights, window = load_weights("compact"), some_patches(1)[0]
    statistics = calibrate(weights, window[None, None])
    return Predictor(weights, statistics=statistics, halo_voxels=HALO, precision="float32", threads=1)


def lanes_of(predictor: Predictor) -> Lanes:
    """What CUDA runs, where streams and events do nothing."""
    return Lanes(predictor._compute, halo_voxels=HALO, device="cpu", graph=True)


def through_lanes(predictor: Predictor, patches: Iterator[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    with ReadAhead(patches) as ready:
        return list(lanes_of(predictor).run(ready, threading.Lock()))


def readers() -> int:
    return sum(thread.name == "read-ahead" for thread in threading.enumerate())


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_in_order_and_the_same_bits_as_one_by_one(predictor: Predictor, count: int) -> None:
    patches = some_patches(count)
    one_by_one = [predictor.predict(patch) for patch in patches]
    for got in (list(predictor.predict_all(iter(patches))), through_lanes(predictor, iter(patches))):
        assert len(got) == count
        for a, b in zip(got, one_by_one, strict=True):
            np.testing.assert_array_equal(a, b)
    assert readers() == 0


def test_results_are_the_callers_own(predictor: Predictor) -> None:
    """Buffers that are used again would change a result that was given out."""
    patches = some_patches(2 * BUFFERS + 1)
    got = through_lanes(predictor, iter(patches))
    assert len({result.tobytes() for result in got}) == len(patches)


def test_shapes_may_change_on_the_way(predictor: Predictor) -> None:
    patches = some_patches(2) + some_patches(2, side=SIDE + 8) + some_patches(1)
    expected = [predictor.predict(patch) for patch in patches]
    for a, b in zip(through_lanes(predictor, iter(patches)), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_next_patch_is_read_while_one_is_computed(predictor: Predictor) -> None:
    """Reading waits until computing has begun, and computing until the next is read: only overlap ends."""
    begun, read = threading.Event(), threading.Event()

    class Watching:
        def __enter__(self) -> None:
            begun.set()
            assert read.wait(10)

        def __exit__(self, *_: object) -> None:
            pass

    def reading() -> Iterator[NDArray[np.float32]]:
        first, second = some_patches(2)
        yield first
        assert begun.wait(10)
        read.set()
        yield second

    assert len(list(predictor.predict_all(reading(), slot=Watching()))) == 2


class Slot:
    """A lock that remembers: device work must hold it, reading must not."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


@pytest.mark.parametrize("lanes", [False, True])
def test_the_slot_is_held_while_computing_and_not_while_a_patch_is_awaited(
    predictor: Predictor, lanes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot, held = Slot(), []
    compute = predictor._compute

    def watched(x: torch.Tensor) -> torch.Tensor:
        held.append(slot.lock.locked())
        return compute(x)

    monkeypatch.setattr(predictor, "_compute", watched)

    def slowly() -> Iterator[NDArray[np.float32]]:
        for patch in some_patches(3):
            deadline = time.monotonic() + 10
            while slot.lock.locked():  # the pipeline runs dry, and must let go
                assert time.monotonic() < deadline
                time.sleep(0.001)
            yield patch

    with ReadAhead(slowly()) as ready:
        results = (
            lanes_of(predictor).run(ready, slot) if lanes else predictor.predict_all(slowly(), slot=slot)
        )
        assert len(list(results)) == 3
    assert held == [True] * 3
    assert not slot.lock.locked()


@pytest.mark.parametrize("lanes", [False, True])
def test_no_more_patches_than_stated_are_in_memory(
    predictor: Predictor, lanes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[NDArray[np.float32]]] = []
    most = 0

    def slowly(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return torch.zeros(16, 16, 16)

    def reading() -> Iterator[NDArray[np.float32]]:
        nonlocal most
        for _ in range(6):
            patch = some_patches(1)[0]
            alive.append(weakref.ref(patch))
            most = max(most, sum(ref() is not None for ref in alive))
            yield patch
            del patch

    monkeypatch.setattr(predictor, "_compute", slowly)
    got = through_lanes(predictor, reading()) if lanes else list(predictor.predict_all(reading()))
    assert len(got) == 6
    assert 1 <= most <= PATCHES_AT_ONCE


@pytest.mark.parametrize("good", [0, 1, 3])
def test_exceptions_come_where_the_patch_would_have(predictor: Predictor, good: int) -> None:
    def failing() -> Iterator[NDArray[np.float32]]:
        yield from some_patches(good)
        raise OSError("no such chunk")

    results = predictor.predict_all(failing())
    for _ in range(good):
        next(results)
    with pytest.raises(OSError, match="no such chunk"):
        next(results)
    with pytest.raises(OSError, match="no such chunk"):
        through_lanes(predictor, failing())
    assert readers() == 0


def test_a_patch_of_a_wrong_shape_is_refused_as_in_predict(predictor: Predictor) -> None:
    wrong = some_patches(1)[0][:30]
    with pytest.raises(ValueError, match="a core of"):
        list(predictor.predict_all(iter([wrong])))


@pytest.mark.parametrize("lanes", [False, True])
def test_a_caller_may_stop_early(predictor: Predictor, lanes: bool) -> None:
    closed = threading.Event()

    def endless() -> Iterator[NDArray[np.float32]]:
        try:
            while True:
                yield some_patches(1)[0]
        finally:
            closed.set()

    slot = Slot()
    if lanes:
        with ReadAhead(endless()) as ready:
            running = lanes_of(predictor).run(ready, slot)
            next(running)
            running.close()
    else:
        results = predictor.predict_all(endless(), slot=slot)
        next(results)
        results.close()
    assert closed.is_set()
    assert readers() == 0
    assert not slot.lock.locked()


def test_an_error_while_computing_lets_go_of_everything(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(predictor, "_compute", broken)
    slot = Slot()
    with pytest.raises(RuntimeError, match="out of memory"):
        list(predictor.predict_all(iter(some_patches(3)), slot=slot))
    with ReadAhead(iter(some_patches(3))) as ready, pytest.raises(RuntimeError, match="out of memory"):
        list(lanes_of(predictor).run(ready, slot))
    assert not slot.lock.locked()
    assert readers() == 0


def test_two_callers_share_one_predictor(predictor: Predictor) -> None:
    patches, lanes, slot = some_patches(4), lanes_of(predictor), threading.Lock()
    expected = [predictor.predict(patch) for patch in patches]
    got: dict[int, list[NDArray[np.float32]]] = {}

    def call(number: int) -> None:
        with ReadAhead(iter(patches)) as ready:
            got[number] = list(lanes.run(ready, slot))

    threads = [threading.Thread(target=call, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for number in range(2):
        np.testing.assert_array_equal(got[number], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_cuda_graphs_give_what_the_network_gives(predictor: Predictor, precision: str) -> None:
    weights, window = load_weights("compact"), some_patches(1)[0]
    statistics = calibrate(weights, window[None, None])
    ready = Predictor(weights, statistics=statistics, halo_voxels=HALO, precision=precision, device="cuda")
    patches = some_patches(5)
    got = list(ready.predict_all(iter(patches)))
    for a, patch in zip(got, patches, strict=True):
        np.testing.assert_array_equal(a, ready.predict(patch))
        with torch.inference_mode():
            eager = ready._compute(torch.from_numpy(patch)[None, None].cuda()).cpu().numpy()
        np.testing.assert_array_equal(a, eager)
        atol = 1e-5 if precision == "float32" else 0.1
        np.testing.assert_allclose(a, predictor.predict(patch), atol=atol)
