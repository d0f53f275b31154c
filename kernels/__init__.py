"""Triton kernels. One file, one fused operation: its `@triton.jit` functions and the launcher that checks, allocates
and launches. No autograd and no modules here; nothing here imports the rest of `resnet`.

    device/   functions that run inside kernels
    host/     what surrounds a launch: checks, shapes, tiles, files
    tuning/   the tile of a GEMM: table, model, timed choice
"""
