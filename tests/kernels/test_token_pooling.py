"""Pooling and convolution over a grid of tokens, forward and backward, against sums window by window."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specvlm_kernels import conv_tokens, pool_tokens, reference
from specvlm_kernels.token_pooling import (
    CONV_CHANNELS,
    POOL_CHANNELS,
    _conv_backward_tokens_kernel,
    _conv_backward_weight_kernel,
    _conv_kernel,
    _pool_backward_kernel,
    _pool_kernel,
    launch_conv_tokens_backward_tokens,
    launch_conv_tokens_backward_weight,
    launch_pool_tokens_backward,
)
from tests.kernels.tokens import check_compiled, check_kernels, far_apart, moved, normal, with_gradients
from tests.kernels.watch import launched

POOL = (_pool_kernel, _pool_backward_kernel)
CONV = (_conv_kernel, _conv_backward_tokens_kernel, _conv_backward_weight_kernel)
CONV_WANTS = ("x", "weight", "bias")


def pool_case(grid=(5, 7), stride=2, *, batch=2, channels=5, dtype=torch.float32, seed=0):
    return {"x": normal(batch, grid[0] * grid[1], channels, seed=seed, dtype=dtype), "grid": grid, "stride": stride}


def conv_case(grid=(5, 7), stride=2, kernel=3, *, batch=2, channels=5, dtype=torch.float32, seed=0):
    weights = {
        "weight": normal(channels, kernel, kernel, seed=seed + 1, dtype=dtype),
        "bias": normal(channels, seed=seed + 2, dtype=dtype),
    }
    return pool_case(grid, stride, batch=batch, channels=channels, dtype=dtype, seed=seed) | weights


def check_pool(case, device):
    check_kernels(POOL, pool_tokens, reference.pool_tokens, device, ("x",), case)


def check_conv(case, device):
    check_kernels(CONV, conv_tokens, reference.conv_tokens, device, CONV_WANTS, case)


GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 5))
KERNEL_DTYPES = st.sampled_from([torch.float32, torch.float16])


@st.composite
def pools(draw, grids=GRIDS, dtypes=KERNEL_DTYPES):
    channels = draw(st.sampled_from([1, 3, 16, 130]))
    batch, stride = draw(st.integers(1, 2)), draw(st.integers(1, 9))
    return pool_case(
        draw(grids), stride, batch=batch, channels=channels, dtype=draw(dtypes), seed=draw(st.integers(0, 9))
    )


@st.composite
def convs(draw, grids=GRIDS, dtypes=KERNEL_DTYPES):
    grid, channels = draw(grids), draw(st.sampled_from([1, 3, 16, 130]))
    kernel, stride = draw(st.integers(1, min(grid))), draw(st.integers(1, 9))
    batch, seed = draw(st.integers(1, 2)), draw(st.integers(0, 9))
    return conv_case(grid, stride, kernel, batch=batch, channels=channels, dtype=draw(dtypes), seed=seed)


# The kernels.


@settings(max_examples=4, deadline=None)
@given(case=pools())
def test_pool_kernel_and_its_gradient(device, case):
    check_pool(case, device)


@settings(max_examples=4, deadline=None)
@given(case=convs())
def test_conv_kernel_and_its_gradients(device, case):
    check_conv(case, device)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(case=pools(st.tuples(st.integers(1, 13), st.integers(1, 13))))
def test_pool_kernel_and_its_gradient_on_larger_grids(device, case):
    check_pool(case, device)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(case=convs(st.tuples(st.integers(1, 13), st.integers(1, 13))))
def test_conv_kernel_and_its_gradients_on_larger_grids(device, case):
    check_conv(case, device)


GPU_GRIDS = st.tuples(st.integers(1, 40), st.integers(1, 40))
GPU_DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(case=pools(GPU_GRIDS, GPU_DTYPES))
def test_pool_kernel_and_its_gradient_on_a_gpu(case):
    check_pool(case, "cuda")


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(case=convs(GPU_GRIDS, GPU_DTYPES))
def test_conv_kernel_and_its_gradients_on_a_gpu(case):
    check_conv(case, "cuda")


@pytest.mark.gpu
def test_kernels_on_five_pictures_of_llava():
    check_pool(pool_case((120, 24), 5, batch=1, channels=4096, dtype=torch.bfloat16), "cuda")
    check_conv(conv_case((120, 24), 2, batch=1, channels=4096, dtype=torch.bfloat16), "cuda")


def test_kernels_at_the_last_tile(device):
    check_pool(pool_case((2, 1), 1, channels=POOL_CHANNELS + 3), device)
    check_pool(pool_case((9, 8), 20, channels=67), device)  # a window of more tokens than a program has in flight
    check_conv(conv_case((3, 5), 1, 2, batch=1, channels=CONV_CHANNELS + 3), device)


def test_kernels_on_one_token(device):
    check_pool(pool_case((1, 1), 1, batch=1), device)
    check_conv(conv_case((1, 1), 1, 1, batch=1), device)


@pytest.mark.parametrize("stride", [4, 2**31 - 1])
def test_kernels_take_any_stride(device, stride):
    check_pool(pool_case((3, 5), stride), device)
    check_conv(conv_case((3, 5), stride, 2), device)


def test_kernels_take_wide_windows(device):
    """More taps than a program of the weight's gradient sums, and more than are unrolled."""
    check_conv(conv_case((4, 5), 1, 4, batch=1, channels=3), device)
    wide = conv_case((9, 10), 1, 9, batch=1, channels=3)
    torch.testing.assert_close(conv_tokens(**moved(wide, device)).cpu(), reference.conv_tokens(**wide))


