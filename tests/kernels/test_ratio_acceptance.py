"""The ratio test: the kernel gives what the reference gives, and the reference emits the target's law."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from specvlm_kernels import accept, accept_ratio, filters, laws, ratio_acceptance, reference
from specvlm_kernels.reference.noise import philox_integers, race
from tests.kernels.draws import g_test, places, random_logits, seeds, to, tree_case
from tests.kernels.trees import parents_of, trees
from tests.kernels.watch import launched

INF, NAN = math.inf, math.nan
KERNELS = (laws._law_kernel, ratio_acceptance._ratio_walk_kernel)


def same(got, expected) -> bool:
    return all(torch.equal(getattr(got, x).cpu(), getattr(expected, x)) for x in ("path", "length", "next_token"))


def clear_cut(expected, logits, *args, **options) -> bool:
    """Whether the walk stays the same where every logit is a little different, as rounding might make it."""
    moved = [
        logits.float() + 1e-4 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(i)) for i in (1, 2)
    ]
    return all(same(reference.accept_ratio(x, *args, **options), expected) for x in moved)


@settings(max_examples=6, deadline=None)
@given(
    parents=trees(max_nodes=9),
    vocabulary=st.sampled_from([2, 5, 40]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    filtered=st.booleans(),
    replacement=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_kernel_walks_as_the_reference(device, parents, vocabulary, dtype, filtered, replacement, seed):
    logits, tokens, above, positions = tree_case(parents, seed, vocabulary)
    logits, draft_logits = logits.to(dtype), random_logits(*logits.shape, seed=seed + 1, dtype=dtype)
    options = {"temperature": torch.tensor([0.8, 0.0]), "seed": seeds(seed, -seed), "replacement": replacement}
    options |= {"top_k": 3, "top_p": 0.95} if filtered else {}
    case = (logits, draft_logits, tokens, above, positions)
    expected = reference.accept_ratio(*case, **options)
    assume(clear_cut(expected, *case, **options))
    args, moved = to(device, *case, **options)
    with launched(*KERNELS, *[filters._border_kernel] * filtered):
        got = accept_ratio(*args, **moved)
    assert same(got, expected)
    for name in ("path", "length", "next_token"):
        assert getattr(got, name).dtype == getattr(expected, name).dtype


def test_kernel_walks_over_all_tiles_of_a_row(device):
    vocabulary = 2 * ratio_acceptance.TILE + 77
    parents = torch.tensor([parents_of("random", 6, 1)], dtype=torch.int32)
    logits, draft_logits = random_logits(1, 6, vocabulary, seed=1), random_logits(1, 6, vocabulary, seed=2)
    case = (logits, draft_logits, draft_logits.argmax(-1).roll(1, 1), parents, places(1, 6))
    expected = reference.accept_ratio(*case, temperature=1.0, seed=seeds(2))
    assert clear_cut(expected, *case, temperature=1.0, seed=seeds(2))
    turned = [x.permute(2, 1, 0).contiguous().to(device).permute(2, 1, 0) for x in case[:2]]
    with launched(*KERNELS):
        got = accept_ratio(*turned, *(x.to(device) for x in case[2:]), temperature=1.0, seed=seeds(2).to(device))
    assert same(got, expected)


def check_greedy(device: str) -> None:
    logits, tokens, parents, positions = tree_case(parents_of("random", 12, 3), 5, 12)
    tokens[:] = torch.arange(12)  # all siblings differ
    drawn = logits.argmax(-1)
    tokens[:, 1], tokens[:, 5] = drawn[:, parents[0, 1]], drawn[:, parents[0, 5]]
    draft_logits = random_logits(2, 12, 12, seed=2)
    args, _ = to(device, logits, draft_logits, tokens, parents, positions)
    got, expected = accept_ratio(*args), reference.accept(logits, tokens, parents, positions)
    assert expected.length.min() > 0
    assert same(got, expected)
    sampled = accept_ratio(*args, temperature=torch.zeros(2, device=device), seed=seeds(1, 2).to(device))
    assert same(sampled, expected)


def test_kernel_at_temperature_0_is_accept(device):
    check_greedy(device)


def test_reference_at_temperature_0_is_accept():
    check_greedy("cpu")


def check_corners(device: str) -> None:
    """Rows that rounding or a careless draft may bring about."""
    chain = torch.tensor([[-1, 0, 0]], dtype=torch.int32)

    def walk(logits, draft_logits, tokens, **options):
        rows = [torch.tensor([[x] * 3], dtype=torch.float32) for x in (logits, draft_logits)]
        args, moved = to(device, *rows, torch.tensor([[0, *tokens]]), chain, places(1, 3), **options)
        found = accept_ratio(*args, **moved)
        return found.path[0, : int(found.length)].tolist(), found.next_token.item()

    sampled = {"temperature": 1.0, "seed": seeds(3)}
    # Nothing is left of p once a q that holds all of it is taken out: the draw is from p.
    assert walk([5.0, 0.0, 0.0], [INF, 0.0, 0.0], [1, 2]) == ([], 0)
    # A token that the target cannot draw is never taken, even where the draft could not draw it either.
    assert walk([0.0, -INF, -INF], [0.0, 0.0, -INF], [1, 2], **sampled) == ([], 0)
    # A draft without a law proposed nothing; ids outside the vocabulary are nobody's.
    assert walk([0.0, -INF, -INF], [NAN, -INF, NAN], [-1, 3], **sampled) == ([], 0)
    assert walk([0.0, -INF, -INF], [0.0, 0.0, 0.0], [2**62, -(2**63)], **sampled) == ([], 0)
    # What the draft could not draw is taken where the target can: its ratio is infinite.
    assert walk([-INF, 0.0, -INF], [0.0, -INF, -INF], [1, 0], **sampled)[0] == [1]
    # A target without a value above -inf draws token 0, as `draw` does.
    assert walk([NAN, -INF, NAN], [0.0, 0.0, 0.0], [1, 2], **sampled) == ([], 0)
    assert walk([NAN, -INF, NAN], [0.0, 0.0, 0.0], [0, 2], **sampled)[0] == [1]


def test_kernel_stands_what_is_not_finite(device):
    check_corners(device)


def test_reference_stands_what_is_not_finite():
    check_corners("cpu")


@pytest.mark.parametrize("parents", [[3, 2, 1, 99], [0, 0, 1, 2], [-9, 2**31 - 1, -(2**31), 0]], ids=str)
def test_kernel_ends_its_walk_whatever_the_values(device, parents):
    """Straight to the launcher, as on a GPU, where values are not looked at."""
    logits, above = torch.zeros(1, 4, 9, device=device), torch.tensor([parents], dtype=torch.int32, device=device)
    tokens = torch.tensor([[5, 2**62, -(2**63), 8]], device=device)
    args = (logits, logits, tokens, above, places(1, 4).to(device))
    for temperature in (1.0, NAN, -1.0, INF):
        hot = torch.tensor([temperature], device=device)
        walk = ratio_acceptance.launch_accept_ratio(*args, hot, 3, 0.9, seeds(1).to(device), False)
        assert 0 <= walk.length.item() <= 3
        assert 0 <= walk.next_token.item() < 9


# The reference: the law of the answer.


def emitted(
    batch: int, width: int, replacement: bool, options: dict
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first two tokens [batch, 2] of answers to trees of `width` children a node, and what they should follow.

    The targets' and the draft's logits hang on the last token alone. Where no replacement is asked for, the draft draws
    by the noise of stream 0 at the same seed, as `draft_topk` does.

    Returns:
        The tokens, the law [V, V], and how many nodes were accepted [batch].
    """
    vocabulary, noise = 4, torch.Generator().manual_seed(4)
    tables = random_logits(2, vocabulary + 1, vocabulary, seed=6, scale=1.5)
    target, draft, seed = tables[0], tables[1], torch.arange(batch)

    def children(last: torch.Tensor, position: int) -> torch.Tensor:
        if replacement:
            return torch.multinomial(draft[last].softmax(-1), width, replacement=True, generator=noise)
        g = race(philox_integers(torch.full((batch, 1), position + 1), seed, vocabulary))[:, 0]
        return (draft[last] + g).topk(width).indices

    root = torch.full((batch, 1), vocabulary)
    first = children(root[:, 0], 10)
    second = torch.cat([children(first[:, i], 11) for i in range(width)], dim=1)
    last = torch.cat([root, first, second], dim=1)
    parents = torch.tensor([-1] + [0] * width + [1 + i // width for i in range(width * width)], dtype=torch.int32)
    depths = torch.tensor([0] + [1] * width + [2] * width * width, dtype=torch.int32)
    above, positions = parents.expand(last.shape).contiguous(), (depths + 10).expand(last.shape).contiguous()
    tokens = last % vocabulary  # the root's token does not matter
    walk = accept_ratio(
        target[last], draft[last], tokens, above, positions, seed=seed, replacement=replacement, **options
    )
    chosen = torch.cat([tokens.gather(1, walk.path.clamp(min=0).long()), tokens[:, :1]], dim=1)
    chosen.scatter_(1, walk.length[:, None].long(), walk.next_token[:, None])
    law = reference.acceptance.law(target[None], options["temperature"], options.get("top_k", 0), 1.0)[0]
    # Where the root's children were all refused, any target goes on by its own law.
    alone = torch.multinomial(law[chosen[:, 0]], 1, generator=noise)[:, 0]
    chosen[:, 1] = torch.where(walk.length == 0, alone, chosen[:, 1])
    return chosen[:, :2], law[vocabulary][:, None] * law[:vocabulary], walk.length


@pytest.mark.parametrize(
    ("width", "replacement", "options"),
    [
        (1, False, {"temperature": 1.0}),
        (3, False, {"temperature": 1.0}),
        (3, True, {"temperature": 1.0}),
        (2, False, {"temperature": 0.7, "top_k": 3}),
    ],
)
def test_reference_emits_the_exact_law(width, replacement, options):
    tokens, law, _ = emitted(4000, width, replacement, options)
    assert g_test(tokens[:, 0] * 4 + tokens[:, 1], law.flatten()) > 1e-6


def test_reference_takes_a_lone_child_as_often_as_the_laws_agree():
    law, draft_law = torch.tensor([0.1, 0.6, 0.3]), torch.tensor([0.5, 0.3, 0.2])
    batch = 4000
    tokens = torch.multinomial(draft_law, batch, replacement=True, generator=torch.Generator().manual_seed(1))
    walk = accept_ratio(
        law.log().expand(batch, 2, 3),
        draft_law.log().expand(batch, 2, 3),
        torch.stack([tokens, tokens], dim=1),
        torch.tensor([[-1, 0]], dtype=torch.int32).repeat(batch, 1),
        places(1, 2).repeat(batch, 1),
        temperature=1.0,
        seed=torch.arange(batch),
    )
    agreed = torch.minimum(law, draft_law).sum()
    assert g_test(walk.length.long(), torch.stack([1 - agreed, agreed])) > 1e-6
    for token in (1, 2):  # p is not below q: always taken
        assert (walk.length[tokens == token] == 1).all()


def test_reference_refuses_a_token_that_comes_again():
    """Once refused, it has nothing left; and one that is taken is taken at its first place."""
    batch, nodes = 300, 4
    law, draft_law = torch.tensor([0.2, 0.8]), torch.tensor([0.9, 0.1])
    walk = accept_ratio(
        law.log().expand(batch, nodes, 2),
        draft_law.log().expand(batch, nodes, 2),
        torch.zeros(batch, nodes, dtype=torch.int64),
        torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32).repeat(batch, 1),
        places(1, nodes).repeat(batch, 1),
        temperature=1.0,
        seed=torch.arange(batch),
        replacement=True,
    )
    taken = walk.path[walk.length > 0]
    assert 0 < len(taken) < batch
    assert (taken[:, 0] == 1).all()
    assert (walk.next_token[walk.length == 0] == 1).all()


def test_reference_serves_double_and_tosses_coins_in_a_stream_of_its_own():
    logits, tokens, parents, positions = tree_case(parents_of("random", 9, 3), 5)
    case = (logits.double(), random_logits(2, 9, 5, seed=1).double(), tokens, parents, positions)
    walks = [accept_ratio(*case, temperature=1.0, seed=seeds(s, s + 1)) for s in range(40)]
    assert len({tuple(walk.next_token.tolist()) for walk in walks}) > 1
    drawn = [accept(case[0], *case[2:], temperature=1.0, seed=seeds(s, s + 1)) for s in range(40)]
    assert any(not torch.equal(a.next_token, b.next_token) for a, b in zip(walks, drawn, strict=True))


GOOD = {
    "logits": torch.zeros(1, 3, 5),
    "draft_logits": torch.zeros(1, 3, 5),
    "tokens": torch.zeros(1, 3, dtype=torch.int64),
    "parents": torch.tensor([[-1, 0, 1]], dtype=torch.int32),
    "positions": torch.zeros(1, 3, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 5)}, r"logits: expected shape \[B, N, V\], got \[3, 5\]"),
        ({"draft_logits": torch.zeros(1, 3, 4)}, r"draft_logits: expected shape \[1, 3, 5\], got \[1, 3, 4\]"),
        ({"draft_logits": torch.zeros(1, 3, 5).int()}, "draft_logits: expected dtype float32 or .*, got int32"),
        ({"tokens": torch.zeros(1, 3).int()}, "tokens: expected dtype int64, got int32"),
        ({"parents": torch.tensor([[-1, 1, 0]]).int()}, r"got parents\[0, 1\] = 1"),
        ({"temperature": 1.0}, r"seed: expected a \[1\] int64 tensor where temperature may be above 0, got None"),
        ({"replacement": 1}, "replacement: expected True or False, got 1"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        accept_ratio(**{**GOOD, **change})
