"""Draws and the walk: the kernels give what the reference gives, and the reference draws from the exact distribution.

Noise differs between backends in its last bits, and so may the weights that top-p sums: where a draw is compared across
backends, its best two differ by more than `GAP`, and it is the same for a top_p that is smaller or larger by `EDGE`.
"""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specvlm_kernels import acceptance, filters, noise, reference
from specvlm_kernels.acceptance import accept, draw
from specvlm_kernels.reference.acceptance import _filtered, perturbed
from tests.kernels.draws import g_test, places, random_logits, seeds, to, tree_case
from tests.kernels.trees import parents_of, trees
from tests.kernels.watch import launched

GAP, EDGE = 1e-4, 1e-5
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
INF, NAN = math.inf, math.nan


def clear_cut(logits, positions, *, temperature=0.0, top_k=0, top_p=1.0, seed=None) -> torch.Tensor:
    """[B, N]: rows whose draw does not hang on rounding."""
    draws, wide = [], torch.ones(logits.shape[:2], dtype=torch.bool)
    for factor in (1, 1 - EDGE, 1 + EDGE):
        p = (torch.as_tensor(top_p) * factor).clamp(max=1)
        z = perturbed(logits, positions, temperature, top_k, p, seed)
        draws.append(z.argmax(-1))
        best = z.topk(min(2, z.shape[-1]), dim=-1).values
        gap = best[..., 0] - best[..., -1]
        wide &= (gap > GAP) | (gap == 0)
    return wide & (draws[0] == draws[1]) & (draws[0] == draws[2])


# The draw: kernel against reference.


@settings(max_examples=25, deadline=None)
@given(
    vocabulary=st.sampled_from([1, 2, 17, 100, 333, acceptance.TILE, 2 * acceptance.TILE + 5]),
    nodes=st.integers(1, 3),
    dtype=DTYPES,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    position=st.sampled_from([0, 63, 2**31 - 10]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_kernel_draws_as_the_reference(device, vocabulary, nodes, dtype, temperature, position, seed):
    logits, positions = random_logits(1, nodes, vocabulary, seed=nodes, dtype=dtype), places(1, nodes, position)
    options = {"temperature": temperature, "seed": seeds(seed)}
    assume(clear_cut(logits, positions, **options).all())
    args, moved = to(device, logits, positions, **options)
    with launched(acceptance._draw_kernel, acceptance._merge_kernel):
        drawn = draw(*args, **moved)
    assert torch.equal(drawn.cpu(), reference.acceptance.draw(logits, positions, **options))


@settings(max_examples=15, deadline=None)
@given(
    vocabulary=st.sampled_from([2, 17, 100, filters.SEARCH_TILE + 3]),
    dtype=DTYPES,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 16, 50, 10**6]),
    top_p=st.sampled_from([1.0, 1e-6, 0.3, 0.9, 0.999]),
    seed=st.integers(0, 99),
)
def test_kernel_filters_as_the_reference(device, vocabulary, dtype, temperature, top_k, top_p, seed):
    logits, positions = random_logits(1, 2, vocabulary, seed=seed, dtype=dtype), places(1, 2)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seeds(seed)}
    assume(clear_cut(logits, positions, **options).all())
    args, moved = to(device, logits, positions, **options)
    kernels = [acceptance._draw_kernel] + [filters._border_kernel] * (top_k > 0 or top_p < 1)
    with launched(*kernels):
        drawn = draw(*args, **moved)
    assert torch.equal(drawn.cpu(), reference.acceptance.draw(logits, positions, **options))


