"""A block draft's trees: against a heap, best first, and under any policy."""

import heapq
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specvlm import SpecVLM
from specvlm.drafts.block import BestFirst, BlockSession
from specvlm.policies import Eagle2, FixedShape, TreePolicy
from specvlm.state import Limits, Sampling
from specvlm.tree import BUCKETS, DraftTree, Plan
from specvlm_kernels import draft_topk
from tests.drafts.test_block import random_draft
from tests.fakes import IMAGE_TOKEN, VOCAB, prompt_for, tiny_llava


@pytest.fixture(scope="module")
def specvlm() -> SpecVLM:
    return SpecVLM(tiny_llava())


Path = tuple[tuple[int, ...], float]


def best_paths(tokens: Tensor, scores: Tensor, most: int) -> list[Path]:
    """The `most` likeliest paths through slots with `tokens` and log-probabilities `scores` [D, k], by a heap."""
    found: list[Path] = []
    heap: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    while heap and len(found) <= most:
        negative, path = heapq.heappop(heap)
        found.append((path, -negative))
        if len(path) < len(scores):
            for token, score in zip(tokens[len(path)].tolist(), scores[len(path)], strict=True):
                if score > -torch.inf:
                    heapq.heappush(heap, (-float(torch.tensor(-negative) + score), (*path, token)))
    return found[1:]


def paths_of(tree: DraftTree) -> list[Path]:
    """The tree's nodes, the root left out, each by the tokens that lead to it."""
    found: list[Path] = []
    paths: dict[int, tuple[int, ...]] = {0: ()}
    rows = zip(tree.tokens[0].tolist(), tree.parents[0].tolist(), tree.scores[0].tolist(), strict=True)
    for node, (token, parent, score) in enumerate(rows):
        if parent >= 0:
            paths[node] = (*paths[parent], token)
            found.append((paths[node], score))
    return sorted(found, key=lambda path: -path[1])


@pytest.fixture(scope="module")
def propose(specvlm) -> Callable[[TreePolicy, float, Tensor], DraftTree]:
    """A tree that a policy makes at a temperature, of the logits [block_size - 1, V] that a draft is told to have."""
    drafts = {size: random_draft(specvlm, block_size=size, num_hidden_layers=1) for size in range(2, 10)}
    sampling = Sampling(0.0, 0, 1.0, torch.tensor([5]))
    taps = drafts[2].taps
    with torch.no_grad():
        state, prompt = specvlm.target.prefill(
            prompt_for(specvlm.target.model), sampling=sampling, limits=Limits(9), taps=taps
        )
    state.first()

    @torch.no_grad()
    def made(policy: TreePolicy, temperature: float, logits: Tensor) -> DraftTree:
        draft = drafts[len(logits) + 1]
        draft.policy = policy
        draft.logits = lambda hidden: logits[None, : hidden.shape[1]]
        state.sampling = replace(sampling, temperature=temperature)
        return draft.start(prompt, state).propose(state)

    made.kv_len = int(state.kv_len)
    return made


@settings(max_examples=80, deadline=None)
@given(
    nodes=st.integers(2, 24) | st.just(65),
    size=st.integers(2, 9),
    sharpness=st.sampled_from([0.01, 1.0, 4.0]),
    steps=st.sampled_from([0, 2]),
    temperature=st.sampled_from([0.0, 1.0, 1.5]),
    seed=st.integers(0, 10_000),
    eagle=st.booleans(),
)
def test_trees_are_those_of_a_heap_best_first(propose, nodes, size, sharpness, steps, temperature, seed, eagle):
    """And so are EAGLE-2's whose levels are as wide as the tree has nodes."""
    logits = sharpness * torch.randn(size - 1, VOCAB, generator=torch.Generator().manual_seed(seed))
    if steps:  # from a coarse grid, so that many tie
        logits = (steps * logits).round() / steps
    eagle = eagle and (size - 2) * (nodes - 1) <= BUCKETS[-1]
    tree = propose(Eagle2(Plan(nodes, size - 1, nodes - 1)) if eagle else BestFirst(nodes), temperature, logits)
    positions = propose.kv_len + torch.arange(size - 1)[None]
    tokens, scores = draft_topk(
        logits[None],
        min(nodes, 64),
        positions,
        temperature=temperature,
        seed=torch.tensor([5]),
        exclude=torch.tensor([IMAGE_TOKEN]),
    )
    expected, found = best_paths(tokens[0], scores[0], nodes - 1), paths_of(tree)
    assert [score for _, score in found] == [score for _, score in expected]
    assert len({path for path, _ in found}) == len(found)
    if temperature or not steps:  # nothing ties
        assert {path for path, _ in found} == {path for path, _ in expected}
    assert max(len(path) for path, _ in found) <= size - 1
    assert tree.max_depth <= size - 1


def test_every_node_of_a_depth_has_the_same_candidates(propose):
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2))
    tree = propose(FixedShape((3, 9, 9)), 1.0, logits)
    children: dict[tuple[int, ...], set[int]] = {}
    for path, _ in paths_of(tree):
        children.setdefault(path[:-1], set()).add(path[-1])
    second = [tokens for path, tokens in children.items() if len(path) == 1]
    assert len(second) >= 2
    assert all(a <= b or b <= a for a in second for b in second)


def test_image_tokens_are_never_proposed(propose):
    logits = torch.zeros(4, VOCAB)
    logits[:, IMAGE_TOKEN] = 1e4
    for temperature in (0.0, 1.0):
        assert (propose(BestFirst(30), temperature, logits).tokens != IMAGE_TOKEN).all()


@pytest.mark.parametrize(
    "policy", [BestFirst(), BestFirst(65), Eagle2(Plan(40, 30, 3)), FixedShape((2, 2, 2, 2, 2, 2, 2))], ids=str
)
def test_any_policys_tree_ends_where_the_block_does(specvlm, policy, monkeypatch):
    """One forward a round, and the answer stays what it is."""
    trees: list[DraftTree] = []
    forwards: list[Tensor] = []
    inner = BlockSession.propose
    monkeypatch.setattr(BlockSession, "propose", lambda *args: trees.append(inner(*args)) or trees[-1])
    prompt = prompt_for(specvlm.target.model) | {"max_new_tokens": 12}
    draft = random_draft(specvlm, policy, block_size=4)
    draft.head.register_forward_hook(lambda module, args, out: forwards.append(out))
    for draft.shared_noise, options in ((True, {"temperature": 0.0}), (False, {"temperature": 1.0, "top_p": 0.9})):
        answer = specvlm.generate(**prompt, **options, draft=draft)
        assert answer.tokens == specvlm.generate(**prompt, **options).tokens
    assert max(tree.max_depth for tree in trees) == 3
    assert len(forwards) == sum(tree.max_depth > 0 for tree in trees)
