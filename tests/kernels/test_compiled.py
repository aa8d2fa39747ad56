"""Every public op stands inside `torch.compile(fullgraph=True)`: one graph, and what comes out is what the op gives."""

import importlib
from typing import Any

import pytest
import torch

import specvlm_kernels
from specvlm.doctor import CASES, Case, _tensors
from specvlm_kernels import acceptance

#: The modules of the ops that are operators only where a compiler traces them, under their names with an underscore.
MODULES = {
    "pack_ancestors": "ancestors",
    "tree_attention": "tree_attention",
    "draw": "acceptance",
    "accept": "acceptance",
    "accept_ratio": "ratio_acceptance",
    "accept_typical": "relaxed_acceptance",
    "accept_within": "relaxed_acceptance",
    "draft_topk": "drafting",
    "select_beam": "tree_growth",
    "rerank_tree": "tree_growth",
    "write_kv": "kv_cache",
    "compact_kv": "kv_cache",
    "add_rms_norm": "decoder_ops",
    "gated_silu": "decoder_ops",
    "linear": "decoder_linear",
    "linear_parts": "decoder_linear",
    "gated_linear": "decoder_linear",
    "rotary_write_kv": "rotary",
    "rotary_linear": "rotary",
}
OPAQUE = [case for case in CASES if case.op in MODULES]


def ran(op: Any, case: Case) -> list[torch.Tensor]:
    """What `op` returns and changes, of fresh arguments."""
    arguments = case.arguments(torch.float32)
    returned = _tensors(op(**arguments))
    return [*returned, *(arguments[name] for name in case.changed)]


def check_compiled(case: Case, **options: Any) -> None:
    torch.compiler.reset()
    op, seen = getattr(specvlm_kernels, case.op), []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def doubled(**arguments: Any) -> list[torch.Tensor]:
        returned = op(**arguments)
        return [2 * tensor for tensor in _tensors(returned)]

    compiled = torch.compile(doubled, fullgraph=True, **options or {"backend": backend})
    expected = ran(op, case)
    changed = len(case.changed)
    returned = len(expected) - changed
    for _ in range(2):  # once compiling, once compiled
        got = ran(compiled, case)
        for i, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert torch.equal(one, 2 * other if i < returned else other)
    if case.op in MODULES and not options:
        assert any(target.startswith(f"specvlm_kernels.{case.op}") for target in seen), seen


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_a_reference_is_one_graph(case):
    check_compiled(case)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.op, marks=() if case.op in ("write_kv", "accept_within") else pytest.mark.slow)
        for case in OPAQUE
    ],
)
def test_a_kernel_is_one_graph(case):
    check_compiled(case)


@pytest.mark.parametrize("case", OPAQUE, ids=lambda case: case.op)
def test_an_operator_is_functionalised(case):
    """Through AOTAutograd, as inductor has it: what an op writes into is written back."""
    check_compiled(case, backend="aot_eager", dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", OPAQUE, ids=lambda case: case.op)
def test_an_operator_passes_torchs_own_checks(case, monkeypatch):
    """Schema, fake implementation and registration, of the very calls that a compiled program makes."""
    module = importlib.import_module(f"specvlm_kernels.{MODULES[case.op]}")
    operator, calls = getattr(module, f"_{case.op}"), []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: not calls)
    monkeypatch.setattr(module, f"_{case.op}", lambda *args: calls.append(args) or operator(*args))
    getattr(specvlm_kernels, case.op)(**case.arguments(torch.float32))
    assert calls
    torch.library.opcheck(
        operator, calls[0], test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def test_numbers_may_change_and_bad_values_are_found_when_they_come():
    compiled = torch.compile(specvlm_kernels.draw, fullgraph=True, backend="eager")
    logits, positions = torch.randn(1, 2, 50), torch.zeros(1, 2, dtype=torch.int32)
    seed = torch.tensor([3])
    for options in ({}, {"temperature": 0.7, "seed": seed}, {"temperature": 1.3, "top_k": 5, "seed": seed}):
        assert torch.equal(compiled(logits, positions, **options), specvlm_kernels.draw(logits, positions, **options))
    with pytest.raises(ValueError, match="positions: expected values in"):
        compiled(logits, positions - 1)
    with pytest.raises(ValueError, match="temperature: expected a finite number >= 0"):
        compiled(logits, positions, temperature=torch.tensor([-1.0]), seed=seed)


def test_an_eager_call_goes_past_the_operator(monkeypatch):
    """Whose dispatch costs as much as some of the references do."""
    monkeypatch.setattr(acceptance, "_draw", None)
    specvlm_kernels.draw(torch.zeros(1, 1, 5), torch.zeros(1, 1, dtype=torch.int32))


@pytest.mark.parametrize("parts", [(), (1,), (3,)])
def test_a_norm_of_a_stream_that_nothing_is_added_to(parts):
    """Eagerly its total is the stream itself, which an operator may not return."""
    x, weight = torch.randn(*parts, 1, 2, 8), torch.ones(8)
    compiled = torch.compile(specvlm_kernels.add_rms_norm, fullgraph=True, backend="aot_eager")
    got, expected = (op(x, None, weight, eps=1e-5) for op in (compiled, specvlm_kernels.add_rms_norm))
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.interpreter
def test_a_compiled_product_knows_how_many_parts_it_has():
    x, weight = torch.randn(1, 2, 512), torch.randn(4, 512)
    expected = specvlm_kernels.linear_parts(x, weight)
    assert len(expected) == 2
    assert torch.equal(
        torch.compile(specvlm_kernels.linear_parts, fullgraph=True, backend="aot_eager")(x, weight), expected
    )


@pytest.mark.parametrize("op", ["add_rms_norm", "add_rms_norm alone", "gated_silu", "linear", "gated_linear"])
def test_results_lie_as_a_compiler_is_told_whatever_the_arguments_strides(op):
    x, weight = torch.randn(5, 2, 8).transpose(0, 1), torch.randn(8, 8)
    calls = {
        "add_rms_norm": lambda: specvlm_kernels.add_rms_norm(x, x, weight[0], eps=1e-5),
        "add_rms_norm alone": lambda: specvlm_kernels.add_rms_norm(x, None, weight[0], eps=1e-5),
        "gated_silu": lambda: (specvlm_kernels.gated_silu(x),),
        "linear": lambda: (specvlm_kernels.linear(x, weight),),
        "gated_linear": lambda: (specvlm_kernels.gated_linear(x, weight),),
    }
    compiled = torch.compile(lambda: [one.view(-1) for one in calls[op]()], fullgraph=True, backend="aot_eager")
    expected = [one.contiguous().view(-1) for one in calls[op]()]
    assert all(torch.equal(one, other) for one, other in zip(compiled(), expected, strict=True))
