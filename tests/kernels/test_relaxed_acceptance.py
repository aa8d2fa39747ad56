"""Typical acceptance and acceptance within a radius: what passes, which path is taken, kernel against reference."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from specvlm_kernels import accept, accept_typical, accept_within, acceptance, filters, laws, reference
from specvlm_kernels import relaxed_acceptance as relaxed
from tests.kernels.draws import places, random_logits, seeds, to, tree_case
from tests.kernels.trees import parents_of, trees
from tests.kernels.watch import launched

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
INF, NAN = math.inf, math.nan


def same(got, expected) -> bool:
    return all(torch.equal(getattr(got, x).cpu(), getattr(expected, x)) for x in ("path", "length", "next_token"))


def clear_cut(op, expected, logits, *args, **options) -> bool:
    """Whether the walk stays the same where every logit is a little different, as rounding might make it."""
    moved = [
        logits.float() + 1e-4 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(i)) for i in (1, 2)
    ]
    return all(same(op(x, *args, **options), expected) for x in moved)


@settings(max_examples=6, deadline=None)
@given(
    parents=trees(max_nodes=9),
    vocabulary=st.sampled_from([2, 5, 40]),
    dtype=DTYPES,
    bounds=st.sampled_from([(0.09, 0.3), (0.0, 0.0), (0.4, 1.0)]),
    filtered=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_typical_kernel_walks_as_the_reference(device, parents, vocabulary, dtype, bounds, filtered, seed):
    logits, *rest = tree_case(parents, seed, vocabulary)
    case = (logits.to(dtype), *rest)
    options = {"temperature": torch.tensor([0.8, 0.0]), "seed": seeds(seed, -seed)}
    options |= {"top_k": 3, "top_p": 0.95} if filtered else {}
    options |= {"epsilon": bounds[0], "delta": bounds[1]}
    expected = reference.accept_typical(*case, **options)
    assume(clear_cut(reference.accept_typical, expected, *case, **options))
    args, moved = to(device, *case, **options)
    with launched(laws._law_kernel, relaxed._typical_walk_kernel, *[filters._border_kernel] * filtered):
        got = accept_typical(*args, **moved)
    assert same(got, expected)


def test_typical_kernel_sums_over_all_tiles_of_a_row(device):
    logits = random_logits(1, 4, 2 * laws.TILE + 77, seed=1)
    with launched(laws._law_kernel):
        found = laws.launch_laws(logits.to(device), 0.7, None)
    p = (logits / 0.7).double().softmax(-1)
    certainty = (p * p.log()).sum(-1).exp()
    torch.testing.assert_close(found.certainty.cpu().double(), certainty, rtol=1e-4, atol=0)
    torch.testing.assert_close(1 / found.total.cpu().double(), p.amax(-1), rtol=1e-4, atol=0)


def check_the_formula(device: str) -> None:
    """Children at both sides of the threshold, and a path that is longer than a likelier one."""
    law = torch.tensor([0.5, 0.3, 0.15, 0.05])
    threshold = min(0.2, 0.4 * math.exp((law * law.log()).sum()))
    assert 0.15 > threshold > 0.05
    # Node 1 is likelier than 2, but only 2 has a child that passes; 4 does not pass, so 5 below it is out of reach.
    tokens, parents = [0, 0, 2, 1, 3, 0], [-1, 0, 0, 2, 0, 4]
    logits = law.log().expand(1, 6, 4)
    args, options = to(
        device, logits, torch.tensor([tokens]), torch.tensor([parents], dtype=torch.int32), places(1, 6), seed=seeds(1)
    )
    options |= {"temperature": 1.0, "epsilon": 0.2, "delta": 0.4}
    walk = accept_typical(*args, **options)
    assert walk.path[0].tolist() == [2, 3, -1, -1, -1, -1]
    drawn = acceptance.draw(args[0], args[3], temperature=1.0, seed=options["seed"])
    assert walk.next_token.item() == drawn[0, 3].item()
    # Of paths of one length the likeliest, of equals the lowest.
    tokens, parents = [0, 2, 1, 1, -1, 4], [-1, 0, 0, 0, 0, 0]
    args[1], args[2] = torch.tensor([tokens], device=device), torch.tensor([parents], dtype=torch.int32, device=device)
    assert accept_typical(*args, **options).path[0].tolist() == [2, -1, -1, -1, -1, -1]
    assert accept_typical(*args, **options | {"epsilon": 1.0, "delta": 1.0}).length.item() == 0


def test_typical_kernel_keeps_the_longest_path_that_passes(device):
    check_the_formula(device)


def test_typical_reference_keeps_the_longest_path_that_passes():
    check_the_formula("cpu")


def check_typical_is_greedy_at_0(device: str) -> None:
    logits, tokens, parents, positions = tree_case(parents_of("random", 12, 3), 5, 12)
    tokens[:] = torch.arange(12)  # all siblings differ
    tokens[:, 1], tokens[:, 5] = (logits.argmax(-1)[:, parents[0, i]] for i in (1, 5))
    args, _ = to(device, logits, tokens, parents, positions)
    expected = reference.accept(logits, tokens, parents, positions)
    assert expected.length.min() > 0
    assert same(accept_typical(*args), expected)


def test_typical_kernel_at_temperature_0_is_accept(device):
    check_typical_is_greedy_at_0(device)


def test_typical_reference_at_temperature_0_is_accept():
    check_typical_is_greedy_at_0("cpu")


def test_typical_reference_always_takes_the_likeliest():
    logits, positions = random_logits(1, 8, 60, seed=5), places(1, 8)
    tokens = logits.argmax(-1).roll(1, 1)
    parents = torch.tensor([parents_of("chain", 8, 0)], dtype=torch.int32)
    options = {"temperature": 3.0, "seed": seeds(1)}
    assert accept_typical(logits, tokens, parents, positions, **options).length.item() == 7
    assert accept(logits, tokens, parents, positions, **options).length.item() < 7


@pytest.mark.parametrize("parents", [[3, 2, 1, 99], [0, 0, 1, 2], [-9, 2**31 - 1, -(2**31), 0]], ids=str)
def test_kernels_end_their_walk_whatever_the_values(device, parents):
    """Straight to the launchers, as on a GPU, where values are not looked at."""
    logits, above = torch.zeros(1, 4, 9, device=device), torch.tensor([parents], dtype=torch.int32, device=device)
    tokens, positions = torch.tensor([[5, 2**62, -(2**63), 8]], device=device), places(1, 4).to(device)
    for temperature in (1.0, NAN, -1.0, INF):
        hot, seed = torch.tensor([temperature], device=device), seeds(1).to(device)
        keys = acceptance.launch_keys(logits, positions, hot, 0, 1.0, seed)
        for walk in (
            relaxed.launch_accept_typical(logits, tokens, above, positions, 0.0, 0.0, hot, 3, 0.9, seed),
            acceptance.launch_walk(keys, tokens, above, 2**31 - 2, (0, 9)),
        ):
            assert 0 <= walk.length.item() <= 3
            assert 0 <= walk.next_token.item() < 9


@settings(max_examples=6, deadline=None)
@given(
    parents=trees(max_nodes=16),
    seed=st.integers(0, 2**16),
    radius=st.integers(0, 30),
    ordinal=st.sampled_from([None, (7, 31)]),
)
def test_within_kernel_walks_as_the_reference(device, parents, seed, radius, ordinal):
    case = tree_case(parents, seed, 40)
    expected = reference.accept_within(*case, radius, ordinal=ordinal)
    with launched(acceptance._draw_kernel, acceptance._walk_kernel):
        got = accept_within(*(x.to(device) for x in case), radius, ordinal=ordinal)
    assert same(got, expected)


@settings(max_examples=6, deadline=None)
@given(parents=trees(max_nodes=6), seed=st.integers(0, 2**16))
def test_within_kernel_of_radius_0_is_accept(device, parents, seed):
    args, moved = to(device, *tree_case(parents, seed), temperature=torch.tensor([0.0, 1.0]), seed=seeds(1, 2))
    expected = accept(*args, **moved)
    for ordinal in (None, (1, 3)):
        got = accept_within(*args, 0, ordinal=ordinal, **moved)
        for name in ("path", "length", "next_token"):
            assert torch.equal(getattr(got, name), getattr(expected, name))


@settings(max_examples=30, deadline=None)
@given(parents=trees(max_nodes=30), seed=st.integers(0, 2**16))
def test_within_reference_of_radius_0_is_accept(parents, seed):
    case = tree_case(parents, seed)
    options = {"temperature": torch.tensor([0.0, 1.0]), "seed": seeds(1, 2)}
    assert same(accept_within(*case, 0, **options), accept(*case, **options))


def check_the_nearest(device: str) -> None:
    logits = torch.zeros(1, 6, 20)
    logits[0, 0, 10], logits[0, 3, 4] = 1.0, 1.0  # the root draws 10, node 3 draws 4, all others 0

    def walk(tokens, parents, radius, **options):
        args, _ = to(device, logits, torch.tensor([tokens]), torch.tensor([parents], dtype=torch.int32), places(1, 6))
        found = accept_within(*args, radius, **options)
        return found.path[0, : int(found.length)].tolist(), found.next_token.item()

    # The nearest child, then the lowest of equals; unused rows are nobody's.
    assert walk([0, 7, 12, 9, 11, 10], [-1, 0, 0, 0, 0, -1], 2) == ([3], 4)
    assert walk([0, 7, 12, 13, 14, 10], [-1, 0, 0, 0, 0, -1], 2) == ([2], 0)
    assert walk([0, 7, 13, 13, 14, 10], [-1, 0, 0, 0, 0, -1], 2) == ([], 10)
    # On from the node that was taken: node 3 draws 4, and 5 is near enough.
    assert walk([0, 7, 12, 9, 5, 10], [-1, 0, 0, 0, 3, 3], 2) == ([3, 4], 0)
    # Neither a draw nor a token outside the order is near anything but itself.
    assert walk([0, 9, 10, 9, 11, 10], [-1, 0, 0, 0, 0, -1], 5, ordinal=(11, 20)) == ([2], 0)
    assert walk([0, 9, 11, 9, 11, 10], [-1, 0, 0, 0, 0, -1], 5, ordinal=(11, 20)) == ([], 10)
    assert walk([0, 9, 11, 9, 11, 10], [-1, 0, 0, 0, 0, -1], 5, ordinal=(10, 20)) == ([2], 0)
    # Ids outside the vocabulary are near nothing.
    assert walk([0, -1, 20, 2**62, -(2**63), 10], [-1, 0, 0, 0, 0, -1], 2**31 - 2) == ([], 10)


def test_within_kernel_takes_the_nearest(device):
    check_the_nearest(device)


def test_within_reference_takes_the_nearest():
    check_the_nearest("cpu")


GOOD = {
    "logits": torch.zeros(1, 3, 5),
    "tokens": torch.zeros(1, 3, dtype=torch.int64),
    "parents": torch.tensor([[-1, 0, 1]], dtype=torch.int32),
    "positions": torch.zeros(1, 3, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        (accept_typical, {"logits": torch.zeros(3, 5)}, r"logits: expected shape \[B, N, V\], got \[3, 5\]"),
        (accept_typical, {"epsilon": 1.5}, "epsilon: expected a number from 0 to 1, got 1.5"),
        (accept_typical, {"epsilon": NAN}, "epsilon: expected a number from 0 to 1, got nan"),
        (accept_typical, {"delta": -0.1}, "delta: expected a number from 0 to 1, got -0.1"),
        (accept_typical, {"delta": "0.1"}, "delta: expected a number from 0 to 1, got '0.1'"),
        (accept_typical, {"temperature": 1.0}, r"seed: expected a \[1\] int64 tensor"),
        (accept_within, {"radius": -1}, "radius: expected a whole number from 0 to .*, got -1"),
        (accept_within, {"radius": 1.0}, "radius: expected a whole number from 0 to .*, got 1.0"),
        (accept_within, {"radius": 1, "ordinal": (3, 6)}, "ordinal: expected 0 <= first < end <= 5, got 3, 6"),
        (accept_within, {"radius": 1, "ordinal": (3, 3)}, "ordinal: expected 0 <= first < end <= 5, got 3, 3"),
        (accept_within, {"radius": 1, "ordinal": 3}, "ordinal: expected two whole numbers, got 3"),
        (accept_within, {"radius": 1, "tokens": torch.zeros(1, 3).int()}, "tokens: expected dtype int64, got int32"),
    ],
)
def test_a_bad_argument_is_named(op, change, message):
    with pytest.raises(ValueError, match=message):
        op(**{**GOOD, **change})


@pytest.mark.parametrize("op", [accept_typical, accept_within])
def test_what_changes_the_answer_says_so_first(op):
    assert op.__doc__.startswith("Changes the answer")
