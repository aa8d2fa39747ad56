"""The resampler gives what attention with all its keys and values gives, and so do its gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specvlm_kernels import resample_tokens
from specvlm_kernels.token_resampling import (
    _matmul_kernel,
    _softmax_backward_kernel,
    _softmax_kernel,
    launch_matmul,
    launch_scores,
)
from tests.kernels.tokens import assert_close, check_compiled, check_kernels, far_apart, moved, normal, with_gradients
from tests.kernels.watch import launched

KERNELS = (_matmul_kernel, _softmax_kernel, _softmax_backward_kernel)
WANTS = ("x", "queries", "key_weight", "value_weight")


def formula(x, queries, key_weight, value_weight, scale=None):
    """From the definition: keys and values of all tokens, one softmax a row."""
    heads, dim = queries.shape[1:]
    keys, values = ((x @ weight.t()).unflatten(2, (heads, dim)) for weight in (key_weight, value_weight))
    scores = torch.einsum("qhd,bthd->bhqt", queries, keys) * (dim**-0.5 if scale is None else scale)
    return torch.einsum("bhqt,bthd->bqhd", scores.softmax(-1), values).flatten(2)


def case_of(tokens=19, channels=20, queries=(2, 3, 8), *, batch=2, dtype=torch.float32, seed=0):
    """Weights as a layer's are initialised: scores and results are of size one."""
    count, heads, dim = queries
    weights = [(normal(heads * dim, channels, seed=seed + i) * channels**-0.5).to(dtype) for i in (2, 3)]
    return {
        "x": normal(batch, tokens, channels, seed=seed, dtype=dtype),
        "queries": normal(count, heads, dim, seed=seed + 1, dtype=dtype),
        "key_weight": weights[0],
        "value_weight": weights[1],
    }


def check(case: dict, device: str) -> None:
    """`formula` in the case's dtype rounds keys, values and weights, as the kernels round what they write."""
    check_kernels(KERNELS, resample_tokens, formula, device, WANTS, case)


@st.composite
def cases(draw, tokens, dtypes, channels=(1, 20, 32, 45)):
    queries = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 8, 20])))
    return case_of(
        draw(st.sampled_from(tokens)),
        draw(st.sampled_from(channels)),
        queries,
        batch=draw(st.integers(1, 2)),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 99)),
    )


# The kernels.


@settings(max_examples=4, deadline=None)
@given(case=cases([1, 2, 40], (torch.float32, torch.float16)))
def test_kernels_give_attention_and_its_gradients(device, case):
    check(case, device)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(case=cases([63, 64, 65, 130], (torch.float32, torch.float16), (32, 130)))
def test_kernels_give_attention_and_its_gradients_on_more_tokens(device, case):
    check(case, device)


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(case=cases([1, 17, 576, 1000], (torch.bfloat16, torch.float16, torch.float32), (1, 45, 128, 500)))
def test_kernels_give_attention_and_its_gradients_on_a_gpu(case):
    check(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [576, 2880])
@pytest.mark.parametrize("heads", [32, 40])
def test_kernels_on_pictures_of_llava(tokens, heads):
    case = moved(case_of(tokens, 128 * heads, (2, heads, 128), batch=1, dtype=torch.bfloat16), "cuda")
    with launched(*KERNELS):
        got = with_gradients(resample_tokens, WANTS, **case)
    exact = with_gradients(formula, WANTS, **moved(case, torch.float64))
    assert_close(got, exact, with_gradients(formula, WANTS, **case))


def test_kernels_sum_scores_over_channels_in_parts(device):
    case = moved(case_of(5, 200, (1, 2, 4), batch=1), device)
    assert launch_scores(case["x"], case["x"]).shape == (3, 1, 5, 5)
    check(moved(case, "cpu"), device)


@pytest.mark.parametrize(
    ("rows", "parts", "dtype"), [(20, 2, torch.float32), (2, 5, torch.float32), (140, 1, torch.float16)]
)
def test_matmul_kernel_on_many_rows_in_parts_and_of_any_strides(device, rows, parts, dtype):
    """The last part may be empty: it is written all the same."""
    a, b = (
        normal(2, rows, 70, dtype=dtype).to(device),
        normal(70, 2, 33, seed=1, dtype=dtype).to(device).transpose(0, 1),
    )
    out = torch.full((33, 2, rows, parts), torch.nan, device=device).permute(3, 1, 2, 0)
    with launched(_matmul_kernel):
        launch_matmul(a, b, out, 32, 32)
    torch.testing.assert_close(out.sum(0), a.float() @ b.float(), rtol=1e-4, atol=1e-4)


