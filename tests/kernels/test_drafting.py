"""A draft's children are the best of its own logits under the target's noise, scored by the perturbed log-softmax."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from specvlm_kernels import acceptance, drafting, reference
from specvlm_kernels.drafting import draft_topk
from specvlm_kernels.reference.acceptance import perturbed
from tests.kernels.watch import launched

#: Backends differ in the last bits of noise: tokens are compared where the k + 1 best lie further apart than this.
GAP = 1e-4
INF, NAN = math.inf, math.nan
KERNELS = (drafting._tile_topk_kernel, drafting._row_topk_kernel)


def random_logits(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def places(batch: int, nodes: int) -> torch.Tensor:
    return torch.arange(batch * nodes, dtype=torch.int32).view(batch, nodes) + 60


def clear_cut(logits, k, positions, temperature, seed) -> bool:
    """Whether the k best and their order do not hang on rounding; equal values of equal logits do not."""
    z = perturbed(logits, positions, temperature, 0, 1.0, seed)
    best = z.topk(min(k + 1, z.shape[-1]), dim=-1).values
    gaps = best[..., :-1] - best[..., 1:]
    return bool(((gaps > GAP) | (gaps == 0) | gaps.isnan()).all())


def check_same(got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(got[0].cpu(), expected[0])
    torch.testing.assert_close(got[1].cpu(), expected[1], rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    vocabulary=st.sampled_from([1, 2, 17, 100, 333, drafting.TILE, 2 * drafting.TILE + 5]),
    k=st.sampled_from([1, 3, 8, 32]),
    nodes=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    temperature=st.sampled_from([0.0, 0.4, 1.0, 1.7]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_kernel_proposes_as_the_reference(device, vocabulary, k, nodes, dtype, temperature, seed):
    k = min(k, vocabulary)
    logits, positions = random_logits(1, nodes, vocabulary, seed=nodes, dtype=dtype), places(1, nodes)
    seed = torch.tensor([seed])
    assume(clear_cut(logits, k, positions, temperature, seed))
    expected = reference.drafting.draft_topk(logits, k, positions, temperature=temperature, seed=seed)
    with launched(*KERNELS):
        got = draft_topk(logits.to(device), k, positions.to(device), temperature=temperature, seed=seed.to(device))
    check_same(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [32000, 151936])
def test_kernel_proposes_as_the_reference_at_large_vocabularies(device, vocabulary):
    logits, positions, seed = random_logits(1, 1, vocabulary, seed=1), places(1, 1), torch.tensor([3])
    assert clear_cut(logits, 32, positions, 1.2, seed)
    expected = reference.drafting.draft_topk(logits, 32, positions, temperature=1.2, seed=seed)
    check_same(draft_topk(logits.to(device), 32, positions.to(device), temperature=1.2, seed=seed.to(device)), expected)


def test_kernel_takes_settings_by_row_exclusions_and_strides(device):
    logits, positions = random_logits(3, 2, 90, seed=3), places(3, 2)
    temperature, seed = torch.tensor([0.0, 0.8, 2.0]), torch.tensor([5, 6, 7])
    exclude = torch.cat([logits[0].argmax(-1), torch.tensor([0, 89])])
    assert clear_cut(logits, 6, positions, temperature, seed)
    expected = reference.drafting.draft_topk(logits, 6, positions, temperature=temperature, seed=seed, exclude=exclude)
    turned = logits.permute(2, 1, 0).contiguous().to(device).permute(2, 1, 0)
    spread = torch.stack([positions, positions], dim=-1).to(device)[..., 1]
    options = {"temperature": temperature.to(device), "seed": seed.to(device), "exclude": exclude.to(device)}
    with launched(*KERNELS):
        tokens, scores = draft_topk(turned, 6, spread, **options)
    check_same((tokens, scores), expected)
    assert not torch.isin(tokens.cpu(), exclude).any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_kernel_proposes_first_what_draw_draws(device, temperature):
    logits, positions = random_logits(1, 4, 200, seed=9).to(device), places(1, 4).to(device)
    seed = torch.tensor([3], device=device)
    tokens, _ = draft_topk(logits, 4, positions, temperature=temperature, seed=seed)
    drawn = acceptance.draw(logits, positions, temperature=temperature, seed=seed)
    assert torch.equal(tokens[..., 0], drawn)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 2.0])
def test_kernel_scores_bf16_as_exactly_as_torch(device, temperature):
    """At most twice the error of plain torch in the same dtype against float64, and a few roundings."""
    logits, positions, seed = random_logits(1, 2, 3000, seed=2, dtype=torch.bfloat16), places(1, 2), torch.tensor([4])
    options = {"temperature": temperature, "seed": seed}
    tokens, exact = reference.drafting.draft_topk(logits.double(), 8, positions, **options)
    plain = reference.drafting.draft_topk(logits, 8, positions, **options)[1]
    moved = {"temperature": temperature, "seed": seed.to(device)}
    got, scores = draft_topk(logits.to(device), 8, positions.to(device), **moved)
    assert clear_cut(logits, 8, positions, temperature, seed)
    assert torch.equal(got.cpu(), tokens)
    floor = 8 * torch.finfo(torch.float32).eps * (1 + exact.abs().max())
    assert (scores.cpu() - exact).abs().max() <= 2 * (plain - exact).abs().max() + floor


def check_rows_that_are_not_finite(device: str) -> None:
    rows = [[NAN, 1.0, -INF, 1.0], [INF, 0.0, INF, 5.0], [-INF, NAN, -INF, NAN], [2.0, 2.0, 2.0, 2.0]]
    tokens, scores = draft_topk(torch.tensor([rows], device=device), 3, places(1, 4).to(device))
    assert tokens[0].tolist() == [[1, 3, 0], [0, 2, 3], [0, 0, 0], [0, 1, 2]]
    half, quarter = math.log(0.5), math.log(0.25)
    expected = torch.tensor([[half, half, -INF], [half, half, -INF], [-INF] * 3, [quarter] * 3])
    torch.testing.assert_close(scores[0].cpu(), expected)


def test_kernel_orders_ties_and_fills_with_no_proposal(device):
    check_rows_that_are_not_finite(device)


def test_reference_orders_ties_and_fills_with_no_proposal():
    check_rows_that_are_not_finite("cpu")


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.8])
def test_tiles_of_nothing_but_tokens_that_cannot_be_leave_the_others_as_they_are(device, temperature):
    logits, positions, seed = random_logits(1, 2, 90, seed=4), places(1, 2), torch.tensor([5])
    assert clear_cut(logits, 12, positions, temperature, seed)
    expected = reference.draft_topk(logits, 12, positions, temperature=temperature, seed=seed)
    filled = torch.full((1, 2, 2 * drafting.TILE + 5), -INF)
    filled[..., :90] = logits
    with launched(*KERNELS):
        got = draft_topk(filled.to(device), 12, positions.to(device), temperature=temperature, seed=seed.to(device))
    check_same(got, expected)


def check_a_reduced_vocabulary(device: str, temperature: float | torch.Tensor, descending: bool) -> None:
    """It is as if the logits had been spread over the whole vocabulary."""
    whole, ids = (
        700,
        torch.randperm(700, generator=torch.Generator().manual_seed(2))[:90].sort(descending=descending)[0],
    )
    logits, positions, seed = random_logits(2, 3, 90, seed=3), places(2, 3), torch.tensor([5, -6])
    exclude = torch.cat([ids[logits[0].argmax(-1)], torch.tensor([0, 699, ids[4]])])
    spread = torch.full((2, 3, whole), -INF).index_copy(-1, ids, logits)
    assert clear_cut(spread, 6, positions, temperature, seed)
    expected = reference.draft_topk(spread, 6, positions, temperature=temperature, seed=seed, exclude=exclude)
    options = {"temperature": temperature, "seed": seed, "exclude": exclude, "vocabulary": ids}
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    got = draft_topk(logits.to(device), 6, positions.to(device), **moved)
    check_same(got, expected)
    assert torch.isin(got[0].cpu(), ids).all()


@pytest.mark.parametrize("temperature", [0.0, torch.tensor([0.7, 1.8])], ids=["greedy", "by row"])
def test_kernel_takes_a_reduced_vocabulary(device, temperature):
    with launched(*KERNELS):
        check_a_reduced_vocabulary(device, temperature, descending=False)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0, torch.tensor([0.7, 1.8])], ids=["greedy", "sampled", "by row"])
def test_reference_takes_a_reduced_vocabulary(temperature, descending):
    check_a_reduced_vocabulary("cpu", temperature, descending)


def check_ties_of_a_reduced_vocabulary(device: str) -> None:
    logits, ids = torch.tensor([[[2.0, 5.0, 5.0, -INF]]]).to(device), torch.tensor([30, 9, 4, 7]).to(device)
    tokens, scores = draft_topk(logits, 4, places(1, 1).to(device), vocabulary=ids)
    assert tokens.tolist() == [[[9, 4, 30, 0]]]
    assert scores[0, 0, 3] == -INF


def test_kernel_orders_ties_as_the_vocabulary_lists_them(device):
    check_ties_of_a_reduced_vocabulary(device)


def test_reference_orders_ties_as_the_vocabulary_lists_them():
    check_ties_of_a_reduced_vocabulary("cpu")


def check_exclusions(device: str) -> None:
    logits = torch.tensor([[[1.0, 5.0, 2.0, 4.0]]], device=device)
    tokens, scores = draft_topk(logits, 3, places(1, 1).to(device), exclude=torch.tensor([1, 0], device=device))
    assert tokens.tolist() == [[[3, 2, 0]]]
    left = torch.tensor([4.0, 2.0]).log_softmax(0)
    torch.testing.assert_close(scores.cpu(), torch.tensor([[[*left.tolist(), -INF]]]))


def test_kernel_leaves_out_what_is_excluded(device):
    check_exclusions(device)


def test_reference_leaves_out_what_is_excluded():
    check_exclusions("cpu")


def test_kernel_takes_no_nodes(device):
    empty = torch.zeros(1, 0, dtype=torch.int32, device=device)
    tokens, scores = draft_topk(torch.zeros(1, 0, 9, device=device), 2, empty)
    assert (tokens.shape, scores.shape) == ((1, 0, 2), (1, 0, 2))


def test_kernel_stays_inside_whatever_the_values(device):
    """Straight to the launcher, as on a GPU, where values are not looked at."""
    logits, positions, seed = random_logits(1, 2, 40, seed=4), places(1, 2), torch.tensor([3])
    args, seed = (logits.to(device), 6, positions.to(device)), seed.to(device)
    outside = torch.tensor([-1, 40, 2**31, -(2**63), 2**63 - 1], device=device)
    with launched(*KERNELS):
        got = drafting.launch_draft_topk(*args, 1.0, seed, outside)
        drafting.launch_draft_topk(*args, 1.0, seed, None, outside.repeat(8))
    for x, expected in zip(got, drafting.launch_draft_topk(*args, 1.0, seed, None), strict=True):
        assert torch.equal(x, expected)
    for temperature in (NAN, -1.0, INF):
        tokens, _ = drafting.launch_draft_topk(*args, torch.tensor([temperature], device=device), seed, outside)
        assert ((tokens >= 0) & (tokens < 40)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 1.2, torch.tensor([0.0, 1.2])], ids=str)
def test_kernels_never_wait_for_the_host(temperature):
    logits, positions = random_logits(2, 3, 9000, seed=1).cuda(), places(2, 3).cuda()
    seed, exclude = torch.tensor([1, 2], device="cuda"), torch.tensor([5, 7], device="cuda")
    options = {"temperature": temperature.cuda() if isinstance(temperature, torch.Tensor) else temperature}
    draft_topk(logits, 4, positions, **options, seed=seed, exclude=exclude)
    torch.cuda.set_sync_debug_mode("error")
    try:
        draft_topk(logits, 4, positions, **options, seed=seed, exclude=exclude)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_reference_scores_are_the_perturbed_log_softmax():
    logits, positions, seed = random_logits(2, 3, 40, seed=1), places(2, 3), torch.tensor([1, 2])
    for temperature in (0.0, 0.5, 1.0, 2.5):
        tokens, scores = draft_topk(logits, 40, positions, temperature=temperature, seed=seed)
        z = perturbed(logits, positions, temperature, 0, 1.0, seed)
        assert torch.equal(tokens.sort(-1).values, torch.arange(40).expand(2, 3, 40))
        torch.testing.assert_close(scores, (z * max(1, temperature)).log_softmax(-1).gather(-1, tokens))
        torch.testing.assert_close(scores.exp().sum(-1), torch.ones(2, 3))


def test_reference_serves_double():
    logits, positions = random_logits(1, 2, 30, seed=1).double(), places(1, 2)
    tokens, scores = draft_topk(logits, 5, positions, temperature=1.0, seed=torch.tensor([1]))
    assert (tokens.dtype, scores.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 5)}, r"logits: expected shape \[B, N, V\], got \[3, 5\]"),
        ({"logits": torch.zeros(1, 3, 5).long()}, "logits: expected dtype float32 or .*, got int64"),
        ({"logits": torch.zeros(1, 3, 5).to("meta")}, "logits: expected a tensor on a cuda or cpu device, got meta"),
        ({"k": 0}, "k: expected a whole number from 1 to 5, got 0"),
        ({"k": 6}, "k: expected a whole number from 1 to 5, got 6"),
        ({"k": 65, "logits": torch.zeros(1, 3, 99)}, "k: expected a whole number from 1 to 64, got 65"),
        ({"k": 2.0}, "k: expected a whole number from 1 to 5, got 2.0"),
        ({"k": "2"}, "k: expected a whole number from 1 to 5, got '2'"),
        ({"positions": torch.zeros(2, 3).int()}, r"positions: expected shape \[1, 3\], got \[2, 3\]"),
        ({"temperature": -1.0}, "temperature: expected a finite number >= 0, got -1.0"),
        ({"temperature": 0.5}, r"seed: expected a \[1\] int64 tensor where temperature may be above 0, got None"),
        ({"seed": torch.zeros(1)}, "seed: expected dtype int64, got float32"),
        ({"exclude": torch.zeros(1, 1, dtype=torch.int64)}, r"exclude: expected shape \[E\], got \[1, 1\]"),
        ({"exclude": torch.zeros(1).int()}, "exclude: expected dtype int64, got int32"),
        ({"vocabulary": torch.zeros(4, dtype=torch.int64)}, r"vocabulary: expected shape \[5\], got \[4\]"),
        ({"vocabulary": torch.zeros(5)}, "vocabulary: expected dtype int64, got float32"),
        ({"vocabulary": torch.arange(-1, 4)}, r"vocabulary: expected values in \[0, .*, got \[-1, 3\]"),
        ({"exclude": torch.tensor([5])}, r"exclude: expected values in \[0, 5\), got \[5, 5\]"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    good = {"logits": torch.zeros(1, 3, 5), "k": 2, "positions": torch.zeros(1, 3, dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        draft_topk(**{**good, **change})
