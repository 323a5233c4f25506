"""One run at a time on one output: a lock file beside it, kept fresh by its holder.

It must outlive no crash, on any file system and from any node, so it is no lock of the operating system:
a file names who holds it, and its holder touches it every few seconds. A file that has not been touched for
a minute, or whose process on this machine is gone, belongs to a run that died, and is taken over.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from braincensus.errors import OutputError, explain
from braincensus.store.files import writing

_TOUCH_S = 5.0
_STALE_S = 60.0


class Lock:
    """Held while a run writes an output; see `locked`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._token = uuid.uuid4().hex
        self._over = threading.Event()
        self._lost = False
        self._thread = threading.Thread(target=self._keep_fresh, name="braincensus-lock", daemon=True)

    def check(self) -> None:
        """Raise if another run has taken the output over.

        Raises
        ------
        OutputError
            If it has: this process was stopped or asleep for longer than a minute.
        """
        if self._lost:
            raise OutputError(
                explain(
                    "another run has taken this output over",
                    found=_holder(_content(self._path)),
                    cause="this run was suspended for more than a minute",
                    remedy="wait for the other run, or stop it and run again: done blocks are kept",
                )
            )

    def take(self) -> None:
        """Take the lock, or refuse.

        Raises
        ------
        OutputError
            If another run holds it, or nothing can be written there.
        """
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(3):
                if self._create():
                    self._thread.start()
                    return
                if not _abandoned(self._path):
                    break
                # Renamed, not removed: of two runs that see it abandoned, one gets it.
                aside = self._path.with_name(f"{self._path.name}.{self._token}")
                try:
                    os.rename(self._path, aside)
                except FileNotFoundError:
                    continue
                aside.unlink(missing_ok=True)
        raise OutputError(
            explain(
                f"another run is writing {self._path.name.removeprefix('.').removesuffix('.lock')}",
                found=_holder(_content(self._path)),
                remedy="wait for it, stop it, or give another output; if it crashed, its lock lapses within "
                f"{_STALE_S:.0f} s",
            )
        )

    def release(self) -> None:
        """Give the lock back."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._is_mine():
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            content = {
                "token": self._token,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "process_began": psutil.Process().create_time(),
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            json.dump(content, file)
        return True

    def _keep_fresh(self) -> None:
        while not self._over.wait(_TOUCH_S):
            try:
                if not self._is_mine():
                    self._lost = True
                    return
                os.utime(self._path)
            except OSError:
                continue  # the file system is away: so is the output

    def _is_mine(self) -> bool:
        return bool(_content(self._path).get("token") == self._token)


@contextmanager
def locked(output: Path) -> Iterator[Lock]:
    """Hold the lock of an output, ``.NAME.lock`` beside it.

    Raises
    ------
    OutputError
        If another run holds it, or nothing can be written there.
    """
    lock = Lock(output.with_name(f".{output.name}.lock"))
    lock.take()
    try:
        yield lock
    finally:
        lock.release()


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _holder(content: dict[str, Any]) -> str:
    if not content:
        return "a lock file that names nobody"
    return f"process {content.get('pid')} on {content.get('host')}, since {content.get('since')}"


def _abandoned(path: Path) -> bool:
    """Whether the holder is gone: its process on this machine, or its touch."""
    content = _content(path)
    if content.get("host") == socket.gethostname() and content.get("pid") is not None:
        try:
            holder = psutil.Process(int(content["pid"]))
            began = holder.create_time()
            if holder.status() == psutil.STATUS_ZOMBIE:  # dead; its parent has not looked yet
                return True
        except psutil.NoSuchProcess:
            return True
        except (psutil.Error, ValueError, TypeError):
            pass
        else:  # a number that another process has got since
            if abs(began - float(content.get("process_began", began))) > 1.0:
                return True
    try:
        age = _now_at(path.parent) - path.stat().st_mtime
    except FileNotFoundError:
        return True
    return age > _STALE_S


def _now_at(folder: Path) -> float:
    """Return the time by the clock that stamps files there, which need not be this machine's."""
    probe = folder / f".{uuid.uuid4().hex}.clock"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
