"""Two runs on one output exclude each other; a crash locks for no longer than it must."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from braincensus import OutputError, RunConfig, run
from braincensus.store import lock
from braincensus.store.lock import locked

from .conftest import Started, configuration


def lock_file(output: Path) -> Path:
    return output.with_name(f".{output.name}.lock")


def test_a_second_run_is_refused_and_says_who_holds_it(
    brain: Path, tmp_path: Path, start: Callable[..., Started]
) -> None:
    output = tmp_path / "out.zarr"
    first = start(output)
    first.wait_for("intensity", 1)
    with pytest.raises(
        OutputError, match=rf"another run is writing out.zarr\n.*process {first.process.pid} on"
    ):
        run(brain, output, config=RunConfig().merged(configuration()))
    said = first.finish()
    assert first.process.returncode == 0, said
    assert not lock_file(output).exists()


def test_given_back_after_an_error(tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    with pytest.raises(ZeroDivisionError), locked(output):
        len(str(lock_file(output).exists())) / 0
    assert not lock_file(output).exists()
    with locked(output):
        pass


def test_a_dead_process_of_this_machine_locks_nobody(tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    code = (
        "import sys, time; from pathlib import Path; from braincensus.store.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(output)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="another run"), locked(output):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(output):
        pass


def test_a_process_of_another_machine_is_judged_by_its_touch(tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    held = lock_file(output)
    held.write_text(json.dumps({"token": "x", "host": "another", "pid": 1, "since": "then"}))
    with pytest.raises(OutputError, match="process 1 on another, since then"), locked(output):
        pass
    old = time.time() - 2 * lock._STALE_S
    os.utime(held, (old, old))
    with locked(output):
        assert json.loads(held.read_text())["pid"] == os.getpid()


def test_a_number_that_another_process_has_got_is_no_holder(tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    with locked(output):
        content = json.loads(lock_file(output).read_text())
    content["process_began"] -= 1000
    lock_file(output).write_text(json.dumps(content))
    with locked(output):
        taken = json.loads(lock_file(output).read_text())
    assert taken["token"] != content["token"]


def test_the_holder_keeps_it_fresh_and_notices_its_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_TOUCH_S", 0.02)
    output = tmp_path / "out.zarr"
    with locked(output) as held:
        os.utime(lock_file(output), (1, 1))
        until = time.monotonic() + 10
        while lock_file(output).stat().st_mtime < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert lock_file(output).stat().st_mtime > 2
        held.check()
        lock_file(output).write_text(json.dumps({"token": "y", "host": "another", "pid": 2, "since": "now"}))
        while time.monotonic() < until:
            time.sleep(0.02)
            try:
                held.check()
            except OutputError as err:
                assert "taken this output over" in str(err)  # noqa: PT017
                break
        else:
            pytest.fail("the loss was not noticed")
    assert json.loads(lock_file(output).read_text())["token"] == "y", "another's lock is not removed"
