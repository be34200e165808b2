"""Kernels: arrays in, arrays out.

`tscfile_kernels.ops` declares every operation once, with its checks; ``reference`` is plain NumPy
and obviously right, ``cpu`` is Numba. Files and functions have the same names in both.
"""