def test_softmax_kernels_on_more_tokens_than_a_tile(device):
    """Scores rise and fall, so that a later tile's largest replaces an earlier one's and the other way round."""
    part = (6 * normal(2, 1, 2, 5000)).to(device)
    part[:, 0, 1] = part[:, 0, 1].flip(-1).sort().values
    weights, slopes = (torch.full((1, 2, 5000), torch.nan, device=device) for _ in range(2))
    _softmax_kernel[(2,)](part, weights, 1.4426950408889634, 5000, 2, part.stride(0), PARTS=2, BLOCK_T=2048)
    scores = part.sum(0).double().requires_grad_()
    exact = scores.softmax(-1)
    torch.testing.assert_close(weights.double(), exact.detach(), rtol=1e-4, atol=1e-7)
    _softmax_backward_kernel[(2,)](part, weights, slopes, 1.0, 5000, 2, part.stride(0), PARTS=2, BLOCK_T=2048)
    (expected,) = torch.autograd.grad(exact, scores, part.sum(0).double())
    torch.testing.assert_close(slopes.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, -0.7, 3])
def test_kernels_take_a_scale(device, scale):
    check_kernels(KERNELS, resample_tokens, formula, device, WANTS, case_of(5) | {"scale": scale})


def test_kernels_survive_large_scores(device):
    case = case_of(9)
    case["queries"] *= 1000
    out = resample_tokens(**moved(case, device))
    torch.testing.assert_close(out.cpu(), formula(**case), rtol=1e-3, atol=1e-3)


def test_kernels_take_any_strides(device):
    case = moved(case_of(12), device)
    turned = torch.empty(20, 12, 2, device=device).permute(2, 1, 0).copy_(case["x"])
    spread = torch.empty(4, 24, 25, device=device)[1::2, 1::2, 2:22].copy_(case["x"])
    views = {
        "queries": torch.empty(8, 3, 2, device=device).permute(2, 1, 0).copy_(case["queries"]),
        "key_weight": torch.empty(20, 24, device=device).t().copy_(case["key_weight"]),
        "value_weight": torch.empty(48, 20, device=device)[::2].copy_(case["value_weight"]),
    }
    expected = with_gradients(resample_tokens, WANTS, **case)
    for view in (turned, spread):
        got = with_gradients(resample_tokens, WANTS, x=view, **views)
        for one, same in zip(got, expected, strict=True):
            assert torch.equal(one, same)


def test_kernels_take_a_gradient_without_strides(device):
    case = moved(case_of(5), device)
    leaf, twin = case["queries"].detach().requires_grad_(), case["queries"].double().requires_grad_()
    resample_tokens(**case | {"queries": leaf}).sum().backward()
    formula(**moved(case, torch.float64) | {"queries": twin}).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), twin.grad, rtol=1e-4, atol=1e-5)


def test_kernels_address_by_64_bits(device):
    case = moved(case_of(3, 4, (1, 1, 2), batch=1, dtype=torch.float16), device)
    got = with_gradients(resample_tokens, WANTS, **case | {"x": far_apart(case["x"])})
    for one, same in zip(got, with_gradients(resample_tokens, WANTS, **case), strict=True):
        assert torch.equal(one, same)


def test_kernels_on_an_empty_batch(device):
    out, *grads = with_gradients(resample_tokens, WANTS, **moved(case_of(batch=0), device))
    assert out.shape == (0, 2, 24)
    assert [grad.shape for grad in grads] == [(0, 19, 20), (2, 3, 8), (24, 20), (24, 20)]
    assert not any(grad.any() for grad in grads)


def test_kernels_read_no_neighbours(device):
    """Beside the tokens, which are a view, and behind them lies NaN."""
    case = moved(case_of(5), device)
    whole = torch.full((2, 9, 30), torch.nan, device=device)
    x = whole[:, 2:7, 3:23].copy_(case["x"])
    for out in with_gradients(resample_tokens, WANTS, **case | {"x": x}):
        assert out.isfinite().all()


