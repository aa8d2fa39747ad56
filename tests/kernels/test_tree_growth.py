"""A tree's growth, by lists: a level's best, and the best of all as a tree."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specvlm_kernels import rerank_tree, select_beam
from specvlm_kernels.tree_growth import (
    MOST_BEAM,
    MOST_LEVEL,
    _place_kernel,
    _rank_kernel,
    _select_beam_kernel,
    launch_rerank_tree,
)
from tests.kernels.tokens import moved
from tests.kernels.watch import launched

#: Few values, so that many are equal; signed zeros are one, and -inf is no node.
SCORES = st.sampled_from([0.0, -0.0, -0.5, -1.0, -1.5, -3.0, -math.inf])


def best_first(scores: list[float]) -> list[int]:
    """Indices by falling score, ties to the first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


@st.composite
def levels(draw):
    batch, rows, children = draw(st.integers(1, 2)), draw(st.integers(1, 6)), draw(st.sampled_from([1, 3, 10, 23]))
    count, words = rows * children, draw(st.integers(1, 2))
    width = draw(st.integers(1, min(count, MOST_BEAM)))
    scores = draw(st.lists(SCORES, min_size=batch * count, max_size=batch * count))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    return {
        "tokens": torch.randint(0, 2**40, (batch, count), generator=seed),
        "scores": torch.tensor(scores, dtype=torch.float32).view(batch, count),
        "ancestors": torch.randint(-(2**63), 2**63 - 1, (batch, rows, words), generator=seed),
        "width": width,
        "first_slot": draw(st.integers(0, 64 * words - width)),
    }