def kept_by_kernel(device: str, logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """[B, N, V]: what the kernel's border leaves."""
    with launched(filters._border_kernel):
        border = filters.launch_border(logits.to(device), temperature, top_k, top_p).cpu()
    w = logits.float() / temperature
    w = torch.where(w.isnan(), -INF, w)
    bits = torch.where(w == 0, 0, w).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >= border[..., None]


@settings(max_examples=10, deadline=None)
@given(
    values=st.lists(
        st.sampled_from([-INF, -1e30, -2.0, -1e-40, -0.0, 0.0, 1e-40, 0.5, 2.0, 2.0000002, 3e38, INF, NAN]),
        min_size=1,
        max_size=12,
    ),
    top_k=st.integers(1, 12),
)
def test_kernel_keeps_exactly_the_top_k_with_ties(device, values, top_k):
    logits = torch.tensor([[values]])
    w = torch.where(logits.isnan(), -INF, logits)[0, 0]
    expected = [int((w > x).sum()) < top_k for x in w]
    assert kept_by_kernel(device, logits, 1.0, top_k, 1.0)[0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("top_k", "top_p", "longer_than"),
    [
        (60, 1.0, filters.SEARCH_TILE),
        (60, 1.0, filters.WHOLE_ROW),
        (0, 0.9, 2 * filters.SEARCH_TILE),
        (300, 0.8, filters.SEARCH_TILE),
    ],
)
def test_kernel_filters_over_all_tiles_of_a_row(device, top_k, top_p, longer_than):
    logits = random_logits(1, 1, longer_than + 77, seed=11)
    logits[..., -50:] += 6
    kept = kept_by_kernel(device, logits, 1.0, top_k, top_p)
    for factor in (1 - EDGE, 1 + EDGE):
        assert torch.equal(kept, _filtered(logits, top_k, min(top_p * factor, 1.0)) > -INF)


@pytest.mark.parametrize(("top_p", "expected"), [(0.5, [1, 0, 0, 0]), (0.51, [1, 1, 1, 0]), (0.99, [1, 1, 1, 1])])
def test_kernel_keeps_ties_and_the_token_that_crosses_top_p(device, top_p, expected):
    logits = torch.tensor([[[8.0, 3.0, 3.0, 2.0]]]).log()  # of 16: 8 | 3 3 | 2
    assert kept_by_kernel(device, logits, 1.0, 0, top_p)[0, 0].int().tolist() == expected


@pytest.mark.parametrize("logits", [[INF, 1.0, INF, NAN], [-INF, -INF], [NAN, NAN, NAN], [3e38, -3e38, 3e38]])
def test_kernel_filters_what_is_not_finite_as_the_reference(device, logits):
    logits = torch.tensor([[logits]])
    w = torch.where(logits.isnan(), -INF, logits)
    kept = kept_by_kernel(device, logits, 1.0, 3, 0.9)
    assert torch.equal(torch.where(kept, w, -INF), _filtered(w, 3, 0.9))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_top_p_looks_at_what_top_k_left(device, top_p):
    logits = torch.tensor([[[0.5, 0.3, 0.1, 0.1]]]).log()  # after top-k 2: 0.625, 0.375
    assert kept_by_kernel(device, logits, 1.0, 2, top_p)[0, 0].tolist() == [True, True, False, False]
    assert kept_by_kernel(device, logits, 1.0, 2, 0.6)[0, 0].tolist() == [True, False, False, False]


def test_settings_of_a_row_are_its_own(device):
    logits, positions = random_logits(4, 2, 150, seed=1), places(4, 2)
    options = {
        "temperature": torch.tensor([0.0, 0.7, 1.0, 1.5]),
        "top_k": torch.tensor([3, 0, 5, 40]),
        "top_p": torch.tensor([0.1, 0.8, 1.0, 0.9]),
        "seed": seeds(1, 2, 3, -4),
    }
    args, moved = to(device, logits, positions, **options)
    with launched(filters._border_kernel, acceptance._draw_kernel):
        together = draw(*args, **moved).cpu()
    assert torch.equal(together[0], logits[0].argmax(-1))
    for i in range(4):
        alone = {name: x[i].item() for name, x in options.items() if name != "seed"}
        args, moved = to(device, logits[i : i + 1], positions[i : i + 1], seed=options["seed"][i : i + 1])
        assert torch.equal(draw(*args, **alone, **moved).cpu(), together[i : i + 1])
    assert clear_cut(logits, positions, **options).all()
    assert torch.equal(together, reference.acceptance.draw(logits, positions, **options))


def test_no_sampling_row_needs_no_seed(device):
    logits, positions = random_logits(2, 1, 20, seed=1), places(2, 1)
    if device == "cuda":
        with pytest.raises(ValueError, match="seed: expected a"):  # nobody looked at the temperatures
            draw(logits.cuda(), positions.cuda(), temperature=torch.zeros(2, device="cuda"))
    else:
        assert torch.equal(draw(logits, positions, temperature=torch.zeros(2)), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_draws_the_same_alone_and_among_others(device, temperature):
    logits, positions = random_logits(1, 9, 300, seed=2).to(device), places(1, 9).to(device)
    options = {"temperature": temperature, "top_k": 30, "seed": seeds(5).to(device)}
    together = draw(logits, positions, **options)
    for i in (0, 4, 8):
        assert draw(logits[:, i : i + 1], positions[:, i : i + 1], **options) == together[0, i]


def test_strides_do_not_matter(device):
    logits, positions = random_logits(2, 3, 70, seed=3), places(2, 3)
    options = {"temperature": 0.9, "top_k": 20, "seed": seeds(5, 6).to(device)}
    expected = draw(logits.to(device), positions.to(device), **options)
    turned = logits.permute(2, 0, 1).contiguous().to(device).permute(1, 2, 0)
    cut = torch.full((2, 5, 90), INF)
    cut[:, 1:4, 10:80] = logits
    apart = torch.stack([positions, positions], dim=-1).to(device)[..., 0]
    assert torch.equal(draw(turned, apart, **options), expected)
    assert torch.equal(draw(cut.to(device)[:, 1:4, 10:80], positions.long().to(device), **options), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ties_go_to_the_lowest_id_and_nothing_draws_token_0(device, temperature):
    rows = [[1, 2, 2, 0], [NAN, -INF, NAN, -INF], [NAN, -1, NAN, -INF], [2, INF, 0, INF], [-INF] * 4]
    options = {"temperature": temperature, "seed": seeds(5).to(device)}
    logits = torch.tensor([rows], dtype=torch.float32, device=device)
    drawn = draw(logits, places(1, 5).to(device), **options)[0].tolist()
    assert drawn[1:] == [0, 1, 1, 0]
    assert drawn[0] == 1 or temperature > 0
    assert draw(torch.tensor([[[-0.0, 0.0]]], device=device), places(1, 1).to(device)).item() == 0


def test_equal_logits_draw_the_noise(device):
    logits, positions = torch.zeros(1, 2, 40, device=device), places(1, 2).to(device)
    options = {"temperature": 0.5, "seed": seeds(8).to(device)}
    expected = noise.race_noise(positions + 1, options["seed"], 40).argmax(-1)
    assert torch.equal(draw(logits, positions, **options), expected)
    assert torch.equal(draw(logits, positions, top_k=1, top_p=0.01, **options), expected)  # all tie, all stay


@pytest.mark.parametrize("vocabulary", [100, 8193, 32000, 151936])
def test_kernel_never_draws_past_the_vocabulary(device, vocabulary):
    beyond = torch.full((1, 2, vocabulary + 64), INF, device=device)
    beyond[..., :vocabulary] = -INF
    beyond[..., vocabulary - 1] = 0
    logits, positions = beyond[..., :vocabulary], places(1, 2).to(device)
    for options in ({}, {"temperature": 2.0}):
        drawn = draw(logits, positions, seed=seeds(1).to(device), **options)
        assert (drawn == vocabulary - 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [8193, 32000, 151936])
def test_kernel_draws_inside_the_filter_at_large_vocabularies(device, vocabulary):
    logits, positions = random_logits(1, 2, vocabulary, seed=4, dtype=torch.bfloat16), places(1, 2)
    options = {"temperature": 1.2, "top_k": 100, "top_p": 0.95, "seed": seeds(3)}
    args, moved = to(device, logits, positions, **options)
    drawn = draw(*args, **moved).cpu()
    kept = _filtered(logits.float() / 1.2, 100, 0.95) > -INF
    assert kept.gather(-1, drawn[..., None]).all()
    wide = clear_cut(logits, positions, **options)
    assert torch.equal(drawn[wide], reference.acceptance.draw(logits, positions, **options)[wide])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    vocabulary=st.integers(1, 300),
    dtype=DTYPES,
    temperature=st.floats(0.05, 3),
    top_k=st.integers(0, 310),
    top_p=st.floats(0.01, 1),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_kernel_filters_as_the_reference_everywhere(device, vocabulary, dtype, temperature, top_k, top_p, seed):
    logits, positions = random_logits(1, 1, vocabulary, seed=vocabulary, dtype=dtype), places(1, 1)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seeds(seed)}
    assume(clear_cut(logits, positions, **options).all())
    args, moved = to(device, logits, positions, **options)
    assert torch.equal(draw(*args, **moved).cpu(), reference.acceptance.draw(logits, positions, **options))


# The walk.


def walked(draws: list[int], tokens: list[int], parents: list[int]) -> tuple[list[int], int]:
    """The walk as the contract says it: the path, and the draw at its end."""
    node, path = 0, []
    while True:
        children = [i for i in range(1, len(tokens)) if parents[i] == node and tokens[i] == draws[node]]
        if not children:
            return path, draws[node]
        node = min(children)
        path.append(node)


@settings(max_examples=15, deadline=None)
@given(parents=trees(), seed=st.integers(0, 2**16))
def test_kernel_walks_as_the_reference(device, parents, seed):
    case = tree_case(parents, seed)
    expected = reference.acceptance.accept(*case)
    drawn = case[0].argmax(-1)
    with launched(acceptance._draw_kernel, acceptance._walk_kernel):
        accepted = accept(*(x.to(device) for x in case))
    for name in ("path", "length", "next_token"):
        got, wanted = getattr(accepted, name).cpu(), getattr(expected, name)
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
    for b in range(2):
        path, last = walked(drawn[b].tolist(), case[1][b].tolist(), case[2][b].tolist())
        assert accepted.path[b].tolist() == path + [-1] * (len(parents) - len(path))
        assert (accepted.length[b], accepted.next_token[b]) == (len(path), last)


def test_kernel_accepts_the_nodes_that_were_drawn(device):
    logits = random_logits(2, 8, 60, seed=5)
    positions = places(1, 8, 100).repeat(2, 1)
    options = {"temperature": torch.tensor([0.0, 1.0]), "top_k": 20, "top_p": 0.9, "seed": seeds(1, 2)}
    drawn = reference.acceptance.draw(logits, positions, **options)
    assert clear_cut(logits, positions, **options).all()
    tokens = torch.cat([torch.zeros(2, 1, dtype=torch.int64), drawn[:, :-1]], dim=1)
    tokens[1, 5] = 61  # no token of the vocabulary
    parents = torch.tensor([parents_of("chain", 8, 0)] * 2, dtype=torch.int32)
    args, moved = to(device, logits, tokens, parents, positions, **options)
    with launched(filters._border_kernel, acceptance._draw_kernel, acceptance._walk_kernel):
        accepted = accept(*args, **moved)
    assert accepted.path.tolist() == [[1, 2, 3, 4, 5, 6, 7, -1], [1, 2, 3, 4, -1, -1, -1, -1]]
    assert accepted.length.tolist() == [7, 4]
    assert accepted.next_token.tolist() == [drawn[0, 7], drawn[1, 4]]


def check_unused_and_equal_siblings(device: str) -> None:
    logits = torch.zeros(1, 6, 4)
    logits[0, :, 2] = 1.0  # every node draws token 2
    tokens = torch.tensor([[0, 2, 2, 2, 2, 2]])
    parents = torch.tensor([[-1, -1, 0, 0, 2, -1]], dtype=torch.int32)  # 1 and 5 are unused, 2 and 3 are siblings
    accepted = accept(*(x.to(device) for x in (logits, tokens, parents, places(1, 6))))
    assert accepted.path.tolist() == [[2, 4, -1, -1, -1, -1]]
    assert (accepted.length.item(), accepted.next_token.item()) == (2, 2)


def test_kernel_never_takes_an_unused_row_and_takes_the_first_of_equal_siblings(device):
    check_unused_and_equal_siblings(device)


def test_reference_never_takes_an_unused_row_and_takes_the_first_of_equal_siblings():
    check_unused_and_equal_siblings("cpu")


def test_kernel_takes_one_node_and_no_batch(device):
    one = accept(
        torch.tensor([[[0.0, 3.0]]], device=device),
        torch.tensor([[1]], device=device),
        torch.tensor([[-1]], dtype=torch.int32, device=device),
        places(1, 1).to(device),
    )
    assert (one.path.tolist(), one.length.tolist(), one.next_token.tolist()) == ([[-1]], [0], [1])
    nothing = torch.zeros(0, 2, dtype=torch.int64, device=device)
    none = accept(torch.zeros(0, 2, 5, device=device), nothing, nothing.int(), nothing.int())
    assert (none.path.shape, none.length.shape, none.next_token.shape) == ((0, 2), (0,), (0,))
    assert draw(torch.zeros(1, 0, 5, device=device), places(1, 0).to(device)).shape == (1, 0)


BAD_SETTINGS = [
    {"temperature": NAN, "top_k": 3, "top_p": 0.9},
    {"temperature": -1.0, "top_k": -3, "top_p": -1.0},
    {"temperature": INF, "top_k": -(2**63), "top_p": 0.5},
    {"temperature": 1.0, "top_k": -3, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 2**63 - 1, "top_p": 0.0},
    {"temperature": 1.0, "top_k": 3, "top_p": -1.0},
    {"temperature": 1.0, "top_k": 3, "top_p": NAN},
    {"temperature": 1.0, "top_k": 0, "top_p": 7.0},
]


@pytest.mark.parametrize("bad", BAD_SETTINGS, ids=str)
def test_kernels_stay_inside_whatever_the_settings(device, bad):
    """Straight to the launchers, as on a GPU, where values are not looked at."""
    (logits, positions, seed), bad = to(
        device,
        random_logits(1, 4, 9, seed=1),
        places(1, 4),
        seeds(1),
        temperature=torch.tensor([bad["temperature"]]),
        top_k=torch.tensor([bad["top_k"]]),
        top_p=torch.tensor([bad["top_p"]]),
    )
    with launched(filters._border_kernel, acceptance._draw_kernel, acceptance._merge_kernel):
        drawn = acceptance.launch_merge(acceptance.launch_keys(logits, positions, **bad, seed=seed))
    assert ((drawn >= 0) & (drawn < 9)).all()


@pytest.mark.parametrize(
    "parents", [[3, 2, 1, 99], [0, 0, 1, 2], [-1, 1, 2, 3], [-9, 2**31 - 1, -(2**31), 0], [0, 2, 1, 2]], ids=str
)
def test_kernel_ends_its_walk_whatever_the_parents(device, parents):
    logits = torch.zeros(1, 4, 9)
    logits[..., 5] = 1.0  # every node draws token 5, and is token 5
    (logits, tokens, above, positions), _ = to(
        device, logits, torch.full((1, 4), 5), torch.tensor([parents], dtype=torch.int32), places(1, 4)
    )
    with launched(acceptance._walk_kernel):
        accepted = acceptance.launch_walk(acceptance.launch_keys(logits, positions, 0.0, 0, 1.0, None), tokens, above)
    path, count = accepted.path[0].tolist(), accepted.length.item()
    assert path == sorted({i for i in path if i > 0}) + [-1] * (4 - count)
    assert accepted.next_token.item() == 5


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings_of_a_draw",
    [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
        {"temperature": torch.tensor([0.0, 0.8]), "top_k": torch.tensor([0, 50]), "top_p": torch.tensor([1.0, 0.9])},
    ],
    ids=["greedy", "numbers", "tensors"],
)
def test_kernels_never_wait_for_the_host(settings_of_a_draw):
    parents = torch.tensor([parents_of("random", 6, 0)] * 2, dtype=torch.int32)
    (logits, tokens, parents, positions), options = to(
        "cuda",
        random_logits(2, 6, 9000, seed=1),
        torch.zeros(2, 6, dtype=torch.int64),
        parents,
        places(2, 6),
        seed=seeds(1, 2),
        **settings_of_a_draw,
    )
    draw(logits, positions, **options)
    accept(logits, tokens, parents, positions, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw(logits, positions, **options)
        accept(logits, tokens, parents, positions, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# The reference: the exact distribution, the exact filter.


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"temperature": 1.0, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 30, "top_p": 0.9},
    ],
)
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_draws_come_from_the_exact_distribution(where, options):
    vocabulary, draws = 100, 20_000
    logits = random_logits(1, 1, vocabulary, seed=1, scale=1.5)
    args, moved = to(where, logits.expand(1, draws, -1), places(1, draws), seed=seeds(2024), **options)
    drawn = draw(*args, **moved).cpu()
    w = logits / options["temperature"]
    w = _filtered(w, options.get("top_k", 0), options.get("top_p", 1.0))
    assert g_test(drawn, w.double().softmax(-1)[0, 0]) > 1e-6


