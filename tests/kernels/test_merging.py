"""Log-sum-exps, explicit cuts and large batches of tree attention: parts that were computed apart make up the whole."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from specvlm_kernels import reference, tree_attention
from specvlm_kernels.tree_attention import (
    TreeAttentionConfig,
    _tree_attention_kernel,
    _tree_attention_merge_kernel,
    count_arrivals,
    launch_tree_attention,
)
from tests.kernels.test_tree_attention import Case, assert_close, case_of, problems, visible
from tests.kernels.trees import parents_of
from tests.kernels.watch import launched


def lse_formula(case: Case) -> torch.Tensor:
    """log(sum(exp(score))) of each row and head over the keys that the row sees, in fp64."""
    q, k = case.q.cpu().double(), case.k.cpu().double()
    seen = visible(case.words.cpu(), case.kv_len.cpu(), k.shape[2])
    k = k.masked_fill(~seen.any(1)[:, None, :, None], 0.0).repeat_interleave(q.shape[2] // k.shape[1], 1)
    scores = torch.einsum("bqhd,bhsd->bqhs", q, k) * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen[:, :, None], -torch.inf).logsumexp(-1)


def check_lse(case: Case, device: str) -> None:
    out, lse = tree_attention(*case.to(device).args(), return_lse=True)
    assert torch.equal(out, tree_attention(*case.to(device).args()))
    assert lse.dtype == torch.promote_types(case.q.dtype, torch.float32)
    torch.testing.assert_close(lse.cpu().double(), lse_formula(case), rtol=1e-5, atol=1e-5)


def halves(case: Case, border: int) -> tuple[Case, Case]:
    """The slots before `border`, a prefix that all rows see, and those from it on."""
    words, none = case.words, torch.zeros_like(case.words)
    before = Case(case.q, case.k[:, :, :border], case.v[:, :, :border], torch.full_like(case.kv_len, border), none)
    return before, Case(case.q, case.k[:, :, border:], case.v[:, :, border:], case.kv_len - border, words)


def check_halves(case: Case, border: int, device: str) -> None:
    (a, lse_a), (b, lse_b) = (tree_attention(*half.to(device).args(), return_lse=True) for half in halves(case, border))
    weight = torch.sigmoid(lse_a - lse_b)[..., None]
    whole, lse = tree_attention(*case.to(device).args(), return_lse=True)
    torch.testing.assert_close(weight * a + (1 - weight) * b, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.logaddexp(lse_a, lse_b), lse, rtol=1e-5, atol=1e-5)


@settings(max_examples=5, deadline=None)
@given(case=problems(12, (torch.float32, torch.float16), head_dims=[32, 72]))
def test_kernel_returns_the_log_sum_exp(device, case):
    with launched(_tree_attention_kernel):
        check_lse(case, device)


@pytest.mark.gpu
@settings(max_examples=50, deadline=None)
@given(case=problems(128, (torch.float32,)))
def test_kernel_returns_the_log_sum_exp_on_a_gpu(case):
    check_lse(case, "cuda")


@settings(max_examples=30, deadline=None)
@given(case=problems(70, (torch.float64, torch.float32)))
def test_reference_returns_the_log_sum_exp(case):
    check_lse(case, "cpu")


@pytest.mark.parametrize("border", [1, 64, 150])
def test_kernel_merges_halves_into_the_whole(device, border):
    check_halves(case_of([parents_of("random", 9, 2)], [150], (2, 2), 32), border, device)


@pytest.mark.parametrize("border", [1, 64, 150])
def test_reference_merges_halves_into_the_whole(border):
    check_halves(case_of([parents_of("random", 9, 2)], [150], (2, 2), 32), border, "cpu")


@pytest.mark.parametrize("reading", [tree_attention, reference.tree_attention])
def test_a_row_that_sees_nothing_has_no_weight(reading):
    case = case_of([parents_of("star", 3, 0)], [0], (1, 2), 32)
    case.words[:, 1] = 0
    out, lse = reading(*case.args(), return_lse=True)
    assert (lse[:, 1] == -torch.inf).all()
    assert lse[:, [0, 2]].isfinite().all()
    assert not out[:, 1].any()


def test_kernel_gives_no_weight_to_a_row_that_sees_nothing(device):
    case = case_of([parents_of("star", 3, 0)], [0], (1, 2), 32, room=200)
    case.words[:, 1] = 0
    case.k[:, :, 1] = case.v[:, :, 1] = torch.nan
    _, lse = tree_attention(*case.to(device).args(), return_lse=True)
    assert (lse[:, 1] == -torch.inf).all()
    assert lse[:, [0, 2]].isfinite().all()


def test_an_empty_call_returns_empty_log_sum_exps(device):
    case = case_of([parents_of("star", 3, 0)], [5]).rows([]).to(device)
    out, lse = tree_attention(*case.args(), return_lse=True)
    assert (out.shape, lse.shape) == ((1, 0, 2, 32), (1, 0, 2))


# The last program to be done merges.

CUT = TreeAttentionConfig(split=64, block_m=16, block_n=32)


@settings(max_examples=3, deadline=None)
@given(case=problems(16, (torch.float32, torch.float16), head_dims=[32, 72]))
def test_the_last_arriver_merges_to_the_same_bits(device, case):
    args, scale = case.to(device).args(), case.q.shape[-1] ** -0.5
    config = replace(CUT, last_merges=True)
    shape = case.q.shape[:3]
    lse, other = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    arrivals = torch.zeros(count_arrivals(case.q, case.k.shape[1], config), dtype=torch.int32, device=device)
    with launched(_tree_attention_kernel):
        out = launch_tree_attention(*args, scale, config, lse=lse, arrivals=arrivals)
    assert not arrivals.any(), "counters have to be ready for the next call"
    assert_close(out, case)
    assert torch.equal(launch_tree_attention(*args, scale, CUT, lse=other), out)
    assert torch.equal(lse, other)


def test_the_last_arriver_needs_no_second_kernel(device):
    case = case_of([parents_of("random", 20, 0), parents_of("star", 20, 0)], [300, 7], (2, 3)).to(device)
    config = replace(CUT, last_merges=True)
    with pytest.raises(AssertionError, match="_tree_attention_merge_kernel"), launched(_tree_attention_merge_kernel):
        out = launch_tree_attention(*case.args(), 32**-0.5, config)
    assert_close(out, case)


@pytest.mark.gpu
def test_the_last_arriver_finds_all_partials_on_a_gpu():
    """Many programs at once: a barrier or an acquire that lacks shows as other bits in some of the runs."""
    case = case_of([parents_of("random", 64, 0)] * 4, [3000, 1, 700, 2047], (8, 1), 128, dtype=torch.float16)
    args = case.to("cuda").args()
    config = TreeAttentionConfig(split=64)
    expected = launch_tree_attention(*args, 0.1, config)
    for _ in range(200):
        assert torch.equal(launch_tree_attention(*args, 0.1, replace(config, last_merges=True)), expected)


# Batches.


def ragged(batch: int) -> Case:
    """Trees of 3 nodes behind 0 to 145 slots."""
    lengths = [(37 * i) % 146 for i in range(batch)]
    return case_of([parents_of("random", 3, i) for i in range(batch)], lengths, (1, 1), 32, dtype=torch.float16)


def test_kernel_takes_sixty_four_ragged_answers(device):
    case = ragged(64)
    with launched(_tree_attention_kernel, _tree_attention_merge_kernel):
        out = tree_attention(*case.to(device).args())
    assert_close(out, case)


def test_reference_takes_sixty_four_ragged_answers():
    case = ragged(64)
    assert_close(tree_attention(*case.args()), case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 1), (2, 4)])
def test_a_row_has_the_same_bits_in_any_company_on_a_gpu(dtype, heads):
    """From one row to 128, so through low and tall tiles alike."""
    case = case_of([parents_of("random", 128, 1)], [1500], heads, 128, dtype=dtype, room=400).to("cuda")
    together = tree_attention(*case.args())
    for count in (1, 2, 8, 15, 16, 17, 33, 64, 65, 100):
        rows = torch.randperm(128, generator=torch.Generator().manual_seed(count))[:count].sort().values.tolist()
        assert torch.equal(tree_attention(*case.rows(rows).args()), together[:, rows]), count
