"""Whether an output may be begun at a path. Nothing here changes anything.

Only what braincensus wrote may ever be replaced, and only when asked: not a file, not a folder of
something else, not a link, not an output to which someone added, not one that holds the input.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from braincensus.errors import OutputError, explain
from braincensus.store.files import PARTIAL
from braincensus.store.root import progress, recorded_at

_OURS = {
    "": {"labels", "density", "tables", "braincensus"},
    "labels": {"cells"},
    "tables": {"cells", "blocks"},
}


def check_free(
    path: str | os.PathLike[str], *, overwrite: bool, protect: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Check that an output can be begun at `path`, without changing anything; see `create_output`.

    Raises
    ------
    OutputError
        If not; says what is there and what to do.
    """
    place = absolute(path)
    if place.is_symlink():
        raise OutputError(
            explain(
                f"{place} is a symbolic link",
                found=f"a link to {os.readlink(place)}",
                remedy="give the path of a new folder; links are never followed or replaced",
            )
        )
    if place.exists():
        _check_replaceable(place, overwrite=overwrite, protect=protect)
    _check_writable(place)


def _check_replaceable(place: Path, *, overwrite: bool, protect: Iterable[str | os.PathLike[str]]) -> None:
    if not place.is_dir():
        raise OutputError(
            explain(f"{place} is a file", expected="a folder to be made", remedy="give another path")
        )
    if all(entry.name.endswith(PARTIAL) for entry in place.iterdir()):
        return  # empty, or where a run died before its first file
    recorded = recorded_at(place)
    if recorded is None:
        raise OutputError(
            explain(
                f"{place} exists and is not an output of braincensus",
                found=_listing(entry.name for entry in place.iterdir()),
                remedy="give another path; only outputs of braincensus are ever replaced",
            )
        )
    if not overwrite:
        if recorded.get("status") == "complete":
            problem, remedy = "is a finished output", "give another path, or start over with --fresh"
        else:
            problem = "is an unfinished output"
            remedy = "if no other run is writing it, start over with --fresh"
        raise OutputError(explain(f"{place} {problem}", found=progress(recorded), remedy=remedy))
    foreign = _foreign_entries(place)
    if foreign:
        raise OutputError(
            explain(
                f"{place} holds more than braincensus wrote, so it is not removed",
                found=_listing(foreign),
                remedy="move that elsewhere, or give another path",
            )
        )
    real = Path(os.path.realpath(place))
    for kept in protect:
        if Path(os.path.realpath(kept)).is_relative_to(real):
            raise OutputError(
                explain(
                    f"replacing {place} would remove {os.fspath(kept)}",
                    cause="the input of this run lies in the output of an earlier one",
                    remedy="give another output path",
                )
            )


def _check_writable(place: Path) -> None:
    existing = place
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        problem = f"{existing} is a file"
    elif not os.access(existing, os.W_OK | os.X_OK):
        problem = f"{existing} cannot be written"
    else:
        return
    raise OutputError(
        explain(f"cannot make {place}", found=problem, remedy="choose a folder that you can write to")
    )


def _foreign_entries(place: Path) -> list[str]:
    """Return what in an output is not ours: labels, tables or files that someone added."""
    foreign = []
    for group, names in _OURS.items():
        folder = place / group
        for entry in folder.iterdir() if folder.is_dir() else ():
            known = names | {"zarr.json", ".DS_Store"}
            level = group == "" and entry.name.isdigit()
            if entry.name not in known and not level and not entry.name.endswith(PARTIAL):
                foreign.append(f"{group}/{entry.name}".lstrip("/"))
    return sorted(foreign)


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return the path in full; refuses a URL, which would become a folder of a strange name."""
    text = os.fspath(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise OutputError(
            explain(
                f"{text} is not a path of this machine",
                expected="a folder in a file system that all workers share",
                remedy="write to a folder, and copy the finished output to the object store",
            )
        )
    return Path(text).absolute()


def _listing(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
