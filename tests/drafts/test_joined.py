"""A draft and the n-gram in one tree: the merge, what a guess is worth, and answers that stay what they are."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specvlm import SpecVLM, load
from specvlm.cost_aware import CostAware, Costs
from specvlm.drafts import (
    Eagle3Config,
    Eagle3Draft,
    Eagle3Head,
    EagleConfig,
    EagleDraft,
    EagleHead,
    JoinedDraft,
    NGramDraft,
    VLMDraft,
    load_draft,
)
from specvlm.drafts.joined import NGrams
from specvlm.policies import Confidence, Eagle2, FixedShape, History, TreePolicy
from specvlm.targets.hf import HFTarget
from specvlm.tree import BUCKETS, Candidates, Plan, joined, rerank
from tests.drafts.formula import Pausing
from tests.fakes import IMAGE_TOKEN, VOCAB, prompt_for, tiny_llava
from tests.growth import RandomDraft, grow
from tests.test_policies import paths_of, policies, script

CPU = torch.device("cpu")
Path = tuple[int, ...]

plans = st.builds(Plan, st.integers(2, 30), st.integers(1, 5), st.integers(1, 5))
seeds = st.integers(0, 10000)


def nodes_of(candidates: Candidates, row: int = 0) -> list[tuple[Path, float]]:
    """Every candidate of a row, in their order, by its path; those that are no nodes as well."""
    found: list[tuple[Path, float]] = []
    rows = zip(
        *(each[row].tolist() for each in (candidates.tokens, candidates.parents, candidates.scores)), strict=True
    )
    for token, parent, score in rows:
        found.append(((*(found[parent][0] if parent >= 0 else ()), token), score))
    return found


def chain_of(tokens: list[list[int]], scores: list[list[float]]) -> tuple[Tensor, Tensor]:
    return torch.tensor(tokens), torch.tensor(scores)


def random_chain(rng: Random, candidates: Candidates, row: int) -> tuple[list[int], list[float]]:
    """A chain along a path of candidates, some of them no nodes, that leaves it at the end or takes another node
    somewhere on the way; its scores often tie with theirs."""
    depth = len(candidates.sizes)
    path = [*rng.choice([path for path, _ in nodes_of(candidates, row)])]
    path += [rng.randrange(50) for _ in range(rng.randint(0, depth - len(path)))]
    if rng.random() < 0.5:
        path[rng.randrange(len(path))] = rng.randrange(50)
    path = path[: rng.choice([depth, depth, rng.randint(0, depth)])]
    falls = accumulate(rng.choice([0.0, 0.25, 0.5, 2.0]) for _ in path)
    unused = depth - len(path)
    return path + [0] * unused, [-fall for fall in falls] + [-math.inf] * unused


def plain_merge(candidates: Candidates, row: int, tokens: list[int], scores: list[float]) -> list[tuple[Path, float]]:
    """The nodes of both, those of a level in the candidates' order with a new one of the chain's behind them."""
    nodes = [(path, score) for path, score in nodes_of(candidates, row) if score > -math.inf]
    merged: list[tuple[Path, float]] = []
    for depth in range(1, len(candidates.sizes) + 1):
        path, worth = tuple(tokens[:depth]), scores[depth - 1]
        level = [node for node in nodes if len(node[0]) == depth]
        merged += [(known, max(score, worth) if known == path else score) for known, score in level]
        if worth > -math.inf and path not in {known for known, _ in level}:
            merged.append((path, worth))
    return merged


@settings(max_examples=120, deadline=None)
@given(plan=plans, threshold=st.sampled_from([0.0, 0.3, 0.7]), steps=st.sampled_from([1, 2, 12]), seed=seeds)
def test_the_merge_is_that_of_plain_python(plan, threshold, steps, seed):
    roots, rng = [7, 11], Random(seed)
    drafts = [RandomDraft(seed + row, plan.width, steps) for row in range(2)]
    candidates = grow(roots, plan, drafts, Confidence(threshold, plan))  # with rows that are no nodes among them
    chains = [random_chain(rng, candidates, row) for row in range(2)]
    merged = joined(candidates, *chain_of([tokens for tokens, _ in chains], [scores for _, scores in chains]))
    assert merged.sizes == tuple(size + 1 for size in candidates.sizes)
    assert torch.equal(merged.root, candidates.root)
    first = [sum(merged.sizes[:level]) for level in range(len(merged.sizes))]
    for row, chain in enumerate(chains):
        found = nodes_of(merged, row)
        assert [node for node in found if node[1] > -math.inf] == plain_merge(candidates, row, *chain)
        assert [len(path) for path, _ in found] == merged.depths.tolist(), "not in the order of depth"
        for index, parent in enumerate(merged.parents[row].tolist()):
            if parent >= 0:
                assert parent < first[len(found[index][0]) - 1] <= index
                assert found[index][1] <= found[parent][1]


@settings(max_examples=100, deadline=None)
@given(policy=policies, steps=st.sampled_from([1, 2, 12]), seed=seeds)
def test_every_policy_makes_well_formed_trees_of_both(policy, steps, seed):
    plan = policy.plan(History(CPU))
    candidates = grow([7], plan, [RandomDraft(seed, plan.width, steps)], policy)
    tokens, scores = random_chain(Random(seed), candidates, 0)
    tree = policy.select(joined(candidates, *chain_of([tokens], [scores])), plan)
    parents = tree.parents[0].tolist()
    nodes = [i for i, parent in enumerate(parents) if parent >= 0]
    assert 1 <= len(nodes) <= plan.nodes - 1
    assert all(parents[i] < i for i in nodes)
    assert all(parents[i] == 0 or parents[parents[i]] >= 0 for i in nodes), "a child without its parent"
    assert len({(parents[i], int(tree.tokens[0, i])) for i in nodes}) == len(nodes), "a sibling twice"
    assert all(tree.scores[0, i] <= tree.scores[0, parents[i]] for i in nodes)
    assert all(tree.depths[0, i] == tree.depths[0, parents[i]] + 1 <= tree.max_depth for i in nodes)


@settings(max_examples=100, deadline=None)
@given(plan=plans, steps=st.sampled_from([1, 2, 12]), seed=seeds)
def test_a_chain_below_every_node_of_a_full_tree_changes_nothing(plan, steps, seed):
    candidates = grow([7], plan, [RandomDraft(seed, plan.width, steps)])
    plan = replace(plan, nodes=min(plan.nodes, 1 + sum(candidates.sizes)))
    tree = rerank(candidates, plan)
    tokens, scores = random_chain(Random(seed), candidates, 0)
    worst = float(tree.scores[0, : plan.nodes].min()) - 0.125
    after = rerank(joined(candidates, *chain_of([tokens], [[worst + score for score in scores]])), plan)
    for name in ("tokens", "parents", "depths", "scores"):
        assert torch.equal(getattr(after, name), getattr(tree, name)), name


#: 1 (0.6) -> 3 (0.54); 2 (0.3) -> 4 (0.15)
TABLE = {(): [(1, 0.6), (2, 0.3)], (1,): [(3, 0.9), (6, 0.05)], (2,): [(4, 0.5), (7, 0.4)]}


def test_what_is_surer_has_the_nodes():
    plan = Plan(nodes=4, depth=2, width=2)
    candidates = grow([0], plan, [script(TABLE, 2)])
    assert paths_of(rerank(candidates, plan)) == {(1,), (1, 3), (2,)}

    def with_chain(*chain: tuple[int, float]) -> set[Path]:
        return paths_of(
            rerank(joined(candidates, *chain_of([[t for t, _ in chain]], [[math.log(p) for _, p in chain]])), plan)
        )

    assert with_chain((9, 0.2), (8, 0.1)) == {(1,), (1, 3), (2,)}
    assert with_chain((9, 0.4), (8, 0.2)) == {(1,), (1, 3), (9,)}
    assert with_chain((9, 0.7), (8, 0.58)) == {(1,), (9,), (9, 8)}
    assert with_chain((2, 0.7), (4, 0.58)) == {(1,), (2,), (2, 4)}, "both think of it"
    assert with_chain((1, 0.5), (8, 0.35)) == {(1,), (1, 3), (1, 8)}, "the draft is surer of its first node"


def test_candidates_that_are_no_nodes_stay_none():
    # Where a draft has fewer children than it is asked for, it fills up with token 0.
    tokens, parents = torch.tensor([[1, 0, 0, 5, 0]]), torch.tensor([[-1, -1, -1, 0, 0]])
    candidates = Candidates(torch.tensor([7]), tokens, parents, torch.tensor([[-1.0, *[-math.inf] * 4]]), (3, 2))
    merged = joined(candidates, *chain_of([[0, 0]], [[-0.5, -2.0]]))
    assert [node for node in nodes_of(merged) if node[1] > -math.inf] == [((1,), -1.0), ((0,), -0.5), ((0, 0), -2.0)]


def test_a_fixed_shape_keeps_no_child_of_a_node_that_it_leaves_out():
    policy = FixedShape((1, 2))
    plan = policy.plan(History(CPU))
    candidates = grow([0], plan, [script(TABLE, 2)], policy)
    assert paths_of(policy.select(candidates, plan)) == {(1,), (1, 3), (1, 6)}
    poor = joined(candidates, *chain_of([[9, 8]], [[math.log(0.5), math.log(0.4)]]))
    assert paths_of(policy.select(poor, plan)) == {(1,), (1, 3), (1, 6)}
    good = joined(candidates, *chain_of([[9, 8]], [[math.log(0.7), math.log(0.4)]]))
    assert paths_of(policy.select(good, plan)) == {(9,), (9, 8)}


def test_the_merge_asks_nothing_of_the_host():
    # Tensors without contents: whatever reads one raises.
    tokens = torch.empty(1, 9, dtype=torch.int64, device="meta")
    candidates = Candidates(tokens[:, 0], tokens, tokens, tokens.float(), (3, 6))
    merged = joined(candidates, tokens[:, :2], tokens[:, :2].float())
    assert merged.tokens.shape == merged.parents.shape == merged.scores.shape == (1, 11)


def ngrams(text: list[int], *, longest: int = 4, shortest: int = 1, barred: tuple[int, ...] = ()) -> NGrams:
    made = NGrams(longest, shortest, frozenset(barred))
    for token in text:
        made.read(token)
    return made


def say(text: NGrams, *tokens: int) -> None:
    for token in tokens:
        text.judge(token)
        text.read(token)


def test_the_most_frequent_continuation_is_guessed_and_of_equals_the_latest():
    assert ngrams([1, 2, 1, 2, 1, 3, 1]).chain(1)[0] == [2]
    assert ngrams([1, 2, 1, 3, 1]).chain(1)[0] == [3]
    assert ngrams([1, 3, 1, 2, 1, 2, 1, 3, 1], longest=1).chain(1)[0] == [3]
    assert ngrams([5, 1, 2, 6, 1, 3, 6, 1, 3, 5, 1]).chain(1)[0] == [2], "a longer suffix goes before"
    assert ngrams([5, 1, 2, 6, 1, 3, 6, 1, 3, 5, 1], longest=1).chain(1)[0] == [3]


def test_nothing_is_guessed_where_nothing_was_seen():
    assert ngrams([]).chain(3) == ([], [])
    assert ngrams([1, 2, 3]).chain(3) == ([], [])
    assert ngrams([1, 2, 3, 2], shortest=2).chain(3) == ([], [])


def test_a_chain_goes_on_along_what_it_guessed_with_longer_suffixes():
    text = ngrams([1, 2, 3, 4, 9, 3], longest=3)
    tokens, scores = text.chain(3)
    assert tokens == [4, 9, 3]
    assert scores == pytest.approx([math.log(0.5), 2 * math.log(0.5), 3 * math.log(0.5)])
    assert text.chain(8)[0] == [4, 9, 3, 4, 9, 3, 4, 9], "past the end of the text, round and round"


def test_a_rate_is_how_often_a_suffix_of_that_length_was_right():
    text = ngrams([1, 2, 3, 1])
    assert [text.rate(n) for n in (1, 2, 3, 4)] == [0.5] * 4
    say(text, 2)  # guessed after (1): 1 of 1
    assert [text.rate(n) for n in (1, 2, 3)] == pytest.approx([2 / 3, 1 / 2, 1 / 2])
    say(text, 3)  # guessed after (1, 2)
    say(text, 7)  # 1 was guessed after (1, 2, 3)
    say(text, 8)  # nothing was guessed after 7
    say(text, 3)  # nor after 8
    assert [text.rate(n) for n in (1, 2, 3, 4)] == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1 / 2])
    # After (3): 1 and 7 followed it once each, 7 later; then (3, 7) -> 8, (3, 7, 8) -> 3, (3, 7, 8, 3) -> none, and
    # of shorter ones (3) -> 7.
    tokens, scores = text.chain(4)
    assert tokens == [7, 8, 3, 7]
    rates = [2 / 3, 2 / 3, 1 / 3, 2 / 3]
    assert scores == pytest.approx([sum(map(math.log, rates[:depth])) for depth in (1, 2, 3, 4)])


def test_rates_beyond_the_longest_are_those_of_the_longest():
    text = ngrams([1, 2, 3, 4, 5, 6], longest=2)
    say(text, 1, 2, 3, 4, 5, 6, 1)  # the first of which was no guess: one trial after 1 token, five after 2
    assert [text.rate(n) for n in (1, 2)] == pytest.approx([2 / 3, 6 / 7])
    assert text.chain(4)[1] == pytest.approx([depth * math.log(6 / 7) for depth in (1, 2, 3, 4)])


def test_a_prompt_is_no_evidence_and_misses_make_guesses_worthless():
    text = ngrams([1, 2] * 20 + [1])
    assert [text.rate(n) for n in (1, 4)] == [0.5, 0.5]
    for other in range(100, 110):
        # After (2, 1, 2, 1), then nine times after (2, 1), 2 is guessed in vain; after other nothing, after 2 it is 1.
        say(text, other, 2, 1)
    assert [text.rate(n) for n in (1, 2, 3, 4)] == pytest.approx([11 / 12, 1 / 11, 1 / 2, 1 / 3])


@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 3), st.integers(0, 2))
def test_barred_ids_are_never_guessed_and_separate_texts(tokens, shortest, more):
    text = ngrams([], shortest=shortest, longest=shortest + more, barred=(4, 5))
    say(text, *tokens)
    guessed, scores = text.chain(8)
    assert not {4, 5} & set(guessed)
    assert scores == sorted(scores, reverse=True)
    assert all(score < 0 for score in scores)
    assert set(pairwise(tokens[-1:] + guessed)) <= set(pairwise(tokens)), "what never followed was guessed"


def eagle(target: HFTarget, policy: TreePolicy | None = None) -> EagleDraft:
    return EagleDraft(EagleHead(EagleConfig.for_target(target.spec, 64)), policy)


def eagle3(target: HFTarget, policy: TreePolicy | None = None) -> Eagle3Draft:
    head = Eagle3Head(Eagle3Config.for_target(target.spec, intermediate_size=64, draft_vocab_size=200))
    head.set_vocabulary(torch.arange(5, 205))
    return Eagle3Draft(head, policy)


def vlm(target: HFTarget, policy: TreePolicy | None = None) -> VLMDraft:
    return VLMDraft(tiny_llava(num_hidden_layers=1, seed=5), policy)


DRAFTS: dict[str, Callable] = {"eagle": eagle, "eagle3": eagle3, "vlm": vlm}


def repeating(image_token: int | None = None) -> SpecVLM:
    """A model whose next token hangs on the last alone, so that greedy answers go round in a circle."""
    model = tiny_llava(seed=2)  # after a dozen tokens
    for layer in model.model.language_model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    if image_token is not None:
        model.config.image_token_id = image_token
    return SpecVLM(model)


@pytest.fixture(scope="module")
def specvlm() -> SpecVLM:
    return repeating()


@pytest.fixture
def trees(monkeypatch) -> list:
    """The trees that EAGLE-2's policy chose."""
    seen: list = []
    select = Eagle2.select
    monkeypatch.setattr(Eagle2, "select", lambda *args: seen.append(select(*args)) or seen[-1])
    return seen


