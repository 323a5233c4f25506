"""Kernels: arrays in, arrays out, on NumPy or CuPy; no Dask, no storage, no command line."""

from braincensus_kernels.voronoi_otsu import voronoi_otsu

__all__ = ["voronoi_otsu"]
