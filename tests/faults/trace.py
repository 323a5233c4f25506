"""Loaded by workers before they work: notes which blocks are begun and done, in the folder $FAULTS_TRACE.

What is noted is what was really computed: blocks that an earlier run had done, and that were only read back,
are told apart.
"""

from __future__ import annotations

import os
import time
from typing import Any

from braincensus import tasks

_plain = tasks._do_once


def _note(word: str, block: str) -> None:
    """Leave a file without content: that can be done under every limit."""
    name = f"{time.time_ns()}:{word}:{block.replace('/', '!')}:{os.getpid()}"
    os.close(os.open(os.path.join(os.environ["FAULTS_TRACE"], name), os.O_WRONLY | os.O_CREAT))


def _do_once(once: Any, number: int) -> Any:
    if not once.key or not os.environ.get("FAULTS_TRACE"):
        return _plain(once, number)
    block = f"{once.stage}/{once.step}/{number}"
    _note("begun", block)
    try:
        kept, result = _plain(once, number)
    except BaseException:
        _note("failed", block)
        raise
    _note("kept" if kept else "done", block)
    return kept, result


_do_once.__module__ = "braincensus.tasks"


def dask_setup(worker: Any) -> None:
    """Take the place of what every block goes through."""
    del worker
    tasks._do_once = _do_once
