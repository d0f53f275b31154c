"""Tools that look at compiled kernels: they record launches, compile them for other devices, and judge them."""
