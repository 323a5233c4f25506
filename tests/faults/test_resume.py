"""A run that is stopped anywhere goes on, does no done block again, and ends with the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr
from distributed import Client

from braincensus import OutputError, RunConfig, open_result, run
from braincensus.progress import Silent

from .conftest import Started, configuration, result_bytes

Start = Callable[..., Started]


class Told(Silent):
    """Remembers what a run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)

    def kept(self, stage: str) -> int:
        """Return how many blocks of a stage were done before."""
        for text in self.said:
            if text.startswith(f"{stage}: ") and "done before" in text:
                return int(text.split()[1].replace(",", ""))
        return 0


GoOn = Callable[..., Told]


@pytest.fixture
def go_on(client: Client) -> GoOn:
    """Run on a cluster that is there, and return what was told."""

    def begin(brain: Path, output: Path, **changes: Any) -> Told:
        told = Told()
        config = RunConfig().merged(configuration(**changes))
        run(brain, output, config=config, client=client, progress=told)
        return told

    return begin


@pytest.fixture
def copy(undisturbed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "out.zarr"))


@pytest.mark.parametrize(
    ("stage", "blocks"),
    [
        ("label", 14),
        *(
            pytest.param(stage, blocks, marks=pytest.mark.slow)
            for stage, blocks in (("intensity", 1), ("segment", 1), ("threshold", 9), ("relabel", 5))
        ),
    ],
)
def test_everything_killed_at_once(
    go_on: GoOn, stage: str, blocks: int, brain: Path, undisturbed: Path, start: Start, tmp_path: Path
) -> None:
    output = tmp_path / "out.zarr"
    disturbed = start(output)
    disturbed.wait_for(stage, blocks)
    disturbed.kill_all()
    with pytest.raises(OutputError, match="has not finished"):
        open_result(output)
    done = len(list((output / "braincensus" / "done" / stage).glob("*/*.safetensors")))
    told = go_on(brain, output)
    assert told.kept(stage) >= done >= blocks
    assert result_bytes(output) == result_bytes(undisturbed)
    assert not list(tmp_path.glob(".*")), "no lock, no copy of the input is left"


def test_a_truncated_shard_and_a_lost_file_are_done_again(
    go_on: GoOn, brain: Path, undisturbed: Path, start: Start, tmp_path: Path
) -> None:
    output = tmp_path / "out.zarr"
    disturbed = start(output)
    disturbed.wait_for("label", 20)
    disturbed.kill_all()
    done = len(list((output / "braincensus" / "done" / "label").glob("*/*.safetensors")))
    shards = [p for p in (output / "braincensus" / "local_labels" / "c").rglob("*") if p.is_file()]
    shards[0].write_bytes(shards[0].read_bytes()[:-7])
    flipped = bytearray(shards[1].read_bytes())
    flipped[len(flipped) // 2] ^= 4
    shards[1].write_bytes(flipped)
    next((output / "braincensus" / "owned").iterdir()).unlink()
    told = go_on(brain, output)
    assert told.kept("label") < done
    assert told.kept("label") >= done - 3
    assert result_bytes(output) == result_bytes(undisturbed)


def test_a_damaged_mark_is_no_mark(
    go_on: GoOn, brain: Path, undisturbed: Path, start: Start, tmp_path: Path
) -> None:
    output = tmp_path / "out.zarr"
    disturbed = start(output)
    disturbed.wait_for("label", 3)
    disturbed.kill_all()
    for mark in (output / "braincensus" / "done" / "threshold").glob("*/*.safetensors"):
        mark.write_bytes(mark.read_bytes()[: mark.stat().st_size // 2])
    told = go_on(brain, output)
    assert told.kept("threshold") == 0
    assert told.kept("label") >= 3
    assert result_bytes(output) == result_bytes(undisturbed)


def test_a_finished_run_is_not_run_again(go_on: GoOn, brain: Path, copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    told = go_on(brain, copy)
    assert told.said == ["everything is there already: the same input, the same settings"]
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_another_spot_sigma_repeats_label_onward_only(
    go_on: GoOn, brain: Path, copy: Path, tmp_path: Path
) -> None:
    changed = {"spot_sigma": 1.2}
    go_on(brain, tmp_path / "anew" / "out.zarr", labelling=changed)
    told = go_on(brain, copy, labelling=changed)
    assert any("done blocks of intensity, segment, threshold are kept" in text for text in told.said)
    assert any("spot_sigma: [0.65, 0.65, 0.65] -> [1.2, 1.2, 1.2]" in text for text in told.said)
    assert (told.kept("segment"), told.kept("threshold"), told.kept("label")) == (1, 27, 0)
    assert result_bytes(copy) == result_bytes(tmp_path / "anew" / "out.zarr")


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"density": {"bin_um": 50.0}}, ("intensity", "segment", "threshold", "relabel")),
        ({"filters": {"min_volume_um3": 3000.0}}, ("intensity", "segment", "threshold")),
        ({"labelling": {"outline_sigma": 1.0}}, ("intensity", "segment")),
        ({"compute": {"block_voxels": 36}}, ("intensity", "segment")),
        ({"intensity": {"background_um": 60.0}}, ("intensity",)),
        ({"input": {"voxel_size_um": 4.0}}, ("intensity",)),
    ],
)
def test_a_changed_setting_redoes_what_depends_on_it(
    go_on: GoOn, changes: dict[str, Any], kept: tuple[str, ...], brain: Path, copy: Path, tmp_path: Path
) -> None:
    told = go_on(brain, copy, **changes)
    assert any(f"done blocks of {', '.join(kept)} are kept" in text for text in told.said), told.said
    go_on(brain, tmp_path / "anew" / "out.zarr", **changes)
    assert result_bytes(copy) == result_bytes(tmp_path / "anew" / "out.zarr")