def test_kernel_takes_no_bias(device):
    case = conv_case() | {"bias": None}
    check_kernels(CONV, conv_tokens, reference.conv_tokens, device, ("x", "weight"), case)


def test_kernels_take_tokens_and_gradients_of_any_strides(device):
    dense, weight, bias = (x.to(device) for x in (normal(2, 6, 5), normal(5, 2, 2), normal(5)))
    spread = torch.empty(4, 12, 9, device=device)[1::2, 1::2, 2:7].copy_(dense)
    across = torch.empty(2, 2, 5, device=device).permute(2, 0, 1).copy_(weight)
    larger = normal(2, 12, 5, seed=1).to(device)
    for view in (spread, dense[:1, :, :1].expand(2, -1, 5)):
        same = view.contiguous()
        assert torch.equal(pool_tokens(view, (2, 3), 2), pool_tokens(same, (2, 3), 2))
        assert torch.equal(
            conv_tokens(view, (2, 3), across, bias, 1), conv_tokens(same, (2, 3), across.contiguous(), bias, 1)
        )
        # As gradients, and as tokens of a gradient.
        for launch, *arguments in (
            (launch_pool_tokens_backward, 4, 6, 2),
            (launch_conv_tokens_backward_tokens, 3, 4, across, 1),
            (lambda grad: launch_conv_tokens_backward_weight(grad, larger, 4, 2, 1)[0],),
            (lambda x: launch_conv_tokens_backward_weight(larger[:, :2], x, 3, 2, 1)[0],),
        ):
            assert torch.equal(launch(view, *arguments), launch(same, *arguments))


def test_kernels_address_by_64_bits(device):
    x = normal(1, 3, 4, dtype=torch.float16).to(device)
    far, weight = far_apart(x), normal(4, 1, 1, dtype=torch.float16).to(device)
    assert torch.equal(pool_tokens(far, (3, 1), 2), pool_tokens(x, (3, 1), 2))
    assert torch.equal(conv_tokens(far, (3, 1), weight, None, 2), conv_tokens(x, (3, 1), weight, None, 2))
    # As gradients: of three windows over five tokens.
    five = normal(1, 5, 4, seed=1, dtype=torch.float16).to(device)
    for launch, *arguments in (
        (launch_pool_tokens_backward, 5, 1, 2),
        (launch_conv_tokens_backward_tokens, 5, 1, weight, 2),
        (lambda *rest: launch_conv_tokens_backward_weight(*rest)[0], five, 1, 1, 2),
    ):
        assert torch.equal(launch(far, *arguments), launch(x, *arguments))
    grad = normal(1, 2, 4, seed=2, dtype=torch.float16).to(device)
    for one, other in zip(*(launch_conv_tokens_backward_weight(grad, each, 1, 1, 2) for each in (far, x)), strict=True):
        assert torch.equal(one, other)


def test_kernels_on_an_empty_batch(device):
    case = moved(conv_case(batch=0), device)
    with launched(*CONV):
        out, *grads = with_gradients(conv_tokens, CONV_WANTS, **case)
    assert out.shape == (0, 6, 5)
    assert [grad.shape for grad in grads] == [(0, 35, 5), (5, 3, 3), (5,)]
    assert not any(grad.any() for grad in grads)
    out, grad = with_gradients(pool_tokens, ("x",), x=case["x"], grid=(5, 7), stride=2)
    assert (out.shape, grad.shape) == ((0, 12, 5), (0, 35, 5))