@pytest.mark.parametrize("kind", DRAFTS)
def test_repeating_answers_come_sooner_and_stay_what_they_are(specvlm, kind):
    torch.manual_seed(1)
    draft = DRAFTS[kind](specvlm.target)
    prompt = prompt_for(specvlm.target.model) | {"max_new_tokens": 60}
    expected = specvlm.generate(**prompt).tokens
    assert len(set(expected)) < 20
    alone, both = (specvlm.generate(**prompt, draft=each) for each in (draft, JoinedDraft(draft)))
    assert alone.tokens == both.tokens == expected
    assert both.stats.tau > 2 * alone.stats.tau
    sampled = prompt | {"temperature": 0.4, "seed": 1, "max_new_tokens": 24}
    assert specvlm.generate(**sampled, draft=JoinedDraft(draft)).tokens == specvlm.generate(**sampled).tokens


@pytest.mark.parametrize("plan", [Plan(2, 1, 1), Plan(6, 5, 1), Plan(128, 5, 18)], ids=str)
def test_answers_are_equal_with_trees_of_any_shape(specvlm, plan):
    torch.manual_seed(1)
    draft = JoinedDraft(eagle(specvlm.target, Eagle2(plan)))
    prompt = prompt_for(specvlm.target.model) | {"max_new_tokens": 32}
    for options in ({"temperature": 0.0}, {"temperature": 0.5, "top_p": 0.9}):
        found = specvlm.generate(**prompt, **options, draft=draft)
        assert found.tokens == specvlm.generate(**prompt, **options).tokens