def test_another_input_is_refused(go_on: GoOn, brain: Path, copy: Path, tmp_path: Path) -> None:
    before = result_bytes(copy)
    other = tmp_path / "other.npy"
    shutil.copy(brain, other)
    with pytest.raises(OutputError, match="census of another input"):
        go_on(other, copy)
    assert result_bytes(copy) == before
    assert open_result(copy).n_cells > 0


def test_fresh_starts_over(brain: Path, copy: Path, undisturbed: Path, client: Client) -> None:
    (copy / "braincensus" / "left_over").mkdir()
    run(brain, copy, config=RunConfig().merged(configuration()), client=client, fresh=True)
    assert not (copy / "braincensus" / "left_over").exists()
    assert result_bytes(copy) == result_bytes(undisturbed)


def test_an_output_of_an_earlier_version_is_refused(go_on: GoOn, brain: Path, copy: Path) -> None:
    root = json.loads((copy / "zarr.json").read_text())
    del root["attributes"]["braincensus"]["manifest"]
    (copy / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(OutputError, match=r"(?s)cannot be continued.*--fresh"):
        go_on(brain, copy)


def test_while_labels_are_redone_nothing_looks_finished(
    go_on: GoOn, brain: Path, copy: Path, start: Start
) -> None:
    disturbed = start(copy, configuration(labelling={"spot_sigma": 1.2}))
    disturbed.wait_for("label", 3)
    with pytest.raises(OutputError, match="has not finished"):
        open_result(copy)
    assert "ome" not in zarr.open_group(copy, mode="r").attrs
    disturbed.kill_all()
    told = go_on(brain, copy, labelling={"spot_sigma": 1.2})
    assert told.kept("label") >= 3


def test_a_lower_worker_memory_keeps_the_blocks_of_before(brain: Path, tmp_path: Path, start: Start) -> None:
    automatic = configuration()
    del automatic["compute"]["block_voxels"]
    output = tmp_path / "out.zarr"
    first = run(brain, output, config=RunConfig().merged(automatic))
    told = Told()
    automatic["compute"]["memory_limit_gib"] = 1.0
    automatic["labelling"] = {"spot_sigma": 1.0}
    again = run(brain, output, config=RunConfig().merged(automatic), progress=told)
    assert told.kept("threshold") > 0
    assert again.provenance["labelling"]["block_voxels"] == first.provenance["labelling"]["block_voxels"]
