"""What was done where a GPU had too little memory. Part of stage 2."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spared:
    """Patches for which the GPU had too little memory: what else was done."""

    sparing: int = 0
    """With one set of buffers and no graph: the same bits, slower."""
    on_cpu: int = 0
    """On the CPU: the same but for rounding."""

    def __add__(self, other: Spared) -> Spared:
        """Count together."""
        return Spared(self.sparing + other.sparing, self.on_cpu + other.on_cpu)