def test_a_policy_that_drafts_nothing_has_its_way(specvlm):
    draft = JoinedDraft(eagle(specvlm.target, Eagle2(Plan(1, 1, 1))))
    prompt = prompt_for(specvlm.target.model) | {"max_new_tokens": 40}
    found = specvlm.generate(**prompt, draft=draft)
    assert found.tokens == specvlm.generate(**prompt).tokens
    assert found.stats.tau == 1


def test_evidence_grows_in_rounds_without_a_tree_as_well(specvlm, monkeypatch):
    draft = JoinedDraft(eagle(specvlm.target, Pausing(Plan(8, 3, 2), frozenset(range(20)))))
    found: list = []
    chain = NGrams.chain
    monkeypatch.setattr(NGrams, "chain", lambda *args: found.append(chain(*args)) or found[-1])
    prompt = prompt_for(specvlm.target.model)
    answer = specvlm.generate(**prompt, max_new_tokens=24, draft=draft).tokens
    text = ngrams(prompt["input_ids"][0].tolist(), barred=(IMAGE_TOKEN,))
    say(text, *answer[:21])
    assert text.rate(4) > 0.5
    assert found[0] == chain(text, 3)


def test_a_policy_that_looks_back_sees_what_the_ngram_knew(specvlm):
    policy = CostAware(Costs(dict.fromkeys(BUCKETS, 1.0), level=0.01), depth=5, review=4)
    prompt = prompt_for(specvlm.target.model) | {"max_new_tokens": 80}
    draft = JoinedDraft(eagle(specvlm.target, policy))
    assert specvlm.generate(**prompt, draft=draft).tokens == specvlm.generate(**prompt).tokens
    assert policy.rates.rate(5, 0) > 0.95, "no node so deep was counted, which a random head never finds"


