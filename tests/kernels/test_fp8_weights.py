"""Weights of 8 bits: rows keep what e4m3 can of them, and products read the numbers that they stand for."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from specvlm_kernels import decoder_linear, fp8, gated_linear, linear, linear_parts, rotary_linear
from specvlm_kernels.decoder_linear import _gated_linear_kernel, _linear_kernel, linear_config
from specvlm_kernels.fp8 import BLOCK_ROWS, FP8, dequantized_rows, quantize_rows
from specvlm_kernels.rotary import _rotary_linear_kernel
from tests.kernels.test_decoder_linear import check, exact_product, product_case, products
from tests.kernels.test_rotary import exact_rotation, rotary_products
from tests.kernels.tokens import assert_close, moved, normal
from tests.kernels.watch import launched

WAYS = ["native", "bytes"]


@contextlib.contextmanager
def reading(way: str) -> Iterator[None]:
    """How the kernels read e4m3 within it: "native", by the hardware's conversion, or "bytes", byte by byte."""
    if way == "native" and not fp8.is_native():
        pytest.skip("this GPU has no e4m3")
    with mock.patch.object(decoder_linear, "is_native", return_value=way == "native"):
        yield


def quantised(case):
    """A case with an e4m3 weight, and the numbers that this stands for."""
    weight, scale = quantize_rows(case["weight"])
    return case | {"weight": weight, "weight_scale": scale}, weight.double() * scale.double()[:, None]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=8, deadline=None)
@given(case=products())
def test_linear_kernel(device, way, case):
    small, weight = quantised(case)
    with reading(way):
        check(linear, _linear_kernel, small, device, exact_product(case["x"], weight, case.get("bias")))
        small.pop("bias", None)
        exact = exact_product(case["x"], weight)
        got = linear_parts(**moved(small, device)).cpu()
    torch.testing.assert_close(got.sum(0).double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=8, deadline=None)
@given(case=products(even=True))
def test_gated_kernel(device, way, case):
    case.pop("bias", None)
    small, weight = quantised(case)
    gate, up = exact_product(case["x"], weight).chunk(2, dim=-1)
    with reading(way):
        check(gated_linear, _gated_linear_kernel, small, device, silu(gate) * up)


def check_rotary(case, device):
    small, weight = quantised(case)
    rotation = {name: one for name, one in case.items() if name not in ("x", "weight", "bias")}
    exact = exact_rotation(exact_product(case["x"], weight, case["bias"]), **rotation)
    given = moved(small, device)
    given |= {name: given[name].clone() for name in ("k_cache", "v_cache")}
    q = rotary_linear(**given)
    assert_close([q, given["k_cache"], given["v_cache"]], exact, [one.to(case["x"].dtype) for one in exact])


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=8, deadline=None)
@given(case=rotary_products())
def test_rotary_kernel(device, way, case):
    with reading(way), launched(_rotary_linear_kernel) if case["x"].numel() else contextlib.nullcontext():
        check_rotary(case, device)


@settings(max_examples=20, deadline=None)
@given(case=rotary_products())
def test_rotary_reference(case):
    if case["x"].dtype == torch.float32:  # in fp16 the product is rounded before it is turned
        check_rotary(case, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_references(dtype):
    case, weight = quantised(product_case(3, 40, 10, batch=2, dtype=dtype))
    exact = exact_product(case["x"], weight, case["bias"])
    assert_close([linear(**case)], [exact], [exact.to(dtype)])
    case.pop("bias")
    exact = exact_product(case["x"], weight)
    gate, up = exact.chunk(2, dim=-1)
    parts = linear_parts(**case)
    assert parts.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(parts.sum(0).double(), exact, rtol=1e-5, atol=1e-5)
    plain = silu(gate.to(dtype)) * up.to(dtype)
    assert_close([gated_linear(**case)], [silu(gate) * up], [plain])


def test_a_row_does_not_hang_on_its_company(device):
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    case = moved(quantised(product_case(70, 200, 130, dtype=dtype))[0], device)
    plain = {name: case[name] for name in ("weight", "weight_scale")}
    firsts = []
    with launched(_linear_kernel, _gated_linear_kernel):
        for rows in (1, 2, 64, 70):
            few = {"x": case["x"][:, :rows]}
            results = linear(**case | few), linear_parts(**plain, **few)[-1], gated_linear(**plain, **few)
            firsts.append([one[:, :1].clone() for one in results])
    for some in firsts[1:]:
        assert all(torch.equal(one, other) for one, other in zip(some, firsts[0], strict=True))


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(0, 5),
    columns=st.integers(1, 70),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 9),
)
def test_a_row_keeps_three_bits_of_mantissa(rows, columns, size, dtype, seed):
    weight = (size * normal(rows, columns, seed=seed)).to(dtype)
    kept, scale = quantize_rows(weight)
    assert (kept.dtype, scale.dtype, scale.shape) == (FP8, torch.float32, (rows,))
    read = kept.double() * scale.double()[:, None]
    # Half a step: of a sixteenth where a number is normal, of 2^-9 below.
    bound = torch.maximum(weight.double().abs() / 16, scale.double()[:, None] * 2**-10)
    assert ((read - weight.double()).abs() <= bound * (1 + 1e-5)).all()
    if rows:
        assert (kept.float().abs().amax(dim=1) == 448).all()


