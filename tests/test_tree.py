"""Trees: buckets, host-made trees, and EAGLE-2's growth against plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specvlm.tree import BUCKETS, Growth, Plan, bucket, rerank, root_only, tree_from_lists
from specvlm_kernels import pack_ancestors
from tests.growth import RandomDraft, grow

CPU = torch.device("cpu")


def test_buckets():
    assert [bucket(n) for n in (1, 2, 8, 9, 16, 17, 33, 65, 128)] == [1, 8, 8, 16, 16, 32, 64, 128, 128]
    for nodes in (0, 129):
        with pytest.raises(ValueError, match=f"nodes: expected 1 to 128, got {nodes}"):
            bucket(nodes)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"nodes": 0}, "nodes: expected an integer from 1 to 128, got 0"),
        ({"nodes": 129}, "nodes: expected an integer from 1 to 128, got 129"),
        ({"depth": 0}, "depth: expected an integer from 1 to 128, got 0"),
        ({"depth": 129}, "depth: expected an integer from 1 to 128, got 129"),
        ({"width": 0}, "width: expected an integer from 1 to 64, got 0"),
        ({"depth": 20, "width": 10}, r"width: expected \(depth - 1\) \* width of at most 128, got 19 \* 10"),
    ],
)
def test_plans_out_of_range(plan, message):
    with pytest.raises(ValueError, match=message):
        Plan(**{"nodes": 8, "depth": 3, "width": 2} | plan)


def test_a_tree_from_lists_is_padded_to_its_bucket():
    tree = tree_from_lists([9, 5, 6, 7], [-1, 0, 0, 2], device=CPU)
    assert tree.tokens.tolist() == [[9, 5, 6, 7, 9, 9, 9, 9]]
    assert tree.parents.tolist() == [[-1, 0, 0, 2, -1, -1, -1, -1]]
    assert tree.depths.tolist() == [[0, 1, 1, 2, 0, 0, 0, 0]]
    assert tree.scores.tolist() == [[0.0] * 4 + [-torch.inf] * 4]
    assert tree.max_depth == 2
    with pytest.raises(ValueError, match=r"parents\[2\]: expected 0 to 1, got 2"):
        tree_from_lists([9, 5, 6], [-1, 0, 2], device=CPU)


def test_the_tree_of_the_root():
    tree = root_only(torch.tensor([3, 4]))
    assert tree.tokens.tolist() == [[3], [4]]
    assert tree.parents.tolist() == [[-1], [-1]]
    assert tree.max_depth == 0


def plain_eagle2(root: int, plan: Plan, children: list) -> tuple[list[int], list[int], list[int]]:
    """EAGLE-2 on one row with lists: tokens, parents and depths of the reranked tree.

    `children[level](path)` gives the (token, log-probability) pairs below the node that `path` of tokens leads to.
    """
    nodes = []  # token, parent, depth, score, path
    beam = [(None, torch.tensor(0.0), ())]
    for level in range(plan.depth):
        grown = []
        for parent, score, path in beam:
            for token, log_p in children[level](path):
                nodes.append((token, parent, level + 1, score + torch.tensor(log_p), (*path, token)))
                grown.append(len(nodes) - 1)
        best = sorted(grown, key=lambda i: (-nodes[i][3], i))[: plan.width]
        beam = [(i, nodes[i][3], nodes[i][4]) for i in best]
    kept = sorted(sorted(range(len(nodes)), key=lambda i: (-nodes[i][3], i))[: plan.nodes - 1])
    place = {node: at for at, node in enumerate(kept, start=1)}
    tokens, parents, depths = [root], [-1], [0]
    for node in kept:
        token, parent, depth, _, _ = nodes[node]
        tokens.append(token)
        parents.append(0 if parent is None else place[parent])
        depths.append(depth)
    return tokens, parents, depths


plans = st.builds(Plan, nodes=st.integers(1, 40), depth=st.integers(1, 5), width=st.integers(1, 6))


@settings(max_examples=60, deadline=None)
@given(plan=plans, seed=st.integers(0, 1000), steps=st.sampled_from([1, 2, 12]))
def test_growth_is_eagle2s(plan, seed, steps):
    roots = [7, 11]
    drafts = [RandomDraft(seed + row, plan.width, steps) for row in range(2)]
    candidates = grow(roots, plan, drafts)
    tree = rerank(candidates, plan)
    assert tree.tokens.shape[1] == bucket(plan.nodes)
    for row, root in enumerate(roots):
        tokens, parents, depths = plain_eagle2(root, plan, [drafts[row]] * plan.depth)
        count = len(tokens)
        assert tree.tokens[row, :count].tolist() == tokens
        assert tree.parents[row, :count].tolist() == parents
        assert tree.depths[row, :count].tolist() == depths
        assert tree.parents[row, count:].eq(-1).all()
        assert tree.tokens[row, count:].eq(root).all()
        assert tree.scores[row, count:].eq(-torch.inf).all()


@settings(max_examples=60, deadline=None)
@given(plan=plans, seed=st.integers(0, 1000), steps=st.sampled_from([1, 2, 12]))
def test_trees_are_well_formed(plan, seed, steps):
    candidates = grow([7], plan, [RandomDraft(seed, plan.width, steps)])
    tree = rerank(candidates, plan)
    parents, tokens = tree.parents[0].tolist(), tree.tokens[0].tolist()
    nodes = [i for i, parent in enumerate(parents) if parent >= 0]
    assert len(nodes) <= plan.nodes - 1
    assert all(parents[i] < i for i in nodes)
    assert all(parents[i] == 0 or parents[parents[i]] >= 0 for i in nodes), "a child without its parent"
    assert len({(parents[i], tokens[i]) for i in nodes}) == len(nodes), "a sibling twice"
    assert all(tree.scores[0, i] <= tree.scores[0, parents[i]] for i in nodes)
    assert all(tree.depths[0, i] == tree.depths[0, parents[i]] + 1 for i in nodes)
    assert all(tree.depths[0, i] <= tree.max_depth for i in nodes)


def test_a_beam_sees_its_own_path_and_nothing_else():
    plan = Plan(nodes=32, depth=5, width=20)  # 80 slots: more than one word
    growth = Growth(torch.tensor([1]), plan)
    draft = RandomDraft(3, plan.width, 9)
    seen: list[list[set[int]]] = []
    paths: list[tuple[int, ...]] = [()]
    for level in range(plan.depth - 1):
        grown = [draft(path) for path in paths]
        growth.expand(
            torch.tensor([[[t for t, _ in node] for node in grown]]),
            torch.tensor([[[s for _, s in node] for node in grown]]),
        )
        beam = growth.beam()
        above = beam.parent_rows[0].tolist()
        paths = [(*paths[row], token) for row, token in zip(above, beam.tokens[0].tolist(), strict=True)]
        previous = seen[-1] if seen else [set()] * len(above)
        seen.append([previous[row] | {level * plan.width + i} for i, row in enumerate(above)])
        assert slots_of(beam.ancestors[0]) == seen[-1]


def slots_of(ancestors: Tensor) -> list[set[int]]:
    """The slots that each row of packed words names."""
    return [
        {64 * word + bit for word, value in enumerate(row) for bit in range(64) if value >> bit & 1}
        for row in ancestors.tolist()
    ]


def test_missing_children_leave_unused_rows():
    plan = Plan(nodes=8, depth=2, width=2)
    growth = Growth(torch.tensor([7]), plan)
    growth.expand(torch.tensor([[[5, 6]]]), torch.tensor([[[-0.5, -torch.inf]]]))
    growth.beam()
    growth.expand(torch.tensor([[[1, 2], [3, 4]]]), torch.tensor([[[-0.1, -torch.inf], [-0.1, -0.2]]]))
    tree = rerank(growth.candidates(), plan)
    assert tree.tokens.tolist() == [[7, 5, 7, 1, 7, 7, 7, 7]]
    assert tree.parents.tolist() == [[-1, 0, -1, 1, -1, -1, -1, -1]]
    assert slots_of(pack_ancestors(tree.parents)[0])[3] == {0, 1, 3}


def test_every_bucket_has_a_tree():
    assert all(tree_from_lists([1] * n, [-1] + [0] * (n - 1), device=CPU).tokens.shape[1] == n for n in BUCKETS)
