"""Tree policies: what every tree of theirs keeps to, and their arithmetic on trees worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specvlm.cost_aware import CostAware, Costs
from specvlm.drafts import VLMDraft
from specvlm.policies import Confidence, Eagle2, FixedShape, History, OptTree, Outcome, Sage, TreePolicy
from specvlm.tree import BUCKETS, Candidates, DraftTree, FreePlan, Growth, Plan, bucket, joined, tree_from_lists
from specvlm_kernels import reference
from tests.fakes import tiny_lm
from tests.growth import RandomDraft, grow

CPU = torch.device("cpu")
COSTS = Costs(dict.fromkeys(BUCKETS, 1.0), level=0.01)

policies = st.one_of(
    st.builds(Eagle2, st.builds(Plan, st.integers(2, 40), st.integers(1, 5), st.integers(1, 6))),
    st.builds(FixedShape, st.lists(st.integers(1, 6), min_size=1, max_size=5).map(tuple)),
    st.builds(
        Confidence,
        st.floats(0, 0.9),
        st.builds(Plan, st.integers(2, 40), st.integers(1, 5), st.integers(1, 6)),
    ),
    st.builds(Sage, st.just((1, 5)), st.just((2, 6)), st.integers(2, 40)),
    st.builds(OptTree, st.integers(2, 40), st.floats(0, 1), st.integers(1, 5), st.integers(1, 6)),
    st.builds(CostAware, st.just(COSTS), depth=st.integers(1, 5), width=st.integers(1, 6)),
)


def tree_of(policy: TreePolicy, plan: Plan, seed: int, steps: int) -> tuple[DraftTree, Candidates]:
    candidates = grow([7], plan, [RandomDraft(seed, plan.width, steps)], policy)
    return policy.select(candidates, plan), candidates


EVERY_POLICY = [
    Eagle2(Plan(16, 4, 3)),
    FixedShape((3, 2, 2)),
    Confidence(0.1, Plan(16, 4, 3)),
    Sage((2, 4), (2, 3), 16),
    OptTree(16, 0.5, 4, 3),
    CostAware(COSTS, depth=4, width=3),
]


def grow_and_select(policy: TreePolicy, scores: torch.Tensor) -> DraftTree:
    """A tree of four levels whose nodes have children of log-probabilities `scores` [B, 3], and a chain beside it."""
    batch, width = scores.shape
    plan, device = Plan(16, 4, width), scores.device
    growth = Growth(torch.zeros(batch, dtype=torch.int64, device=device), plan)
    for depth in range(plan.depth):
        rows = growth.beam().tokens.shape[1] if depth else 1
        children = scores[:, None].expand(-1, rows, -1)
        tokens = torch.arange(width, device=device).expand(batch, rows, -1)
        growth.expand(tokens, policy.admit(children, growth.parent_scores, depth + 1, plan))
    chain = torch.ones(batch, plan.depth, dtype=torch.int64, device=device), children[:, 0, :1].expand(-1, plan.depth)
    return policy.select(joined(growth.candidates(), *chain), plan)


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=lambda policy: type(policy).__name__)
def test_growing_and_choosing_read_no_value(policy, monkeypatch):
    """On a device without values, whoever looked at one would fail: nothing on the way to a tree waits for a GPU.

    Kernels know no such device; what stands for them here is their twins."""
    for op in ("select_beam", "rerank_tree"):
        monkeypatch.setattr(f"specvlm.tree.{op}", getattr(reference, op))
    scores = torch.tensor([[0.6, 0.3, 0.1]]).log()
    tree, there = grow_and_select(policy, scores), grow_and_select(policy, scores.to("meta"))
    for name in ("tokens", "parents", "depths", "scores"):
        here, far = getattr(tree, name), getattr(there, name)
        assert (far.device.type, far.shape, far.dtype) == ("meta", here.shape, here.dtype)
    assert there.max_depth == tree.max_depth


@pytest.mark.gpu
@pytest.mark.parametrize("policy", EVERY_POLICY, ids=lambda policy: type(policy).__name__)
def test_growing_and_choosing_never_wait_for_the_host(policy):
    scores = torch.tensor([[0.6, 0.3, 0.1]]).log()
    expected, on_gpu = grow_and_select(policy, scores), scores.cuda()
    grow_and_select(policy, on_gpu)  # tables of shapes are made once, and copied
    torch.cuda.set_sync_debug_mode("error")
    try:
        tree = grow_and_select(policy, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("tokens", "parents", "depths"):
        assert torch.equal(getattr(tree, name).cpu(), getattr(expected, name))


@settings(max_examples=150, deadline=None)
@given(policy=policies, seed=st.integers(0, 1000), steps=st.sampled_from([1, 2, 12]))
def test_trees_are_well_formed(policy, seed, steps):
    history = History(CPU)
    for round_ in range(3):  # later rounds are shaped by earlier ones
        plan = policy.plan(history)
        assert plan.width <= policy.widest(CPU)
        tree, candidates = tree_of(policy, plan, seed + round_, steps)
        parents, tokens = tree.parents[0].tolist(), tree.tokens[0].tolist()
        nodes = [i for i, parent in enumerate(parents) if parent >= 0]
        assert len(parents) == bucket(plan.nodes)
        assert 1 <= len(nodes) <= plan.nodes - 1
        assert all(parents[i] < i for i in nodes)
        assert all(parents[i] == 0 or parents[parents[i]] >= 0 for i in nodes), "a child without its parent"
        assert len({(parents[i], tokens[i]) for i in nodes}) == len(nodes), "a sibling twice"
        assert all(tree.scores[0, i] <= tree.scores[0, parents[i]] for i in nodes)
        assert all(tree.depths[0, i] == tree.depths[0, parents[i]] + 1 <= tree.max_depth for i in nodes)
        history.observe(SimpleNamespace(tokens=[[7] * (round_ + 1)]))
        history.record(tree, candidates.scores[0, candidates.level(1)])


def script(children: dict[tuple[int, ...], list[tuple[int, float]]], width: int):
    """A draft from a table of paths to (token, probability); what it lacks is impossible."""

    def draft(path):
        listed = [(token, math.log(p)) for token, p in children.get(path, [])]
        return [*listed, *((90 + i, -math.inf) for i in range(width - len(listed)))]

    return draft


#: 1 (0.6) -> 3 (0.9) -> 5 (0.9); 2 (0.3) -> 4 (0.5)
TABLE = {
    (): [(1, 0.6), (2, 0.3)],
    (1,): [(3, 0.9), (6, 0.05)],
    (2,): [(4, 0.5), (7, 0.4)],
    (1, 3): [(5, 0.9), (8, 0.1)],
    (2, 4): [(9, 1.0)],
}


def paths_of(tree: DraftTree) -> set[tuple[int, ...]]:
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()

    def path(node: int) -> tuple[int, ...]:
        return () if node == 0 else (*path(parents[node]), tokens[node])

    return {path(node) for node, parent in enumerate(parents) if parent >= 0}


def grown(policy: TreePolicy, plan: Plan, table=TABLE) -> set[tuple[int, ...]]:
    candidates = grow([0], plan, [script(table, plan.width)], policy)
    return paths_of(policy.select(candidates, plan))


def test_eagle2_takes_the_best_paths():
    plan = Plan(nodes=5, depth=3, width=2)
    assert grown(Eagle2(plan), plan) == {(1,), (1, 3), (1, 3, 5), (2,)}


def test_confidence_expands_what_is_above_its_threshold():
    plan = Plan(nodes=16, depth=3, width=2)
    assert grown(Confidence(0.31, plan), plan) == {(1,), (2,), (1, 3), (1, 6), (1, 3, 5), (1, 3, 8)}
    assert grown(Confidence(0.29, plan), plan) >= {(2, 4), (2, 7)}
    assert grown(Confidence(0.6001, plan), plan) == {(1,), (2,)}
    budget = Plan(nodes=4, depth=3, width=2)
    assert grown(Confidence(0.31, budget), budget) == {(1,), (1, 3), (1, 3, 5)}


def test_a_fixed_shape_has_its_nodes_on_every_level():
    policy = FixedShape((2, 1, 1))
    plan = policy.plan(History(CPU))
    assert plan == Plan(nodes=5, depth=3, width=2)
    assert grown(policy, plan) == {(1,), (2,), (1, 3), (1, 3, 5)}
    narrow = FixedShape((1, 2))
    assert grown(narrow, narrow.plan(History(CPU))) == {(1,), (1, 3), (1, 6)}


def history_with(root: list[float], taken: list[int] | None = None) -> History:
    """What a round told whose root had children of these probabilities."""
    history = History(CPU)
    scores = torch.tensor([[math.log(p) for p in root]])
    tokens = torch.arange(len(root))[None]
    candidates = Candidates(torch.tensor([0]), tokens, tokens * 0 - 1, scores, (len(root),))
    history.record(tree_from_lists([0, 1], [-1, 0], device=CPU), candidates.scores[0, candidates.level(1)])
    history.taken = taken or []
    return history


def test_sage_goes_deep_when_sure_and_wide_when_not():
    sage = Sage(depths=(3, 8), widths=(2, 10), nodes=64)
    assert sage.plan(History(CPU)) == Plan(64, depth=6, width=6), "alpha is 1/2 at first"
    assert sage.plan(history_with([0.25] * 4)) == Plan(64, depth=3, width=10)
    assert sage.plan(history_with([1.0, 1e-12, 1e-12, 1e-12])) == Plan(64, depth=8, width=2)
    # H = -(0.8 ln 0.8 + 0.2 ln 0.2) = 0.5004, alpha = 1 - 0.5004 / ln 2 = 0.278; scale is taken out
    assert sage.plan(history_with([0.4, 0.1])) == Plan(64, depth=round(3 + 0.278 * 5), width=round(2 + 0.722 * 8))


def test_sage_follows_what_was_accepted():
    sage = Sage(depths=(3, 8), widths=(2, 10), nodes=64)
    sure = [1.0, 1e-12]
    assert sage.plan(history_with(sure, [1] * 9)).depth == 8
    assert sage.plan(history_with(sure, [1] * 10)).depth == 7
    assert sage.plan(history_with(sure, [1] * 20 + [4] * 10)).depth == 7
    assert sage.plan(history_with(sure, [1] * 20 + [2, 3] * 5)).depth == 6
    assert sage.plan(history_with(sure, [0] * 100)).depth == 3
    assert sage.plan(history_with(sure, [5] * 100)).depth == 8


def test_sage_gives_sure_parents_more_children():
    plan = Plan(nodes=64, depth=4, width=4)
    children = torch.zeros(1, 2, 4)
    root = Sage().admit(children[:, :1], torch.zeros(1, 1), 1, plan)
    assert root.isfinite().sum() == 4, "4 / 1 (1/2 + 1) is more than there are"
    # depth 2: 4 / 2 (0.5 + 0.9) = 2.8 and (0.5 + 0.1) 2 = 1.2; a path of 0.02 is below 0.1 / 4
    parents = torch.tensor([[0.9, 0.1]]).log()
    assert Sage().admit(children, parents, 2, plan).isfinite().sum(dim=2).tolist() == [[3, 1]]
    assert Sage().admit(children, torch.tensor([[0.9, 0.02]]).log(), 2, plan).isfinite().sum(dim=2).tolist() == [[3, 0]]


def test_opt_tree_stops_where_the_expected_length_stops_to_rise():
    plan = Plan(nodes=16, depth=3, width=2)
    candidates = grow([0], plan, [script(TABLE, 2)])
    # level 1: 0.6 + 0.3; level 2: 0.54 + 0.03 + 0.15 + 0.12; level 3: below (1, 3) and (2, 4): 0.486 + 0.054 + 0.15
    lengths = OptTree.lengths(candidates, plan)
    torch.testing.assert_close(lengths, torch.tensor([[0.9, 1.74, 2.43]]))
    for rise, depth in ((0.6, 3), (0.7, 2), (0.85, 1), (2.0, 1)):
        policy = OptTree(nodes=16, rise=rise, most=3, width=2)
        assert max(map(len, grown(policy, plan))) == depth
    torch.testing.assert_close(OptTree.lengths(candidates, Plan(3, 3, 2)), torch.tensor([[0.9, 1.14, 1.14]]))


def test_opt_tree_grows_one_level_more_than_was_worth_it():
    policy = OptTree(nodes=16, rise=0.5, most=4, width=2)
    history = History(CPU)
    assert policy.plan(history).depth == 2
    for deepest, planned in ((1, 2), (3, 4), (4, 4)):
        tree = tree_from_lists(list(range(deepest + 1)), list(range(-1, deepest)), device=CPU)
        history.record(tree, torch.zeros(2))
        assert policy.plan(history).depth == planned


def test_the_walk_down_a_tree_is_told_by_ranks():
    # 0 -> 1 (-0.1), 2 (-0.1), 3 (0.0); 2 -> 4 (-0.5), 5 (-0.2); 5 has none
    tree = tree_from_lists([9, 1, 2, 3, 4, 5], [-1, 0, 0, 0, 2, 2], scores=[0, -0.1, -0.1, 0.0, -0.5, -0.2], device=CPU)
    no_scores = torch.zeros(2)

    def outcomes(*accepted: int) -> list[Outcome]:
        history = History(CPU)
        history.observe(SimpleNamespace(tokens=[[9]]))
        history.record(tree, no_scores)
        history.observe(SimpleNamespace(tokens=[[9, *accepted, 77]]))
        return history.outcomes()

    assert outcomes() == [Outcome(1, 3, None)]
    assert outcomes(3) == [Outcome(1, 3, 0)]
    assert outcomes(2) == [Outcome(1, 3, 2), Outcome(2, 2, None)]
    assert outcomes(2, 5) == [Outcome(1, 3, 2), Outcome(2, 2, 0)]
    assert History(CPU).outcomes() == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedShape(()), "widths: expected one number a level, got none"),
        (lambda: FixedShape((2, 0)), "widths: expected an integer from 1 to 127, got 0"),
        (lambda: FixedShape((64, 64)), "nodes: expected an integer from 1 to 128, got 129"),
        (lambda: Confidence(1.0), r"threshold: expected a number in \[0, 1\), got 1.0"),
        (lambda: Confidence(float("nan")), r"threshold: expected a number in \[0, 1\), got nan"),
        (lambda: Sage(depths=(5, 3)), "depths: expected an integer >= 5, got 3"),
        (lambda: Sage(widths=(1, 8)), "widths: expected an integer >= 2, got 1"),
        (lambda: Sage(nodes=129), "nodes: expected an integer from 1 to 128, got 129"),
        (lambda: OptTree(rise=-1.0), "rise: expected a finite number >= 0, got -1.0"),
        (lambda: OptTree(most=40, width=8), r"width: expected \(depth - 1\) \* width of at most 128, got 39 \* 8"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedShape(3), "widths: expected one number a level, got 3"),
        (lambda: Eagle2(16), "shape: expected a Plan or None, got 16"),
        (lambda: Eagle2(FreePlan(9, 8, 8)), r"shape: expected a Plan or None, got FreePlan\("),
        (lambda: Confidence(shape=(8, 5, 2)), r"shape: expected a Plan or None, got \(8, 5, 2\)"),
        (lambda: Sage(depths=5), "depths: expected the least and the most, got 5"),
        (lambda: Sage(widths=(2, 3, 4)), r"widths: expected the least and the most, got \(2, 3, 4\)"),
        (lambda: CostAware(None), "costs: expected Costs, as costs_of gives them, got None"),
        (
            lambda: VLMDraft(tiny_lm(), Plan(8, 5, 2)),
            r"policy: expected a TreePolicy, as Eagle2\(\) is one, got Plan\(",
        ),
        (lambda: VLMDraft(tiny_lm(), Eagle2), r"policy: expected a TreePolicy, as Eagle2\(\) is one, got <class"),
    ],
)
def test_settings_of_another_kind(make, message):
    with pytest.raises(TypeError, match=message):
        make()
