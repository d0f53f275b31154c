"""Functions that run inside kernels: the mathematics and the addressing that several fusions share."""