def listed_beam(tokens, scores, ancestors, width, first_slot):
    """[B, width] of everything, as `select_beam` has it, but sets of slots for bits."""
    children = tokens.shape[1] // ancestors.shape[1]
    found = []
    for b in range(len(tokens)):
        chosen = best_first(scores[b].tolist())[:width]
        rows = [i // children for i in chosen]
        bits = [slots_of(ancestors[b, row]) | {first_slot + i} for i, row in enumerate(rows)]
        found.append((tokens[b, chosen].tolist(), rows, chosen, scores[b, chosen].tolist(), bits))
    return [list(part) for part in zip(*found, strict=True)]


def slots_of(words: torch.Tensor) -> set[int]:
    return {64 * w + i for w, word in enumerate(words.tolist()) for i in range(64) if word >> i & 1}


def check_beam(case, device):
    *got, words = (x.cpu() for x in select_beam(**moved(case, device)))
    *expected, slots = listed_beam(**case)
    assert [x.tolist() for x in got] == expected
    assert [[slots_of(each) for each in row] for row in words] == slots
    assert [x.dtype for x in (*got, words)] == [torch.int64] * 3 + [torch.float32, torch.int64]


@settings(max_examples=30, deadline=None)
@given(case=levels())
def test_beam_kernel(device, case):
    with launched(_select_beam_kernel):
        check_beam(case, device)


@settings(max_examples=60, deadline=None)
@given(case=levels())
def test_beam_reference(case):
    check_beam(case, "cpu")


@pytest.mark.parametrize(("rows", "children", "width"), [(41, 25, 60), (64, 64, 64)])
def test_beams_of_large_levels(device, rows, children, width):
    """By programs of several warps."""
    generator = torch.Generator().manual_seed(0)
    scores = -torch.randint(0, 40, (2, rows * children), generator=generator).float()
    case = {
        "tokens": torch.arange(2 * rows * children).view(2, -1),
        "scores": scores.masked_fill(scores < -30, -torch.inf),
        "ancestors": torch.arange(2 * rows).view(2, rows, 1),
        "width": width,
        "first_slot": 0,
    }
    check_beam(case, device)


@pytest.mark.parametrize("op", [select_beam, rerank_tree])
def test_no_answers_have_no_trees(device, op):
    case = moved(levels_of(3, 4) if op is select_beam else large_forest(2, 4, 20), device)
    none = {name: x[:0] if isinstance(x, torch.Tensor) and name != "depths" else x for name, x in case.items()}
    assert all(not x.numel() and x.shape[1:] == some.shape[1:] for x, some in zip(op(**none), op(**case), strict=True))


@st.composite
def forests(draw):
    """Candidates level by level: a parent stands before its children, and they have no better score."""
    batch, sizes = draw(st.integers(1, 2)), draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    seed = draw(st.randoms(use_true_random=False))
    parents, scores = [], []
    for _ in range(batch):
        first, above, row_parents, row_scores = 0, [-1], [], []
        for size in sizes:
            for _ in range(size):
                parent = seed.choice(above)
                ceiling = 0.0 if parent < 0 else row_scores[parent]
                row_parents.append(parent)
                row_scores.append(ceiling + seed.choice([0.0, 0.0, -0.5, -1.0, -math.inf]))
            above, first = list(range(first, first + size)), first + size
        parents.append(row_parents)
        scores.append(row_scores)
    count, nodes = sum(sizes), draw(st.integers(1, 128))
    return {
        "root": torch.arange(batch) + 7,
        "tokens": torch.arange(batch * count).view(batch, count) + 100,
        "parents": torch.tensor(parents),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "depths": torch.tensor([depth for depth, size in enumerate(sizes, 1) for _ in range(size)], dtype=torch.int32),
        "nodes": nodes,
        "size": draw(st.integers(nodes, 128)),
    }


def listed_tree(root, tokens, parents, scores, depths, nodes, size):
    """Rows of (token, parent, depth, score), as `rerank_tree` has them."""
    found = []
    for b in range(len(tokens)):
        kept = sorted(best_first(scores[b].tolist())[: nodes - 1])
        place = {candidate: i for i, candidate in enumerate(kept, 1)}
        rows = [(root[b].item(), -1, 0, 0.0)]
        for i in kept:
            node = tokens[b, i].item(), place.get(parents[b, i].item(), 0), depths[i].item(), scores[b, i].item()
            rows.append(node if node[3] > -math.inf else (root[b].item(), -1, 0, -math.inf))
        found.append(rows + [(root[b].item(), -1, 0, -math.inf)] * (size - len(rows)))
    return found


def check_tree(case, device):
    got = rerank_tree(**moved(case, device))
    assert [x.dtype for x in got] == [torch.int64, torch.int32, torch.int32, torch.float32]
    rows = [list(zip(*(x[b].tolist() for x in got), strict=True)) for b in range(len(case["root"]))]
    assert rows == listed_tree(**case)


@settings(max_examples=30, deadline=None)
@given(case=forests())
def test_tree_kernels(device, case):
    with launched(_rank_kernel, _place_kernel):
        check_tree(case, device)


@settings(max_examples=60, deadline=None)
@given(case=forests())
def test_tree_reference(case):
    check_tree(case, "cpu")


def large_forest(levels=3, width=24, nodes=128):
    """More candidates than are ranked, or placed, at a time."""
    generator = torch.Generator().manual_seed(0)
    scores, parents, first, above = [], [], 0, None
    for level in range(levels):
        size = width if not level else width * width
        given_parent = -torch.rand(size, generator=generator)
        row = torch.full((size,), -1) if above is None else above.repeat_interleave(width)
        scores.append(given_parent if above is None else torch.cat(scores)[row] + given_parent)
        parents.append(row)
        above = first + scores[-1].sort(descending=True, stable=True).indices[:width]
        first += size
    sizes = [len(each) for each in scores]
    return {
        "root": torch.tensor([3]),
        "tokens": torch.arange(first)[None],
        "parents": torch.cat(parents)[None],
        "scores": torch.cat(scores)[None],
        "depths": torch.arange(1, levels + 1, dtype=torch.int32).repeat_interleave(torch.tensor(sizes)),
        "nodes": nodes,
        "size": nodes,
    }


def test_large_trees(device):
    check_tree(large_forest(), device)


def test_kernels_take_strided_tensors(device):
    tree, beam = moved(large_forest(2, 5, 20), device), moved(levels_of(3, 4), device)
    for case, op in ((tree, rerank_tree), (beam, select_beam)):
        strided = {
            name: torch.stack([x, x], -1)[..., 0] if isinstance(x, torch.Tensor) else x for name, x in case.items()
        }
        assert all(torch.equal(one, other) for one, other in zip(op(**strided), op(**case), strict=True))


def levels_of(rows, children):
    return {
        "tokens": torch.arange(rows * children)[None],
        "scores": -torch.arange(rows * children, dtype=torch.float32)[None] % 5,
        "ancestors": torch.ones(1, rows, 1, dtype=torch.int64),
        "width": 2,
        "first_slot": 3,
    }


@pytest.mark.parametrize("parent", [-(2**40), -7, 24, 2**62])
def test_tree_kernels_stay_inside_whatever_comes(device, parent):
    """Straight to the launcher, as on a GPU, where values are not looked at."""
    case = moved(large_forest(2, 4, 20), device)
    expected = launch_rerank_tree(**case)
    case["parents"] = torch.where(case["parents"] < 0, -1, torch.full_like(case["parents"], parent))
    tokens, parents, depths, scores = launch_rerank_tree(**case)
    for got, right in ((tokens, expected[0]), (depths, expected[2]), (scores, expected[3])):
        assert torch.equal(got, right)
    assert bool(((parents >= -1) & (parents < 20)).all())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": torch.zeros(12).long()}, r"tokens: expected shape \[B, C\], got \[12\]"),
        ({"tokens": torch.zeros(1, 12).int()}, "tokens: expected dtype int64, got int32"),
        ({"scores": torch.zeros(1, 11)}, r"scores: expected shape \[1, 12\], got \[1, 11\]"),
        ({"scores": torch.zeros(1, 12).double()}, "scores: expected dtype float32, got float64"),
        ({"ancestors": torch.zeros(1, 5, 1).long()}, "tokens: expected as many for each of the 5 nodes above"),
        ({"ancestors": torch.zeros(1, 0, 1).long()}, "tokens: expected as many for each of the 0 nodes above"),
        ({"width": 0}, "width: expected a whole number from 1 to 12, got 0"),
        ({"width": 13}, "width: expected a whole number from 1 to 12, got 13"),
        ({"first_slot": 63}, "first_slot: expected a whole number from 0 to 62, got 63"),
        ({"first_slot": -1}, "first_slot: expected a whole number from 0 to 62, got -1"),
        (
            {"tokens": torch.zeros(1, MOST_LEVEL + 3).long(), "scores": torch.zeros(1, MOST_LEVEL + 3)},
            f"tokens: expected .* at most {MOST_LEVEL} in all, got {MOST_LEVEL + 3}",
        ),
    ],
)
def test_select_beam_refuses(changed, message):
    if changed.get("ancestors") is None and "in all" in message:
        changed = changed | {"ancestors": torch.zeros(1, 1, 1).long()}
    with pytest.raises(ValueError, match=message):
        select_beam(**levels_of(3, 4) | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"root": torch.zeros(2).long()}, r"root: expected shape \[1\], got \[2\]"),
        ({"parents": torch.zeros(1, 20).int()}, "parents: expected dtype int64, got int32"),
        ({"parents": torch.full((1, 20), 20)}, r"parents: expected values in \[-1, 20\), got \[20, 20\]"),
        ({"scores": torch.zeros(1, 19)}, r"scores: expected shape \[1, 20\], got \[1, 19\]"),
        ({"depths": torch.zeros(1, 20).int()}, r"depths: expected shape \[20\], got \[1, 20\]"),
        ({"nodes": 0}, "nodes: expected a whole number from 1 to 128, got 0"),
        ({"nodes": 21, "size": 20}, "size: expected a whole number from 21 to 128, got 20"),
        ({"size": 129}, "size: expected a whole number from 10 to 128, got 129"),
        ({"tokens": torch.zeros(1, 0).long()}, "tokens: expected at least one candidate, got none"),
    ],
)
def test_rerank_tree_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        rerank_tree(**large_forest(2, 4, 10) | changed)
