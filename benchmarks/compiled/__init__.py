"""Tools that judge compiled kernels: they record launches, compile them for other devices, and read the code."""