def test_answers_side_by_side_know_nothing_of_each_other(specvlm):
    torch.manual_seed(1)
    draft = JoinedDraft(eagle(specvlm.target))
    prompts = [prompt_for(specvlm.target.model, seed=seed) | {"max_new_tokens": 40} for seed in (0, 1)]
    alone = [list(specvlm.stream(**prompt, draft=draft)) for prompt in prompts]
    streams = [specvlm.stream(**prompt, draft=draft) for prompt in prompts]
    together: list[list] = [[], []]
    for number in [0, 0, 0, 1, 0, 1] * 60:
        together[number] += [emitted for emitted in [next(streams[number], None)] if emitted is not None]
    assert together == alone
    assert list(specvlm.stream(**prompts[0], draft=draft)) == alone[0], "an earlier answer was remembered"


def drafted(trees: list) -> set[int]:
    return {int(token) for tree in trees for token in tree.tokens[tree.parents >= 0]}


def test_image_tokens_are_never_proposed(specvlm, trees):
    torch.manual_seed(1)
    text = {"input_ids": torch.tensor([[9, 8, 7]]), "max_new_tokens": 60}
    answer = specvlm.generate(**text, draft=JoinedDraft(eagle(specvlm.target))).tokens
    said = answer[-1]
    assert answer.count(said) > 3
    assert said in drafted(trees)
    trees.clear()
    other = repeating(image_token=said)
    assert other.generate(**text, draft=JoinedDraft(eagle(other.target))).tokens == answer
    assert trees
    assert said not in drafted(trees)