def test_rows_without_numbers_stay_zero():
    kept, scale = quantize_rows(torch.zeros(3, 8))
    assert not kept.float().any()
    assert (scale > 0).all()


def test_the_weights_of_8_bits_have_twice_the_columns_in_flight_or_twice_the_warps():
    plain = linear_config(10**6, torch.bfloat16)
    for way, columns, warps in (("native", 2, 1), ("bytes", 1, 2)):
        with mock.patch.object(decoder_linear, "is_native", return_value=way == "native"):
            small = linear_config(10**6, torch.bfloat16, FP8)
        assert small.block_k == columns * plain.block_k
        assert small.num_warps == warps * plain.num_warps


@pytest.mark.parametrize("op", [linear, linear_parts, gated_linear])
def test_products_refuse(op):
    x, weight = torch.zeros(1, 2, 8), torch.zeros(4, 8)
    with pytest.raises(ValueError, match="weight_scale: expected a tensor, got NoneType"):
        op(x, weight.to(FP8))
    with pytest.raises(ValueError, match=r"weight_scale: expected shape \[4\], got \[8\]"):
        op(x, weight.to(FP8), weight_scale=torch.ones(8))
    with pytest.raises(ValueError, match="weight_scale: expected dtype float32, got float16"):
        op(x, weight.to(FP8), weight_scale=torch.ones(4).half())
    with pytest.raises(ValueError, match="weight_scale: expected None for a float32 weight, got one"):
        op(x, weight, weight_scale=torch.ones(4))


@pytest.mark.parametrize("op", [linear, linear_parts, gated_linear])
def test_a_compiled_product_takes_them(op):
    torch.compiler.reset()
    case, _ = quantised(product_case(3, 40, 10, bias=False))
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**case), op(**case))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 128])
def test_kernels_at_a_models_size_in_bf16(rows):
    case, weight = quantised(moved(product_case(rows, 4096, 4096, dtype=torch.bfloat16, bias=False), "cuda"))
    exact = exact_product(case["x"], weight)
    plain = case["x"] @ weight.bfloat16().T  # a weight that is rounded once more
    got = linear(**case), linear_parts(**case).sum(0).bfloat16()
    assert_close(list(got), [exact] * 2, [plain] * 2)
    gate, up = exact.chunk(2, dim=-1)
    plain = silu(plain[..., :2048]) * plain[..., 2048:]
    assert_close([gated_linear(**case)], [silu(gate) * up], [plain])


@pytest.mark.parametrize("rows", [1, BLOCK_ROWS, BLOCK_ROWS + 3])
def test_rows_are_quantised_and_read_one_by_one(rows):
    """However many there are at a time."""
    weight = torch.randn(rows, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, scale = quantize_rows(weight)
    expected = (weight.float().abs().amax(dim=1) / 448).clamp(min=torch.finfo(torch.float32).tiny)
    assert torch.equal(scale, expected)
    divided = (weight.float() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(values.view(torch.uint8), divided.view(torch.uint8))
    read = dequantized_rows(values, scale, torch.bfloat16)
    assert torch.equal(read, (values.float() * scale[:, None]).bfloat16())
