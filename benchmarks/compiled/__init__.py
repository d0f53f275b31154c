"""Tools that look at compiled kernels: they record launches, compile them for devices that are not here, and judge them."""