def test_what_the_draft_excludes_is_not_proposed_by_the_ngram_either(specvlm, trees):
    text = {"input_ids": torch.tensor([[9, 8, 7]]), "max_new_tokens": 60}
    answer = specvlm.generate(**text).tokens
    draft = eagle(specvlm.target)
    draft.bind(specvlm.target)
    draft.exclude = torch.tensor(sorted({*draft.exclude.tolist(), answer[-1], answer[-2]}))
    assert specvlm.generate(**text, draft=JoinedDraft(draft)).tokens == answer
    assert trees
    assert not {answer[-1], answer[-2]} & drafted(trees)


def test_a_policy_set_later_leaves_the_draft_that_was_given_alone(specvlm):
    inner = eagle(specvlm.target)
    draft = JoinedDraft(inner)
    before, draft.policy = inner.policy, Eagle2(Plan(4, 2, 2))
    assert inner.policy is before
    assert draft.policy == Eagle2(Plan(4, 2, 2))
    draft.policy = Eagle2(Plan(64, 2, 33))
    reduced = JoinedDraft(inner.with_vocabulary(range(5, 37)))
    reduced.policy = draft.policy
    with pytest.raises(ValueError, match="width: expected at most the 32 tokens that the head can propose, got 33"):
        reduced.bind(specvlm.target)