def test_kernels_read_only_what_windows_see(device):
    """What a stride leaves out, and what lies beside the tokens, may hold anything."""
    whole = torch.full((1, 12, 8), torch.nan, device=device)
    x = whole[:, 1:10, 2:5]
    x.copy_(normal(1, 9, 3))
    expected = conv_tokens(x.clone(), (3, 3), torch.ones(3, 1, 1, device=device), None, 2)
    x[:, 1::2] = torch.nan
    assert torch.equal(conv_tokens(x, (3, 3), torch.ones(3, 1, 1, device=device), None, 2), expected)
    x.copy_(normal(1, 9, 3))
    assert pool_tokens(x, (3, 3), 2).isfinite().all()


def test_only_the_gradients_that_are_wanted_are_computed(device, monkeypatch):
    case = moved(conv_case(), device)

    def unwanted(*args, **options):
        raise AssertionError("a gradient that nobody wants")

    with monkeypatch.context() as patch:
        patch.setattr(_conv_backward_weight_kernel, "run", unwanted)
        with_gradients(conv_tokens, ("x",), **case)
    with monkeypatch.context() as patch:
        patch.setattr(_conv_backward_tokens_kernel, "run", unwanted)
        with_gradients(conv_tokens, ("weight", "bias"), **case)


def test_kernels_are_operators_that_compile_whole(device):
    check_compiled(POOL, pool_tokens, ("x",), **moved(pool_case((3, 2), batch=1), device))
    check_compiled(CONV, conv_tokens, CONV_WANTS, **moved(conv_case((3, 3), 1, batch=1), device))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pool_tokens", (normal(2, 15, 3), 3, 5, 2)),
        ("pool_tokens_backward", (normal(2, 6, 3), 3, 5, 2)),
        ("conv_tokens", (normal(2, 15, 3), 3, 5, normal(3, 2, 2), normal(3), 2)),
        ("conv_tokens_backward_tokens", (normal(2, 2, 3), 3, 5, normal(3, 2, 2), 2)),
        ("conv_tokens_backward_weight", (normal(2, 2, 3), normal(2, 15, 3), 5, 2, 2)),
    ],
)
def test_the_operators_keep_torchs_rules(device, name, arguments):
    """No argument is changed or returned, and the shapes without data are those with it, also of unknown sizes."""
    arguments = tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments)
    torch.library.opcheck(getattr(torch.ops.specvlm_kernels, name), arguments)


@pytest.mark.gpu
def test_kernels_never_wait_for_the_host():
    case = moved(conv_case((24, 24), channels=512, dtype=torch.bfloat16), "cuda")
    torch.cuda.synchronize()
    with_gradients(conv_tokens, CONV_WANTS, **case)
    x = case["x"].requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        conv_tokens(**case).backward(torch.ones(2, 121, 512, device="cuda", dtype=torch.bfloat16))
        pool_tokens(x, (24, 24), 2).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# The reference.


def formula(x, grid, stride, weight=None, bias=None):
    """Window by window, from the definitions."""
    height, width = grid
    kernel, last = (stride, 1) if weight is None else (weight.shape[-1], weight.shape[-1])
    rows = []
    for p, q in itertools.product(range(0, height - last + 1, stride), range(0, width - last + 1, stride)):
        window = list(itertools.product(range(p, min(p + kernel, height)), range(q, min(q + kernel, width))))
        values = torch.stack([x[:, y * width + x_] for y, x_ in window])
        if weight is None:
            rows.append(values.mean(0))
        else:
            taps = torch.stack([weight[:, y - p, x_ - q] for y, x_ in window])
            rows.append((values * taps[:, None]).sum(0) + (0 if bias is None else bias))
    return torch.stack(rows, 1)


@settings(max_examples=40, deadline=None)
@given(case=pools(dtypes=st.just(torch.float64)))
def test_pool_reference_gives_the_formula(case):
    torch.testing.assert_close(pool_tokens(**case), formula(**case))


@settings(max_examples=40, deadline=None)
@given(case=convs(dtypes=st.just(torch.float64)), biased=st.booleans())
def test_conv_reference_gives_the_formula(case, biased):
    case |= {} if biased else {"bias": None}
    torch.testing.assert_close(conv_tokens(**case), formula(**case))


