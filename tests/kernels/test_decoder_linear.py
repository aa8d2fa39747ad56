"""A decoder layer's products for few rows: against float64, and a row's bits whatever its company."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from specvlm_kernels import add_rms_norm, gated_linear, linear, linear_parts
from specvlm_kernels.decoder_linear import (
    FILLING_PROGRAMS,
    _gated_linear_kernel,
    _linear_kernel,
    launch_linear,
    linear_config,
    parts_config,
    parts_of,
)
from tests.kernels.tokens import assert_close, moved, normal
from tests.kernels.watch import launched

#: Products in bf16 are garbage in Triton's interpreter.
INTERPRETED_DTYPES = [torch.float32, torch.float16]


def product_case(rows, columns, outputs, *, batch=1, dtype=torch.float32, bias=True, seed=0):
    case = {
        "x": normal(batch, rows, columns, seed=seed, dtype=dtype),
        "weight": normal(outputs, columns, seed=seed + 1).div(columns**0.5).to(dtype),
    }
    return case | ({"bias": normal(outputs, seed=seed + 2, dtype=dtype)} if bias else {})


def exact_product(x, weight, bias=None):
    return x.double() @ weight.double().T + (0 if bias is None else bias.double())


@st.composite
def products(draw, even=False):
    outputs = draw(st.sampled_from([2, 70, 128, 130]) if even else st.sampled_from([1, 63, 65, 130]))
    return product_case(
        draw(st.sampled_from([0, 1, 3, 17, 65])),
        draw(st.sampled_from([1, 40, 64, 130])),
        outputs,
        batch=draw(st.integers(1, 2)),
        dtype=draw(st.sampled_from(INTERPRETED_DTYPES)),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
    )


def check(op, kernel, case, device, exact):
    """The op on a device, its kernel in it, against `exact` and plain torch's rounding of it."""
    if case["x"].numel():
        with launched(kernel):
            got = op(**moved(case, device))
    else:
        got = op(**moved(case, device))
    assert_close([got], [exact], [exact.to(case["x"].dtype)])


@settings(max_examples=12, deadline=None)
@given(case=products())
def test_linear_kernel(device, case):
    check(linear, _linear_kernel, case, device, exact_product(**case))


def test_a_bias_of_minus_infinity_is_its_outputs_value_alone(device):
    case = product_case(3, 40, 130)
    case["bias"][70:] = -torch.inf
    with launched(_linear_kernel):
        got = linear(**moved(case, device)).cpu()
    assert (got[..., 70:] == -torch.inf).all()
    exact = exact_product(**case)[..., :70]
    assert_close([got[..., :70]], [exact], [exact.float()])


@settings(max_examples=12, deadline=None)
@given(case=products(even=True))
def test_gated_kernel(device, case):
    case.pop("bias", None)
    gate, up = exact_product(**case).chunk(2, dim=-1)
    check(gated_linear, _gated_linear_kernel, case, device, silu(gate) * up)


