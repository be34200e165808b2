"""The operations in Numba for the CPU. They release the GIL; callers run blocks in threads."""