def test_reference_draws_are_independent_over_positions_and_over_seeds():
    logits, uniform = torch.zeros(1, 1, 4), torch.full((16,), 1 / 16)
    drawn = draw(logits.expand(1, 20_000, -1), places(1, 20_000), temperature=1.0, seed=seeds(1))[0]
    assert g_test(drawn[::2] * 4 + drawn[1::2], uniform) > 1e-6
    rows = [draw(logits, places(1, 1), temperature=1.0, seed=seeds(s)).item() for s in range(1000)]
    assert g_test(torch.tensor(rows), uniform[:4] * 4) > 1e-6


@pytest.mark.parametrize("vocabulary", [100, 8193, 32000, 151936])
def test_reference_draws_inside_the_vocabulary_and_the_filter(vocabulary):
    logits, positions = random_logits(1, 4, vocabulary, seed=6), places(1, 4)
    options = {"temperature": 1.5, "top_k": 64, "top_p": 0.97}
    drawn = draw(logits, positions, seed=seeds(1), **options)
    kept = _filtered(logits / 1.5, 64, 0.97) > -INF
    assert kept.gather(-1, drawn[..., None]).all()
    assert (
        draw(torch.zeros(1, 64, vocabulary).bfloat16(), places(1, 64), temperature=3.0, seed=seeds(1)) < vocabulary
    ).all()


