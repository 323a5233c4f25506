"""Phantoms: synthetic light-sheet volumes whose cells are known; see `model`."""

from braincensus_kernels.phantom.model import Cells, Phantom

__all__ = ["Cells", "Phantom"]
