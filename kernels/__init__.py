"""Triton kernels. A file is one fusion: its `@triton.jit` functions, and the launcher that checks, allocates, launches.

Forward:

    batch_norm_statistics         mean and M2 of each row tile of an activation
    batch_norm_finalize           the tiles' moments merged into scale and shift; the running statistics updated
    batch_norm_add_relu           BatchNorm + residual add + ReLU
    batch_norm_max_pool           BatchNorm + ReLU + max-pool
    batch_norm_squeeze            BatchNorm [+ ReLU] + the mean over each image
    batch_norm_excite             BatchNorm [+ ReLU] + gate per image and channel [+ residual add] [+ ReLU]
    conv_forward                  [BatchNorm + ReLU +] convolution + bias, statistics or all of inference; 1x1 shortcut

Backward, where a prime stands for "the gradient through":

    batch_norm_backward_reduce    ReLU' + the two sums that BatchNorm' needs, which are its parameters' gradients
    batch_norm_backward_apply     ReLU' + BatchNorm'
    batch_norm_max_pool_backward  max-pool' + ReLU' + the two sums; max-pool' + ReLU' + BatchNorm'
    batch_norm_excite_backward    ReLU' + gate' and the two sums of each image
    batch_norm_squeeze_backward   gate' + the mean' [+ ReLU'] + BatchNorm'
    conv_grad_input               grad-input + ReLU' and the two sums, or + the shortcut's gradient, or + both
    conv_grad_weight              [BatchNorm + ReLU of the input +] grad-weight
    conv_grad_weight_max_pool     max-pool' + ReLU' + BatchNorm' + grad-weight

What they share:

    device/   functions that run inside kernels
    host/     what surrounds a launch: checks, shapes, tiles, files
    tuning/   the tile of a GEMM: table, model, timed choice

There is no autograd and there are no modules here, and nothing here imports the rest of `resnet`.
"""
