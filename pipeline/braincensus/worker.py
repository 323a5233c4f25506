"""What one worker process keeps between blocks: the device's slot and the models, loaded once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

T = TypeVar("T")

device_slot = threading.Lock()
"""Held while a block uses all of the worker's compute threads (or its GPU); other blocks load meanwhile."""

_loading = threading.Lock()
_kept: dict[str, tuple[Hashable, Any]] = {}


def keep(kind: str, key: Hashable, load: Callable[[], T]) -> T:
    """Return the object of this kind and key, loading it the first time; one of each kind is kept.

    Examples
    --------
    >>> keep("model", "weights-a", lambda: object()) is keep("model", "weights-a", lambda: object())
    True
    """
    with _loading:
        held = _kept.get(kind)
        if held is None or held[0] != key:
            held = (key, load())
            _kept[kind] = held
        value: T = held[1]
        return value
