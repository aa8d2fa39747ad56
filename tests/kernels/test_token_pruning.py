"""Pruning keeps the best tokens in their order, by scores or by a query, and sends gradients to them alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specvlm_kernels import prune_tokens, reference
from specvlm_kernels.token_pruning import (
    COPY_CHANNELS,
    GRADIENT_OTHERS,
    _gather_kernel,
    _rank_kernel,
    _scatter_kernel,
    _similarity_kernel,
    launch_prune_tokens_backward,
    launch_similarity,
)
from tests.kernels.tokens import check_compiled, far_apart, moved, normal, with_gradients
from tests.kernels.watch import launched

BY_SCORES = (_rank_kernel, _gather_kernel, _scatter_kernel)
BY_QUERY = (_similarity_kernel, *BY_SCORES)
INF, NAN = math.inf, math.nan


def case_of(tokens=37, keep=10, *, batch=2, channels=5, dtype=torch.float32, distinct=1000, seed=0):
    """Scores are whole numbers below `distinct`: few make ties."""
    scores = torch.randint(0, distinct, (batch, tokens), generator=torch.Generator().manual_seed(seed)).float()
    return {"x": normal(batch, tokens, channels, seed=seed, dtype=dtype), "scores": scores, "keep": keep}


def best(scores: list[float], keep: int) -> list[int]:
    """From the definition: by falling score, NaN as -inf, then by index."""
    order = sorted(range(len(scores)), key=lambda t: (-(-INF if math.isnan(scores[t]) else scores[t]), t))
    return sorted(order[:keep])


def check(case: dict, device: str, kernels=BY_SCORES) -> None:
    """All values are copies, so all are equal."""
    with launched(*kernels):
        out, indices, grad = with_gradients(prune_tokens, ("x",), **moved(case, device))
    assert indices.tolist() == [best(row, case["keep"]) for row in case["scores"].tolist()]
    expected = with_gradients(reference.prune_tokens, ("x",), **case)
    for got, same in zip((out, indices, grad), expected, strict=True):
        assert got.dtype == same.dtype
        assert torch.equal(got.cpu(), same)
    assert out.is_contiguous()


@st.composite
def cases(draw, tokens, dtypes):
    count = draw(st.sampled_from(tokens))
    return case_of(
        count,
        draw(st.integers(1, count)),
        batch=draw(st.integers(1, 2)),
        channels=draw(st.sampled_from([1, 7, 16])),
        dtype=draw(st.sampled_from(dtypes)),
        distinct=draw(st.sampled_from([1, 5, 1000])),
        seed=draw(st.integers(0, 99)),
    )


# The kernels.


@settings(max_examples=5, deadline=None)
@given(case=cases([1, 2, 16, 17], (torch.float32, torch.float16, torch.bfloat16)))
def test_kernels_keep_the_best_in_their_order(device, case):
    check(case, device)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(case=cases([64, 127, 128, 129, 300], (torch.float32, torch.float16, torch.bfloat16)))
def test_kernels_keep_the_best_of_more_tokens(device, case):
    check(case, device)


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(case=cases([1, 17, 576, 2880, 5000], (torch.bfloat16, torch.float16, torch.float32)))
def test_kernels_keep_the_best_on_a_gpu(case):
    check(case, "cuda")


def test_kernels_on_more_tokens_than_they_compare_at_a_time(device):
    check(case_of(150, 3, batch=1, distinct=40), device)


def test_kernels_on_more_kept_tokens_and_channels_than_a_tile(device):
    x, order = normal(1, 20, 3).to(device), torch.arange(19, -1, -1, dtype=torch.int32, device=device).view(1, -1)
    out, indices = torch.full_like(x, NAN), torch.full((1, 20), -1, device=device)
    _gather_kernel[(40,)](x, order, out, indices, 20, 3, *x.stride(), BLOCK_K=8, BLOCK_C=2)
    assert torch.equal(out, x)
    assert indices[0].tolist() == list(range(20))
    check(case_of(3, 2, batch=1, channels=COPY_CHANNELS + 3), device)
    kept = torch.arange(GRADIENT_OTHERS + 5, device=device).view(1, -1)
    grad = normal(1, GRADIENT_OTHERS + 5, 2).to(device)
    assert torch.equal(launch_prune_tokens_backward(grad, kept, GRADIENT_OTHERS + 5), grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lower_index_and_nan_counts_as_the_least(device, dtype):
    rows = [[1, NAN, 3, 1, 1, -INF], [NAN, -INF, NAN, -INF, NAN, NAN], [INF, NAN, INF, INF, 0, -0.0]]
    scores = torch.tensor(rows, dtype=dtype)
    for keep in (1, 2, 4):
        case = {"x": normal(3, 6, 2), "scores": scores, "keep": keep}
        for where in (device, "cpu"):
            _, indices = prune_tokens(**moved(case, where))
            assert indices.tolist() == [best(row, keep) for row in rows]
    with launched(_rank_kernel, _gather_kernel):
        _, indices = prune_tokens(**moved(case, device) | {"keep": 3})
    assert indices.tolist() == [[0, 2, 3], [0, 1, 2], [0, 2, 3]]


def test_kernel_scores_by_a_query(device):
    """By whole numbers, whose products are exact in any order."""
    x = torch.randint(-4, 5, (2, 21, 35), generator=torch.Generator().manual_seed(1))
    query = torch.randint(-4, 5, (2, 35), generator=torch.Generator().manual_seed(2))
    scores = torch.einsum("btc,bc->bt", x, query)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        case = {"x": x.to(dtype), "scores": None, "keep": 6, "query": query.to(dtype)}
        with launched(*BY_QUERY):
            got = with_gradients(prune_tokens, ("x",), **moved(case, device))
        assert got[1].tolist() == [best(row, 6) for row in scores.tolist()]
        for one, same in zip(got, with_gradients(reference.prune_tokens, ("x",), **case), strict=True):
            assert torch.equal(one.cpu(), same)


def test_kernel_scores_more_channels_than_a_tile(device):
    x, query = normal(1, 5, 2100).to(device), normal(1, 2100, seed=1).to(device)
    with launched(_similarity_kernel):
        scores = launch_similarity(x, query)
    exact = torch.einsum("btc,bc->bt", x.double(), query.double())
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_kernel_scores_five_pictures_of_llava():
    x = normal(1, 2880, 4096, dtype=torch.bfloat16).cuda()
    query = normal(1, 4096, seed=1, dtype=torch.bfloat16).cuda()
    exact = torch.einsum("btc,bc->bt", x.double(), query.double())
    scores = launch_similarity(x, query)
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-2)
    _, indices = prune_tokens(x, None, 144, query=query)
    border = exact.topk(145).values[0, -2:].mean()
    sure = (exact[0] > border + 0.1).nonzero()[:, 0]
    assert torch.isin(sure, indices[0]).all()
    assert (exact[0, indices[0]] > border - 0.1).all()


def test_kernels_take_any_strides(device):
    case = moved(case_of(12, 5), device)
    x, scores = case["x"], case["scores"]
    turned = torch.empty(5, 12, 2, device=device).permute(2, 1, 0).copy_(x)
    spread = torch.empty(4, 24, 9, device=device)[1::2, 1::2, 2:7].copy_(x)
    across = torch.empty(12, 4, device=device).t()[::2].copy_(scores)
    query = torch.empty(5, 2, device=device).t().copy_(x[:, 3])
    for view in (turned, spread):
        for options in ({"scores": across}, {"scores": None, "query": query}):
            dense = {name: one if one is None else one.contiguous() for name, one in options.items()}
            got = with_gradients(prune_tokens, ("x",), x=view, keep=5, **options)
            for one, same in zip(got, with_gradients(prune_tokens, ("x",), x=x, keep=5, **dense), strict=True):
                assert torch.equal(one, same)
        indices = torch.tensor([[0, 2, 5, 6, 7, 9, 11, 13, 14, 15, 18, 19]] * 2, device=device)
        assert torch.equal(
            launch_prune_tokens_backward(view, indices, 20), launch_prune_tokens_backward(x, indices, 20)
        )


def test_kernels_address_by_64_bits(device):
    x, scores = normal(1, 3, 4, dtype=torch.float16).to(device), torch.tensor([[1.0, 0.0, 2.0]], device=device)
    far = far_apart(x)
    assert torch.equal(prune_tokens(far, scores, 2)[0], x[:, [0, 2]])
    assert torch.equal(launch_similarity(far, x[:, 0]), launch_similarity(x, x[:, 0]))
    indices = torch.tensor([[1, 3, 4]], device=device)
    assert torch.equal(launch_prune_tokens_backward(far, indices, 5)[:, [1, 3, 4]], x)


def test_kernels_on_one_token_and_an_empty_batch(device):
    check(case_of(1, 1), device)
    out, indices, grad = with_gradients(prune_tokens, ("x",), **moved(case_of(4, 2, batch=0), device))
    assert (out.shape, indices.shape, grad.shape) == ((0, 2, 5), (0, 2), (0, 4, 5))


def test_the_selection_has_no_gradient(device):
    x, scores, query = (tensor.to(device).requires_grad_() for tensor in (normal(1, 5, 3), normal(1, 5), normal(1, 3)))
    for options in ({"scores": scores}, {"scores": None, "query": query}):
        out, indices = prune_tokens(x, keep=2, **options)
        assert not indices.requires_grad
        out.sum().backward()
    assert scores.grad is None
    assert query.grad is None


def test_gradient_stays_inside_whatever_the_indices(device):
    """Straight to the launcher, as on a GPU, where values are not looked at."""
    rows = normal(1, 4, 2).to(device)
    for indices, sources in (
        ([-(2**31), -1, 4, 2**31 - 1], [None] * 4),
        ([3, 3, 0, 3], [0, None, None, 1]),
    ):
        with launched(_scatter_kernel):
            grad = launch_prune_tokens_backward(rows, torch.tensor([indices], device=device), 4)
        for row, source in zip(grad[0], sources, strict=True):
            assert torch.equal(row, torch.zeros_like(row) if source is None else rows[0, source])


def test_kernels_are_operators_that_compile_whole(device):
    by_query = {"scores": None, "query": normal(1, 5, seed=1)}
    check_compiled(BY_QUERY, prune_tokens, ("x",), **moved(case_of(5, 2, batch=1) | by_query, device))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("prune_tokens", (normal(2, 5, 3), normal(2, 5, seed=1), None, 2)),
        ("prune_tokens", (normal(2, 5, 3), None, normal(2, 3, seed=1), 2)),
        ("prune_tokens_backward", (normal(2, 2, 3), torch.tensor([[0, 3], [1, 4]]), 5)),
    ],
)
def test_the_operators_keep_torchs_rules(device, name, arguments):
    """No argument is changed or returned, and the shapes without data are those with it, also of unknown sizes."""
    arguments = tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments)
    torch.library.opcheck(getattr(torch.ops.specvlm_kernels, name), arguments)


@pytest.mark.gpu
def test_kernels_never_wait_for_the_host():
    case = moved(case_of(576, 100, channels=512, dtype=torch.bfloat16), "cuda")
    query = normal(2, 512, dtype=torch.bfloat16).cuda()
    x = case["x"].requires_grad_()
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            prune_tokens(**case)[0].sum().backward()
            prune_tokens(x, None, 100, query=query)[0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# The reference.


@settings(max_examples=40, deadline=None)
@given(case=cases([1, 2, 33, 200], (torch.float32, torch.bfloat16, torch.float64)))
def test_reference_keeps_the_best_in_their_order(case):
    out, indices = prune_tokens(**case)
    assert indices.tolist() == [best(row, case["keep"]) for row in case["scores"].tolist()]
    for row, kept, picked in zip(case["x"], out, indices, strict=True):
        assert torch.equal(kept, row[picked])


def test_reference_scores_by_a_query():
    x, query = normal(2, 30, 8), normal(2, 8, seed=1)
    scores = torch.stack([tokens @ one for tokens, one in zip(x, query, strict=True)])
    for got, same in zip(prune_tokens(x, None, 7, query=query), prune_tokens(x, scores, 7), strict=True):
        assert torch.equal(got, same)


def test_reference_gradients():
    scores, query = normal(2, 6, seed=1), normal(2, 3, seed=2, dtype=torch.float64)
    x = normal(2, 6, 3, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda x: prune_tokens(x, scores, 2)[0], x)
    torch.autograd.gradcheck(lambda x: prune_tokens(x, None, 2, query=query)[0], x)


def test_reference_compiles_whole():
    check_compiled((), prune_tokens, ("x",), **case_of())
    check_compiled((), prune_tokens, ("x",), **case_of() | {"scores": None, "query": normal(2, 5, seed=1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x: expected a tensor, got NoneType"),
        ({"x": torch.zeros(6, 4)}, r"x: expected shape \[B, T, C\], got \[6, 4\]"),
        ({"x": torch.zeros(1, 0, 4)}, r"x: expected at least one token and one channel, got shape \[1, 0, 4\]"),
        ({"x": torch.zeros(1, 6, 4).to("meta")}, "x: expected a tensor on a cuda or cpu device, got meta"),
        ({"scores": torch.zeros(1, 5)}, r"scores: expected shape \[1, 6\], got \[1, 5\]"),
        ({"scores": torch.zeros(1, 6).long()}, "scores: expected dtype float32 or .*, got int64"),
        ({"scores": torch.zeros(1, 6).to("meta")}, "scores: expected a tensor on cpu, got meta"),
        ({"scores": None}, "scores: expected scores or a query, got neither"),
        ({"query": torch.zeros(1, 4)}, "scores: expected scores or a query, got both"),
        ({"scores": None, "query": torch.zeros(4)}, r"query: expected shape \[1, 4\], got \[4\]"),
        ({"scores": None, "query": torch.zeros(1, 4).half()}, "query: expected dtype float32, got float16"),
        ({"scores": None, "query": torch.zeros(1, 4).to("meta")}, "query: expected a tensor on cpu, got meta"),
        ({"keep": 0}, "keep: expected a whole number from 1 to 6, got 0"),
        ({"keep": 7}, "keep: expected a whole number from 1 to 6, got 7"),
        ({"keep": 0.5}, "keep: expected a whole number from 1 to 6, got 0.5"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    good = {"x": torch.zeros(1, 6, 4), "scores": torch.zeros(1, 6), "keep": 2}
    with pytest.raises(ValueError, match=message):
        prune_tokens(**(good | change))


def test_the_kernels_take_no_doubles(device):
    x, scores = torch.zeros(1, 6, 4, device=device), torch.zeros(1, 6, device=device)
    with pytest.raises(ValueError, match="x: expected dtype float32 or float16 or bfloat16, got float64"):
        prune_tokens(x.double(), scores, 2)
    with pytest.raises(ValueError, match="scores: expected dtype float32 or float16 or bfloat16, got float64"):
        prune_tokens(x, scores.double(), 2)
