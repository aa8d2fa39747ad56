"""Every public op is captured in a CUDA graph and replayed with other values: other lengths, trees, seeds, logits."""

from typing import Any

import pytest
import torch

import specvlm_kernels
from specvlm.doctor import CASES, Arguments, Case, _tensors

pytestmark = pytest.mark.gpu


def on_gpu(arguments: Arguments, flipped: bool) -> Arguments:
    """The arguments on the GPU; flipped: the batch's rows in reverse, so that each has the other's lengths and tree."""
    return {
        name: (x.flip(0) if flipped else x).contiguous().cuda() if isinstance(x, torch.Tensor) else x
        for name, x in arguments.items()
    }


def results(case: Case, arguments: Arguments) -> list[torch.Tensor]:
    """What the op returns, and what it changes."""
    return [*_tensors(getattr(specvlm_kernels, case.op)(**arguments)), *(arguments[name] for name in case.changed)]


def same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_captured_op_serves_other_values(case, dtype):
    def fresh(flipped: bool) -> Arguments:
        return on_gpu(case.arguments(dtype), flipped)

    expected = [results(case, fresh(flipped)) for flipped in (False, True)]
    assert not same(*expected), "the other values have to give something else"
    still = fresh(False)

    def refill(flipped: bool) -> None:
        for name, x in fresh(flipped).items():
            if isinstance(x, torch.Tensor):
                still[name].copy_(x)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(case, still)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    refill(False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got: Any = results(case, still)
    for flipped in (True, False, True):
        refill(flipped)
        for x in got[: len(got) - len(case.changed)]:
            x.fill_(-77)
        graph.replay()
        assert same(got, expected[flipped])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_a_compiled_op_is_captured_by_inductor(case):
    """`mode="reduce-overhead"` captures what it compiles, operators of ours included."""
    arguments = on_gpu(case.arguments(torch.float32), flipped=False)
    expected = results(case, on_gpu(case.arguments(torch.float32), flipped=False))
    torch.compiler.reset()
    op = getattr(specvlm_kernels, case.op)
    compiled = torch.compile(lambda **x: _tensors(op(**x)), fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        for name in case.changed:
            arguments[name].copy_(case.arguments(torch.float32)[name])
        got = [*(x.clone() for x in compiled(**arguments)), *(arguments[name] for name in case.changed)]
        assert same(got, expected)
