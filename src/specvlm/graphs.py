"""Forwards that are recorded once and then replayed: on a GPU a round is launched by one call instead of hundreds.

A recording has its own copies of its inputs and writes its own outputs. So a call copies the inputs in, replays, and
copies the outputs out: who calls owns what comes back, and no later replay changes it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Records a call without arguments: gives what replays it, and the tensors that each replay fills.
Recorder = Callable[[Callable[[], tuple[Tensor, ...]]], tuple[Callable[[], Any], tuple[Tensor, ...]]]


class CudaRecorder:
    """Records CUDA graphs that share one memory pool; they must be replayed one after the other.

    Args:
        device: the GPU.

    Attributes:
        bytes: what the pool has taken of the device's memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self.bytes = 0

    def __call__(self, call: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], Any], tuple[Tensor, ...]]:
        with torch.cuda.device(self._device):
            # Once outside: kernels are compiled and libraries take their workspaces before anything is recorded.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                call()
            torch.cuda.current_stream().wait_stream(stream)
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = call()
            self._pool = graph.pool()
            self.bytes += max(0, torch.cuda.memory_reserved() - before)
        return graph.replay, outputs


class Recorded:
    """A function of tensors, recorded for inputs of one shape.

    Args:
        function: of tensors on the device; waits for nothing on the host. It is not kept.
        inputs: a first set, with which it is recorded.
        recorder: as `CudaRecorder`.
    """

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], recorder: Recorder
    ) -> None:
        with torch.inference_mode(False), torch.no_grad():  # so that they can be written to in any mode
            self._inputs = tuple(torch.empty_like(one, memory_format=torch.contiguous_format) for one in inputs)
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        held = self._inputs
        self._replay, self._outputs = recorder(lambda: function(*held))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What `function` would return for `inputs`, of the shapes and dtypes it was recorded with."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        self._replay()
        return tuple(one.clone() for one in self._outputs)
