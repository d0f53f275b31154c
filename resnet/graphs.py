"""A function as a CUDA graph: its launches are recorded once and replayed, without Python between them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

_WARM_UP = 3  # runs before a capture, as PyTorch's recipe has it: by then all is compiled, chosen and allocated


class Graphed:
    """`function` of one tensor as a CUDA graph, for tensors of the shape that `example` has.

    The function is run on a copy of `example` a few times, then captured.

    Args:
        function: reads and writes tensors that stay where they are, and returns new ones. It must not wait for the
            device, and what Python computes in it is the same for each replay.
    """

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]], example: Tensor):
        self.shape = example.shape
        self._input = example.clone()
        self._replay, self._outputs = capture(partial(function, self._input), example.device)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """What `function` returns for x: the same tensors each time, with new values."""
        self._input.copy_(x)
        self._replay()
        return self._outputs


def capture(
    function: Callable[[], tuple[Tensor, ...]], device: torch.device
) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """(what replays `function`, the tensors that each replay fills), after some runs on the stream of the capture.

    It follows "whole-network capture" in PyTorch's notes on CUDA graphs. The runs are on that stream since autograd
    ties the sum of a parameter's gradient to the stream of its first use.
    """
    current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            function()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Within: it waits for the current device, and leaves its stream current where a capture fails.
        with torch.cuda.graph(graph, stream=stream):
            outputs = function()
    return graph.replay, outputs