def by_transformers(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """What Hugging Face's warpers leave, in the order in which `generate` applies them: [N, V] bool."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers(torch.zeros(len(logits), 1, dtype=torch.long), logits) > -INF


FILTERS = [(0.7, 50, 1.0), (1.0, 0, 0.9), (1.3, 40, 0.8), (1.0, 1, 0.5), (0.2, 0, 0.999), (2.0, 500, 0.3)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), FILTERS)
def test_reference_filters_as_transformers(temperature, top_k, top_p):
    logits = random_logits(40, 500, seed=7)
    kept = _filtered((logits / temperature)[None], top_k, top_p)[0] > -INF
    assert torch.equal(kept, by_transformers(logits, temperature, top_k, top_p))


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), FILTERS)
def test_kernel_filters_as_transformers(device, temperature, top_k, top_p):
    logits = random_logits(2, 500, seed=7)
    kept = kept_by_kernel(device, logits[None], temperature, top_k, top_p)[0]
    assert torch.equal(kept, by_transformers(logits, temperature, top_k, top_p))


def test_a_temperature_that_fp32_rounds_to_zero_is_zero():
    logits, positions = torch.randn(1, 4, 50), torch.zeros(1, 4, dtype=torch.int32)
    for temperature in (1e-60, torch.tensor([0.0])):
        assert torch.equal(draw(logits, positions, temperature=temperature, seed=torch.tensor([7])), logits.argmax(-1))


def test_reference_settings_of_a_row_are_its_own():
    logits, positions = random_logits(4, 3, 80, seed=8), places(4, 3)
    options = {
        "temperature": torch.tensor([0.0, 0.7, 1.0, 1.5]),
        "top_k": torch.tensor([3, 0, 5, 40], dtype=torch.int32),
        "top_p": torch.tensor([0.1, 0.8, 1.0, 0.9]),
    }
    seed = seeds(1, 2, 3, 4)
    together = draw(logits, positions, seed=seed, **options)
    for i in range(4):
        alone = {name: x[i].item() for name, x in options.items()}
        assert torch.equal(draw(logits[i : i + 1], positions[i : i + 1], seed=seed[i : i + 1], **alone)[0], together[i])


@settings(max_examples=30, deadline=None)
@given(parents=trees(), seed=st.integers(0, 2**16))
def test_reference_walks_as_the_contract_says(parents, seed):
    logits, tokens, above, positions = tree_case(parents, seed)
    accepted = accept(logits.double(), tokens, above, positions)
    for b in range(2):
        path, last = walked(logits[b].argmax(-1).tolist(), tokens[b].tolist(), above[b].tolist())
        assert accepted.path[b].tolist() == path + [-1] * (len(parents) - len(path))
        assert (accepted.length[b], accepted.next_token[b]) == (len(path), last)


GOOD = {
    "logits": torch.zeros(1, 3, 5),
    "tokens": torch.zeros(1, 3, dtype=torch.int64),
    "parents": torch.tensor([[-1, 0, 1]], dtype=torch.int32),
    "positions": torch.zeros(1, 3, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": [1.0]}, "logits: expected a tensor, got list"),
        ({"logits": torch.zeros(3, 5)}, r"logits: expected shape \[B, N, V\], got \[3, 5\]"),
        ({"logits": torch.zeros(1, 3, 5).int()}, "logits: expected dtype float32 or .*, got int32"),
        ({"logits": torch.zeros(1, 3, 5).to("meta")}, "logits: expected a tensor on a cuda or cpu device, got meta"),
        ({"logits": torch.zeros(1, 3, 0)}, r"logits: expected at least one token, got shape \[1, 3, 0\]"),
        ({"logits": torch.zeros(1, 0, 5), "positions": torch.zeros(1, 0).int()}, "logits: expected at least one node"),
        ({"tokens": torch.zeros(1, 2, dtype=torch.int64)}, r"tokens: expected shape \[1, 3\], got \[1, 2\]"),
        ({"tokens": torch.zeros(1, 3).int()}, "tokens: expected dtype int64, got int32"),
        ({"parents": torch.zeros(1, 3, dtype=torch.int64)}, "parents: expected dtype int32, got int64"),
        (
            {"parents": torch.tensor([[-1, 1, 0]]).int()},
            r"parents: expected parents\[b, i\] in .* got parents\[0, 1\] = 1",
        ),
        ({"parents": torch.tensor([[-1, 0, -2]]).int()}, r"got parents\[0, 2\] = -2"),
        ({"positions": torch.zeros(1, 3)}, "positions: expected dtype int32 or int64, got float32"),
        ({"positions": torch.full((1, 3), -1)}, r"positions: expected values in \[0, .*, got \[-1, -1\]"),
        ({"temperature": -1.0}, "temperature: expected a finite number >= 0, got -1.0"),
        ({"temperature": NAN}, "temperature: expected a finite number >= 0, got nan"),
        ({"temperature": INF}, "temperature: expected a finite number >= 0, got inf"),
        ({"temperature": torch.tensor([-0.5])}, "temperature: expected a finite number >= 0, got -0.5"),
        ({"temperature": torch.zeros(2)}, r"temperature: expected shape \[1\], got \[2\]"),
        ({"temperature": torch.zeros(1).double()}, "temperature: expected dtype float32, got float64"),
        ({"temperature": "hot"}, r"temperature: expected a number or a \[1\] tensor, got str"),
        ({"top_k": -1}, "top_k: expected a whole number >= 0, got -1"),
        ({"top_k": 1.5}, "top_k: expected a whole number >= 0, got 1.5"),
        ({"top_k": torch.zeros(1)}, "top_k: expected dtype int32 or int64, got float32"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p: expected a number in \(0, 1\], got 1.1"),
        ({"top_p": NAN}, r"top_p: expected a number in \(0, 1\], got nan"),
        ({"temperature": 1.0}, r"seed: expected a \[1\] int64 tensor where temperature may be above 0, got None"),
        ({"temperature": torch.ones(1)}, r"seed: expected a \[1\] int64 tensor where temperature may be above 0"),
        ({"seed": torch.zeros(1)}, "seed: expected dtype int64, got float32"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, r"seed: expected shape \[1\], got \[2\]"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        accept(**{**GOOD, **change})
    arguments = {name: x for name, x in {**GOOD, **change}.items() if name not in ("tokens", "parents")}
    if not {"tokens", "parents"} & set(change) and "node" not in message:
        with pytest.raises(ValueError, match=message):
            draw(**arguments)


def test_what_comes_back_is_frozen():
    accepted = accept(**GOOD)
    with pytest.raises(AttributeError):
        accepted.length = None
