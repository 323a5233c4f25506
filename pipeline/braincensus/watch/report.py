"""Dask's performance report of a run, saved on request: one HTML page that opens without a network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distributed import Client
from distributed import performance_report as dask_report

from braincensus.errors import ConfigError, explain
from braincensus.progress import Progress


def check_report(path: str | Path | None) -> None:
    """Refuse a report that could not be written, before anything runs.

    Raises
    ------
    ConfigError
        If the folder is missing or not writable, or the path is a folder.
    """
    if path is None:
        return
    path = Path(path)
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            explain(
                f"the performance report cannot be written to {path}",
                expected="a file name in a folder that exists and can be written",
                found="a folder" if path.is_dir() else f"{folder}: missing, or not writable",
                remedy="make the folder, or give another path",
            )
        )


@contextmanager
def reporting(client: Client, path: str | Path | None, progress: Progress) -> Iterator[None]:
    """Save a report of what the cluster does meanwhile, of a run that fails, too; whole or not at all.

    A report that cannot be made or written is a message, never an error: the run counts.
    """
    if path is None:
        yield
        return
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    report = dask_report(str(partial), mode="inline")

    def begin() -> None:
        report.__enter__()

    def save() -> None:
        report.__exit__(None, None, None)
        partial.replace(path)

    with client.as_current():
        begun = _attempt(begin, progress)
        try:
            yield
        finally:
            if begun and _attempt(save, progress):
                progress.message(f"performance report: {path}")
            partial.unlink(missing_ok=True)


def _attempt(step: Callable[[], None], progress: Progress) -> bool:
    try:
        step()
    except Exception as err:
        progress.message(f"no performance report: {type(err).__name__}: {err}")
        return False
    return True
