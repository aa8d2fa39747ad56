"""What lies between a decoder layer's products: against Hugging Face's Llama, and kernels against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from specvlm_kernels import add_rms_norm, gated_silu, reference
from specvlm_kernels.decoder_ops import (
    GATED_COLUMNS,
    MOST_WIDTH,
    _add_rms_norm_kernel,
    _gated_silu_kernel,
)
from tests.kernels.tokens import assert_close, moved, normal
from tests.kernels.watch import launched

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


# Sum and norm.


@st.composite
def norms(draw):
    batch, rows, parts = draw(st.integers(1, 2)), draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 2, 5]))
    width, dtype, seed = draw(st.sampled_from([1, 3, 64, 200, 1025])), draw(DTYPES), draw(st.integers(0, 9))
    x = normal(batch, rows, width, seed=seed, dtype=dtype)
    return {
        "x": normal(parts, batch, rows, width, seed=seed) if parts else x,
        "residual": draw(st.sampled_from([None, normal(batch, rows, width, seed=seed + 1, dtype=dtype)])),
        "weight": normal(width, seed=seed + 2, dtype=dtype),
        "eps": draw(st.sampled_from([0.25, 1e-5])),
    }


def exact_norm(x, residual, weight, eps):
    """By the formula, of the sum as it is stored."""
    total = (x.double().sum(0) if x.dim() == 4 else x.double()) + (0 if residual is None else residual.double())
    stored = total.to(weight.dtype).double()
    return weight.double() * stored / (stored.square().mean(-1, keepdim=True) + eps).sqrt(), total


def check_norm(got, case):
    """Within the roundings of the results, and of a sum that fell to the other side."""
    normed, total = exact_norm(**case)
    for one, exact in zip(got, (normed, total), strict=True):
        assert (one.shape, one.dtype) == (exact.shape, case["weight"].dtype)
        if one.numel():
            error = (one.cpu().double() - exact).abs().max()
            assert error <= 4 * torch.finfo(one.dtype).eps * (1 + exact.abs().max())


@settings(max_examples=25, deadline=None)
@given(case=norms())
def test_norm_kernel(device, case):
    if case["x"].numel():
        with launched(_add_rms_norm_kernel):
            got = add_rms_norm(**moved(case, device))
    else:
        got = add_rms_norm(**moved(case, device))
    check_norm(got, case)


@settings(max_examples=60, deadline=None)
@given(case=norms())
def test_norm_reference(case):
    check_norm(add_rms_norm(**case), case)


def test_norm_of_a_stream_that_nothing_is_added_to_returns_it():
    x = normal(2, 3, 8)
    assert add_rms_norm(x, None, torch.ones(8), eps=0.0)[1] is x


def test_norm_kernel_takes_strided_tensors(device):
    wide, residual = normal(3, 2, 5, 2 * 96).to(device), normal(5, 2, 96, seed=1).transpose(0, 1).to(device)
    case = {"x": wide[..., ::2], "residual": residual, "weight": normal(192).to(device)[::2], "eps": 1e-3}
    with launched(_add_rms_norm_kernel):
        got = add_rms_norm(**case)
    check_norm(got, moved(case, "cpu"))


def test_a_rows_norm_does_not_hang_on_its_company(device):
    x, residual, weight = (normal(*shape, seed=i).to(device) for i, shape in enumerate(((1, 9, 77), (1, 9, 77), (77,))))
    with launched(_add_rms_norm_kernel):
        together, sums = add_rms_norm(x, residual, weight, eps=1e-5)
        for i in range(9):
            alone, total = add_rms_norm(x[:, i : i + 1], residual[:, i : i + 1], weight, eps=1e-5)
            assert torch.equal(alone, together[:, i : i + 1])
            assert torch.equal(total, sums[:, i : i + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_is_that_of_hugging_face(dtype):
    module, x = LlamaRMSNorm(64, eps=1e-3).to(dtype), normal(2, 5, 64, dtype=dtype)
    module.weight.data = normal(64, seed=1, dtype=dtype)
    with torch.no_grad():
        normed, _ = add_rms_norm(x, None, module.weight, eps=1e-3)
        torch.testing.assert_close(normed, module(x), rtol=3 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(3, 8)}, r"x: expected shape \[B, T, 8\], got \[3, 8\]"),
        ({"x": torch.zeros(2, 3, 8).half()}, "x: expected dtype float32, got float16"),
        ({"x": torch.zeros(4, 2, 3, 8).half()}, "x: expected dtype float32, got float16"),
        ({"x": torch.zeros(0, 2, 3, 8)}, "x: expected at least one part, got none"),
        ({"residual": torch.zeros(2, 2, 8)}, r"residual: expected shape \[2, 3, 8\], got \[2, 2, 8\]"),
        ({"residual": torch.zeros(2, 3, 8).double()}, "residual: expected dtype float32, got float64"),
        ({"weight": torch.zeros(8, 1)}, r"weight: expected shape \[H\], got \[8, 1\]"),
        ({"weight": torch.zeros(8).int()}, "weight: expected dtype float32 .*, got int32"),
        ({"weight": torch.zeros(8).to("meta")}, "weight: expected a tensor on a cuda or cpu device, got"),
        ({"eps": -1e-6}, "eps: expected a number of at least 0, got -1e-06"),
        ({"eps": float("nan")}, "eps: expected a finite number, got nan"),
    ],
)
def test_add_rms_norm_refuses(changed, message):
    arguments = {"x": torch.zeros(2, 3, 8), "residual": torch.zeros(2, 3, 8), "weight": torch.ones(8), "eps": 1e-5}
    with pytest.raises(ValueError, match=message):
        add_rms_norm(**arguments | changed)


@pytest.mark.interpreter
def test_the_norm_kernel_refuses_what_only_the_reference_does():
    with pytest.raises(ValueError, match="weight: expected dtype float32 or float16 or bfloat16, got float64"):
        add_rms_norm(torch.zeros(1, 1, 8).double(), None, torch.ones(8).double(), eps=0.0)
    with pytest.raises(ValueError, match=f"weight: expected at most {MOST_WIDTH} columns, got {MOST_WIDTH + 1}"):
        add_rms_norm(torch.zeros(1, 0, MOST_WIDTH + 1), None, torch.ones(MOST_WIDTH + 1), eps=0.0)
    with pytest.raises(ValueError, match="weight: expected a tensor that needs no gradient"):
        add_rms_norm(torch.zeros(1, 1, 8), None, torch.ones(8).requires_grad_(), eps=0.0)
    with pytest.raises(ValueError, match="gate_up: expected a tensor that needs no gradient"):
        gated_silu(torch.zeros(1, 1, 8).requires_grad_())


# Gated activation.


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 2),
    rows=st.integers(0, 3),
    width=st.sampled_from([1, 7, 200, GATED_COLUMNS, GATED_COLUMNS + 3]),
    dtype=DTYPES,
    seed=st.integers(0, 9),
)
def test_gated_kernel(device, batch, rows, width, dtype, seed):
    gate_up = 4 * normal(batch, rows, 2 * width, seed=seed, dtype=dtype)
    if rows:
        with launched(_gated_silu_kernel):
            got = gated_silu(gate_up.to(device))
    else:
        got = gated_silu(gate_up.to(device))
    exact = silu(gate_up[..., :width].double()) * gate_up[..., width:].double()
    assert_close([got], [exact], [exact.to(dtype)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gated_reference(dtype):
    gate_up = 4 * normal(2, 3, 14, dtype=dtype)
    exact = silu(gate_up[..., :7].double()) * gate_up[..., 7:].double()
    got = reference.gated_silu(gate_up)
    assert_close([got], [exact], [exact.to(dtype)])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gated_kernel_at_its_ends(device):
    """A gate that overflows its exponential is 0 or passes through, and no NaN."""
    gate = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4])
    with launched(_gated_silu_kernel):
        got = gated_silu(torch.cat([gate, torch.full((5,), 2.0)])[None, None].to(device))
    assert got[0, 0].tolist() == [0.0, 0.0, 0.0, 400.0, 2e4]


@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        (torch.zeros(2, 8), r"gate_up: expected shape \[B, T, 2 \* I\], got \[2, 8\]"),
        (torch.zeros(1, 2, 8).int(), "gate_up: expected dtype float32 .*, got int32"),
        (torch.zeros(1, 2, 7), "gate_up: expected an even number of columns, got 7"),
        (torch.zeros(1, 2, 8).to("meta"), "gate_up: expected a tensor on a cuda or cpu device, got"),
    ],
)
def test_gated_silu_refuses(gate_up, message):
    with pytest.raises(ValueError, match=message):
        gated_silu(gate_up)