def test_reference_gradients():
    case = conv_case((3, 4), 2, 2, channels=2, dtype=torch.float64)
    x, weight, bias = (case[name].requires_grad_() for name in CONV_WANTS)
    torch.autograd.gradcheck(lambda x: pool_tokens(x, (3, 4), 2), x)
    torch.autograd.gradcheck(lambda x, weight, bias: conv_tokens(x, (3, 4), weight, bias, 2), (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reference_sums_in_fp32(dtype):
    x = torch.full((1, 4096, 1), 1.001, dtype=dtype)
    assert torch.equal(pool_tokens(x, (64, 64), 64), x[:, :1])
    assert conv_tokens(x, (64, 64), torch.ones(1, 64, 64, dtype=dtype), None, 1).item() == 4096 * x[0, 0].item()


def test_reference_compiles_whole():
    check_compiled((), pool_tokens, ("x",), **pool_case())
    check_compiled((), conv_tokens, CONV_WANTS, **conv_case())


POOL_GOOD = {"x": torch.zeros(1, 6, 4), "grid": (2, 3), "stride": 2}
CONV_GOOD = POOL_GOOD | {"weight": torch.zeros(4, 2, 2), "bias": torch.zeros(4)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "x: expected a tensor, got list"),
        ({"x": torch.zeros(6, 4)}, r"x: expected shape \[B, T, C\], got \[6, 4\]"),
        ({"x": torch.zeros(1, 6, 4).int()}, "x: expected dtype float32 or .*, got int32"),
        ({"x": torch.zeros(1, 6, 4).to("meta")}, "x: expected a tensor on a cuda or cpu device, got meta"),
        ({"x": torch.zeros(1, 0, 4)}, r"x: expected at least one token and one channel, got shape \[1, 0, 4\]"),
        ({"x": torch.zeros(1, 6, 0)}, r"x: expected at least one token and one channel, got shape \[1, 6, 0\]"),
        ({"grid": (2, 4)}, r"grid: expected height \* width = 6, got 2 \* 4"),
        ({"grid": (6,)}, r"grid: expected a height and a width, whole numbers of at least 1, got \(6,\)"),
        ({"grid": (-2, -3)}, r"grid: expected a height and a width, whole numbers of at least 1, got \(-2, -3\)"),
        ({"grid": (2.0, 3)}, r"grid: expected a height and a width, whole numbers of at least 1, got \(2.0, 3\)"),
        ({"grid": 6}, "grid: expected a height and a width, whole numbers of at least 1, got 6"),
        ({"stride": 0}, "stride: expected a whole number from 1 to 2147483647, got 0"),
        ({"stride": 2**31}, "stride: expected a whole number from 1 to 2147483647, got 2147483648"),
        ({"stride": (2, 2)}, r"stride: expected a whole number from 1 to 2147483647, got \(2, 2\)"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        pool_tokens(**(POOL_GOOD | change))
    with pytest.raises(ValueError, match=message):
        conv_tokens(**(CONV_GOOD | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 4)}, r"weight: expected shape \[4, k, k\], got \[4, 4\]"),
        ({"weight": torch.zeros(3, 2, 2)}, r"weight: expected shape \[4, k, k\], got \[3, 2, 2\]"),
        ({"weight": torch.zeros(4, 2, 1)}, r"weight: expected a square window from 1 to 2, got \[2, 1\]"),
        ({"weight": torch.zeros(4, 3, 3)}, r"weight: expected a square window from 1 to 2, got \[3, 3\]"),
        ({"weight": torch.zeros(4, 0, 0)}, r"weight: expected a square window from 1 to 2, got \[0, 0\]"),
        ({"weight": torch.zeros(4, 2, 2).half()}, "weight: expected dtype float32, got float16"),
        ({"weight": torch.zeros(4, 2, 2).to("meta")}, "weight: expected a tensor on cpu, got meta"),
        ({"bias": torch.zeros(3)}, r"bias: expected shape \[4\], got \[3\]"),
        ({"bias": torch.zeros(4).double()}, "bias: expected dtype float32, got float64"),
        ({"bias": torch.zeros(4).to("meta")}, "bias: expected a tensor on cpu, got meta"),
    ],
)
def test_a_bad_weight_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        conv_tokens(**(CONV_GOOD | change))


def test_the_kernels_take_no_doubles(device):
    with pytest.raises(ValueError, match="x: expected dtype float32 or float16 or bfloat16, got float64"):
        pool_tokens(torch.zeros(1, 6, 4, dtype=torch.float64, device=device), (2, 3), 2)