def test_tokens_that_want_no_gradient_cost_none(device):
    case = moved(case_of(5), device)
    leaves = [case[name].requires_grad_() for name in WANTS[1:]]
    out = resample_tokens(**case)
    gradients = torch.ops.specvlm_kernels.resample_tokens_backward(
        torch.ones_like(out),
        *(case[name].detach() for name in WANTS),
        *torch.ops.specvlm_kernels.resample_tokens(*case.values(), 8**-0.5)[1:],
        8**-0.5,
        False,
    )
    assert len(gradients) == 3
    for one, same in zip(gradients, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert torch.equal(one, same)


def test_kernels_are_operators_that_compile_whole(device):
    check_compiled(KERNELS, resample_tokens, WANTS, **moved(case_of(3, 4, (1, 2, 2), batch=1), device))


@pytest.mark.slow
@pytest.mark.parametrize("wants_x", [None, True, False])
def test_the_operators_keep_torchs_rules(device, wants_x):
    """No argument is changed or returned, and the shapes without data are those with it, also of unknown sizes."""
    inputs = [x.to(device) for x in case_of(5, 4, (1, 2, 2)).values()]
    operators = torch.ops.specvlm_kernels
    if wants_x is None:
        torch.library.opcheck(operators.resample_tokens, (*inputs, 0.5))
    else:
        out, *saved = operators.resample_tokens(*inputs, 0.5)
        torch.library.opcheck(operators.resample_tokens_backward, (out, *inputs, *saved, 0.5, wants_x))


@pytest.mark.gpu
def test_kernels_never_wait_for_the_host():
    case = moved(case_of(576, 512, (2, 4, 128), dtype=torch.bfloat16), "cuda")
    leaves = {name: x.requires_grad_() for name, x in case.items()}
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            resample_tokens(**leaves).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# The reference.


@settings(max_examples=40, deadline=None)
@given(case=cases([1, 2, 40], (torch.float64,)), scale=st.sampled_from([None, -0.3, 2.0]))
def test_reference_gives_attention_and_its_gradients(case, scale):
    got = with_gradients(resample_tokens, WANTS, **case, scale=scale)
    for one, exact in zip(got, with_gradients(formula, WANTS, **case, scale=scale), strict=True):
        torch.testing.assert_close(one, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reference_computes_in_fp32(dtype):
    case = case_of(dtype=dtype)
    exact = formula(**moved(case, torch.float64))
    assert (resample_tokens(**case) - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_reference_gradients():
    case = case_of(4, 3, (2, 2, 2), dtype=torch.float64)
    tensors = tuple(case[name].requires_grad_() for name in WANTS)
    torch.autograd.gradcheck(resample_tokens, tensors)


def test_reference_compiles_whole():
    check_compiled((), resample_tokens, WANTS, **case_of())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 4)}, r"x: expected shape \[B, T, C\], got \[6, 4\]"),
        ({"x": torch.zeros(1, 0, 4)}, r"x: expected at least one token and one channel, got shape \[1, 0, 4\]"),
        ({"x": torch.zeros(1, 6, 4).long()}, "x: expected dtype float32 or .*, got int64"),
        ({"x": torch.zeros(1, 6, 4).to("meta")}, "x: expected a tensor on a cuda or cpu device, got meta"),
        ({"queries": torch.zeros(2, 6)}, r"queries: expected shape \[Q, heads, D\], got \[2, 6\]"),
        ({"queries": torch.zeros(2, 2, 3).half()}, "queries: expected dtype float32, got float16"),
        ({"queries": torch.zeros(2, 2, 3).to("meta")}, "queries: expected a tensor on cpu, got meta"),
        ({"queries": torch.zeros(0, 2, 3)}, r"queries: expected at least one query, head and value, got shape \[0, 2,"),
        ({"queries": torch.zeros(2, 0, 3)}, r"queries: expected at least one query, head and value, got shape \[2, 0,"),
        ({"queries": torch.zeros(2, 2, 0)}, r"queries: expected at least one query, head and value, got shape \[2, 2,"),
        ({"key_weight": torch.zeros(6, 3)}, r"key_weight: expected shape \[6, 4\], got \[6, 3\]"),
        ({"key_weight": torch.zeros(6, 4).double()}, "key_weight: expected dtype float32, got float64"),
        ({"key_weight": torch.zeros(6, 4).to("meta")}, "key_weight: expected a tensor on cpu, got meta"),
        ({"value_weight": torch.zeros(4, 6)}, r"value_weight: expected shape \[6, 4\], got \[4, 6\]"),
        ({"value_weight": torch.zeros(6, 4).half()}, "value_weight: expected dtype float32, got float16"),
        ({"value_weight": torch.zeros(6, 4).to("meta")}, "value_weight: expected a tensor on cpu, got meta"),
        ({"scale": float("inf")}, "scale: expected a finite number, got inf"),
        ({"scale": "1"}, "scale: expected a finite number, got '1'"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    weight = torch.zeros(6, 4)
    good = {"x": torch.zeros(1, 6, 4), "queries": torch.zeros(2, 2, 3), "key_weight": weight, "value_weight": weight}
    with pytest.raises(ValueError, match=message):
        resample_tokens(**(good | change))


def test_the_kernels_take_no_doubles(device):
    case = moved(moved(case_of(5), torch.float64), device)
    with pytest.raises(ValueError, match="x: expected dtype float32 or float16 or bfloat16, got float64"):
        resample_tokens(**case)
