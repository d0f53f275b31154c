"""Triton kernels. One file, one fused operation: its `@triton.jit` functions and the launchers that check, allocate
and launch. No autograd and no modules here; nothing here imports `resnet`."""
