"""Kernels: arrays in, arrays out, on NumPy or CuPy; no Dask, no storage, no command line."""

from braincensus_kernels.components import connected_components
from braincensus_kernels.voronoi_otsu import voronoi_otsu
from braincensus_kernels.watershed import distance_watershed, watershed

__all__ = ["connected_components", "distance_watershed", "voronoi_otsu", "watershed"]
