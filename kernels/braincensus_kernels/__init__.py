"""Kernels: arrays in, arrays out, on NumPy or CuPy; no Dask, no storage, no command line."""
