"""Results of blocks as named arrays, and back: plain data, nothing that could run when it is read.

A result is made of numbers, texts, None, arrays, lists, tuples, dictionaries with text keys, and of those
dataclasses and named tuples that the reader names. Everything comes back as it was, to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

_ABOUT = "about"


def pack(value: Any) -> dict[str, np.ndarray]:
    """Return `value` as named arrays.

    Raises
    ------
    TypeError
        If it holds something else than the above.

    Examples
    --------
    >>> unpack(pack({"a": (1, None), "b": np.arange(3)}))
    {'a': (1, None), 'b': array([0, 1, 2])}
    """
    arrays: dict[str, np.ndarray] = {}
    about = json.dumps(_encode(value, arrays))
    return {_ABOUT: np.frombuffer(about.encode(), dtype=np.uint8), **arrays}


def unpack(arrays: Mapping[str, np.ndarray], classes: Sequence[type] = ()) -> Any:
    """Return what `pack` was given.

    Parameters
    ----------
    arrays
        From `pack`.
    classes
        The dataclasses and named tuples that may be in it.

    Raises
    ------
    ValueError
        If the arrays are not from `pack`, or hold another class.
    """
    try:
        about = json.loads(bytes(arrays[_ABOUT]).decode())
        return _decode(about, arrays, {cls.__name__: cls for cls in classes})
    except (KeyError, TypeError, ValueError, UnicodeDecodeError) as err:
        raise ValueError(f"not a packed result: {type(err).__name__}: {err}") from err


def _encode(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | np.generic):
        name = str(len(arrays))
        arrays[name] = np.asarray(value)
        return {"array" if isinstance(value, np.ndarray) else "scalar": name}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        inside = {name: _encode(getattr(value, name), arrays) for name in value._fields}
        return {"class": type(value).__name__, "fields": inside}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_encode(item, arrays) for item in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(item, arrays) for key, item in value.items()}}
    if is_dataclass(value) and not isinstance(value, type):
        inside = {f.name: _encode(getattr(value, f.name), arrays) for f in fields(value)}
        return {"class": type(value).__name__, "fields": inside}
    raise TypeError(f"a result of a block cannot hold a {type(value).__name__}")


def _decode(about: Any, arrays: Mapping[str, np.ndarray], classes: Mapping[str, type]) -> Any:
    if not isinstance(about, dict):
        return about
    if "class" in about:
        inside = {name: _decode(item, arrays, classes) for name, item in about["fields"].items()}
        return classes[about["class"]](**inside)
    ((kind, content),) = about.items()
    if kind == "array":
        return arrays[content]
    if kind == "scalar":
        return arrays[content][()]
    if kind == "dict":
        return {key: _decode(item, arrays, classes) for key, item in content.items()}
    items = [_decode(item, arrays, classes) for item in content]
    return {"list": list, "tuple": tuple}[kind](items)