@settings(max_examples=12, deadline=None)
@given(case=products(), parts=st.integers(1, 4))
def test_parts_of_the_kernel_are_its_sum(device, case, parts):
    case.pop("bias", None)
    cut = replace(linear_config(1, case["x"].dtype), block_k=32)
    exact, case = exact_product(**case), moved(case, device)
    got = launch_linear(case["x"], case["weight"], None, cut, parts)
    assert (got.shape, got.dtype) == ((parts, *exact.shape), torch.float32)
    torch.testing.assert_close(got.sum(0).double().cpu(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_norm_adds_up_what_the_product_was_cut_into(device, parts):
    case, residual = product_case(5, 200, 70, bias=False), normal(1, 5, 70, seed=8)
    exact = exact_product(**case) + residual
    given = moved(case, device)
    summed = launch_linear(given["x"], given["weight"], None, parts_config(torch.float32), parts)
    _, total = add_rms_norm(summed, residual.to(device), torch.ones(70, device=device), eps=1e-5)
    torch.testing.assert_close(total.cpu().double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_references(dtype):
    case = product_case(3, 40, 10, batch=2, dtype=dtype)
    exact = exact_product(**case)
    plain = {name: case[name] for name in ("x", "weight")}
    gate, up = exact_product(**plain).chunk(2, dim=-1)
    options = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(linear(**case), exact, **options)
    torch.testing.assert_close(linear_parts(**plain).sum(0), exact_product(**plain), **options)
    torch.testing.assert_close(gated_linear(**plain), silu(gate) * up, **options)


def test_a_row_does_not_hang_on_its_company(device):
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    case = moved(product_case(70, 200, 130, dtype=dtype), device)
    with launched(_linear_kernel, _gated_linear_kernel):
        for rows in (1, 2, 64, 70):
            few = case | {"x": case["x"][:, :rows]}
            plain = {"x": few["x"], "weight": few["weight"][:128]}
            results = [linear(**few), linear_parts(**plain)[-1], gated_linear(**plain)]
            firsts = [one[:, :1].clone() for one in results]
            if rows == 1:
                alone = firsts
            for one, other in zip(firsts, alone, strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("rows", "columns", "parts"), [(4096, 4096, 4), (4096, 11008, 4), (5120, 5120, 3), (5120, 13824, 3), (32064, 64, 1)]
)
def test_weights_of_few_rows_are_cut_until_they_fill_the_chip(rows, columns, parts):
    config = parts_config(torch.bfloat16)
    assert parts_of(rows, columns, config) == parts
    assert parts == 1 or 0.9 <= parts * rows / (2 * config.block_h) / FILLING_PROGRAMS <= 1


@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [
        (linear, {"x": torch.zeros(2, 8)}, r"x: expected shape \[B, T, K\], got \[2, 8\]"),
        (linear, {"x": torch.zeros(1, 2, 8).int()}, "x: expected dtype float32 .*, got int32"),
        (linear, {"x": torch.zeros(1, 2, 0), "weight": torch.zeros(4, 0)}, "x: expected at least one column, got none"),
        (linear, {"weight": torch.zeros(4, 7)}, r"weight: expected shape \[N, 8\], got \[4, 7\]"),
        (linear, {"weight": torch.zeros(4, 8).half()}, "weight: expected dtype float32 or float8_e4m3fn, got float16"),
        (linear, {"weight": torch.zeros(8, 4).T}, "weight: expected a contiguous last axis"),
        (linear, {"bias": torch.zeros(5)}, r"bias: expected shape \[4\], got \[5\]"),
        (linear_parts, {"weight": torch.zeros(4, 8).to("meta")}, "weight: expected a tensor on cpu, got meta"),
        (gated_linear, {"weight": torch.zeros(5, 8)}, "weight: expected an even number of rows, got 5"),
    ],
)
def test_products_refuse(op, changed, message):
    with pytest.raises(ValueError, match=message):
        op(**{"x": torch.zeros(1, 2, 8), "weight": torch.zeros(4, 8)} | changed)


@pytest.mark.interpreter
def test_the_kernels_refuse_what_only_the_references_do():
    with pytest.raises(ValueError, match="x: expected dtype float32 or float16 or bfloat16, got float64"):
        linear(torch.zeros(1, 1, 8).double(), torch.zeros(4, 8).double())
    with pytest.raises(ValueError, match="weight: expected a tensor that needs no gradient"):
        gated_linear(torch.zeros(1, 1, 8), torch.zeros(4, 8).requires_grad_())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 128])
def test_kernels_at_a_models_size_in_bf16(rows):
    case = moved(product_case(rows, 4096, 4096, dtype=torch.bfloat16, bias=False), "cuda")
    exact = exact_product(**case)
    plain = case["x"] @ case["weight"].T
    assert_close([linear(**case), linear_parts(**case).sum(0).bfloat16()], [exact] * 2, [plain] * 2)
    gate, up = exact.chunk(2, dim=-1)
    plain = silu(plain[..., :2048]) * plain[..., 2048:]
    assert_close([gated_linear(**case)], [silu(gate) * up], [plain])