def test_the_shipped_head_with_the_ngram():
    model = load("demo", draft="demo-ngram", device="cpu")
    assert isinstance(model.draft, JoinedDraft)
    assert isinstance(model.draft.draft, EagleDraft)
    assert isinstance(load_draft("demo-ngram"), JoinedDraft)
    text = dict(model.processor(text="a red circle, a red circle, a", return_tensors="pt")) | {"max_new_tokens": 24}
    assert model.generate(**text).tokens == model.generate(**text, draft=None).tokens


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda head: JoinedDraft(NGramDraft()),
            TypeError,
            "draft: expected one that grows its trees by a policy, got",
        ),
        (lambda head: JoinedDraft("demo"), TypeError, "draft: expected one that grows its trees by a policy, got str"),
        (lambda head: JoinedDraft(head, shortest=0), ValueError, "shortest: expected an integer >= 1, got 0"),
        (lambda head: JoinedDraft(head, longest=1, shortest=2), ValueError, "longest: expected an integer >= 2, got 1"),
        (lambda head: JoinedDraft(head, longest=2.5), TypeError, "longest: expected an integer, got 2.5"),
    ],
)
def test_settings_out_of_range(specvlm, make, error, message):
    with pytest.raises(error, match=message):
        make(eagle(specvlm.target))


def test_a_draft_that_does_not_fit_is_refused_as_it_would_be_alone(specvlm):
    config = replace(EagleConfig.for_target(specvlm.target.spec, 64), vocab_size=VOCAB - 1)
    with pytest.raises(ValueError, match="eagle vocab_size: expected the target's 320, got 319"):
        specvlm.generate(**prompt_for(specvlm.target.model), draft=JoinedDraft(EagleDraft(EagleHead(config))))
