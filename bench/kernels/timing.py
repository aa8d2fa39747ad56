"""Times of GPU work without the host's share: CUDA graphs that walk through more memory than any cache holds."""

import itertools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from bench.kernels.registry import Call, Ceilings, Timing

#: Replays before a measurement; how many it is made of, and how long it may take: slow calls are repeated less often.
WARM_UP, FEWEST, MOST, SECONDS = 3, 7, 50, 0.3

#: Bytes of a copy and the side of a matrix product that show what the device can do.
COPY_BYTES, SIDE = 1 << 30, 8192

#: What makes a timing of a call and the number of its turns.
Timer = Callable[[Call, int], Timing]


@triton.jit
def _nothing_kernel(x):
    tl.store(x, tl.program_id(0))


def timed(call: Call, turns: int) -> Timing:
    """Times call(0), ..., call(turns - 1) as one graph; a result is one call's share."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for turn in range(min(turns, 3)):
            call(turn)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(turns):
            call(turn)
    warm = _replays(graph, WARM_UP)
    return spread([seconds / turns for seconds in _replays(graph, repeats(warm[-1]))])


def _replays(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    """Seconds of each of `count` replays."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [1e-3 * start.elapsed_time(end) for start, end in itertools.pairwise(marks)]


def repeats(seconds: float) -> int:
    """How often what takes `seconds` is measured."""
    return int(max(FEWEST, min(MOST, SECONDS / seconds)))


def spread(seconds: list[float]) -> Timing:
    """The median and its neighbours."""
    quantiles = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    p10, median, p90 = quantiles.tolist()
    return Timing(median, p10, p90)


def ceilings() -> Ceilings:
    """Measures what this device does at its best. Random data: zeros run faster than anything real."""
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = torch.randn(2, SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    product, cell = torch.empty_like(a), torch.zeros(1, dtype=torch.int32, device="cuda")
    copy = timed(lambda _: target.copy_(source), 4)
    multiply = timed(lambda _: torch.mm(a, b, out=product), 2)
    nothing = timed(lambda _: _nothing_kernel[(1,)](cell), 100)
    return Ceilings(2 * COPY_BYTES / copy.median, 2 * SIDE**3 / multiply.median, nothing.median)
