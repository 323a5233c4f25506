"""How large compressed bytes become, told before they are decoded: a few kB can be made to fill any memory.

Zstandard, Blosc and LZ4 say their size first, and decoders believe it; deflate does not, so where a chunk
might become too large it is decoded piece by piece and thrown away. Other codecs are not looked into, nor are
shards that are read whole.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

_SLACK = 2**16
_MOST_OF_DEFLATE = 1032
_ZSTD, _ZSTD_BLOCK = b"\x28\xb5\x2f\xfd", 2**17
_PIECE = 2**20


class ExpandsTooFarError(OSError):
    """Stored bytes that would become far more than their chunk."""


def check_expansion(data: Any, codec: str, *, chunk_bytes: int, key: str) -> None:
    """Refuse what would become more than its chunk.

    Parameters
    ----------
    data
        As stored: bytes, or an array of them.
    codec
        The outermost one, by its name in zarr.
    chunk_bytes
        What it must become.
    key
        Names it.

    Raises
    ------
    ExpandsTooFarError
        If it does.
    """
    limit = chunk_bytes + _SLACK
    size = _expanded(memoryview(data).cast("B"), codec, limit)
    if size > limit:
        raise ExpandsTooFarError(
            f"{key} would become at least {size:,} bytes when it is decoded; its chunk has {chunk_bytes:,}"
        )


def _expanded(data: memoryview, codec: str, limit: int) -> int:
    """Return the size after decoding, or a bound of it; 0 where nothing can be said."""
    if codec == "zstd" and bytes(data[:4]) == _ZSTD and len(data) > 5:
        return _of_zstd(data, limit)
    if codec == "blosc" and len(data) >= 16:
        return int(struct.unpack_from("<I", data, 4)[0])
    if codec == "lz4" and len(data) >= 4:
        return int(struct.unpack_from("<I", data, 0)[0])
    if codec in ("gzip", "zlib") and len(data) * _MOST_OF_DEFLATE > limit:
        return _of_deflate(data, limit)
    return 0


def _of_zstd(data: memoryview, limit: int) -> int:
    descriptor = data[4]
    single = descriptor >> 5 & 1
    size_bytes = (single, 2, 4, 8)[descriptor >> 6]
    at = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    if size_bytes:
        size = int.from_bytes(data[at : at + size_bytes], "little")
        return size + 256 if size_bytes == 2 else size
    # No size: each block says at least how large it can become. Writers that flush make small ones.
    bound = 0
    while at + 3 <= len(data) and bound <= 4 * limit:
        header = int.from_bytes(data[at : at + 3], "little")
        kind, n = header >> 1 & 3, header >> 3
        bound += n if kind < 2 else _ZSTD_BLOCK
        at += 3 + (1 if kind == 1 else n)
        if header & 1:
            break
    return bound if bound > 4 * limit else 0


def _of_deflate(data: memoryview, limit: int) -> int:
    decoder, size, rest = zlib.decompressobj(wbits=47), 0, bytes(data)
    while rest and size <= limit and not decoder.eof:
        try:
            size += len(decoder.decompress(rest, _PIECE))
        except zlib.error:
            return 0  # damaged: the codec says so
        rest = decoder.unconsumed_tail
    return size
