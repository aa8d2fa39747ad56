"""The cost-aware policy: its decisions are exactly the best ones, and a useless draft costs next to nothing."""

import json
import random
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specvlm import SpecVLM
from specvlm.cost_aware import CostAware, Costs, Rates, best_shape, costs_of
from specvlm.drafts import EagleConfig, EagleDraft, EagleHead, NGramDraft, VLMDraft
from specvlm.drafts.eagle import EagleDecoder
from specvlm.policies import Outcome
from specvlm.targets.hf import HFTarget
from specvlm.tree import BUCKETS, Plan
from tests.fakes import prompt_for, tiny_llava, tiny_lm


class Told:
    """A history of outcomes that are handed out once."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.found: list[Outcome] = []

    def outcomes(self) -> list[Outcome]:
        found, self.found = self.found, []
        return found


def rates_of(table: list[list[float]]) -> Rates:
    """Rates that are these: row d has those of depth d + 1."""
    rates = Rates(len(table), len(table[0]))
    rates.rate = lambda depth, rank: table[depth - 1][rank]  # type: ignore[method-assign]
    return rates


def every_path(table: list[list[float]], depth: int) -> list[float]:
    """The probabilities of all nodes that grow, best first: a level's best `width` nodes have `width` children each."""
    width, found, beam = len(table[0]), [], [1.0]
    for rates in table[:depth]:
        level = sorted((above * rate for above in beam for rate in rates), reverse=True)
        found += level
        beam = level[:width]
    return sorted(found, reverse=True)


tables = st.integers(1, 3).flatmap(
    lambda width: st.lists(
        st.lists(st.floats(0, 1), min_size=width, max_size=width).map(lambda row: [p / width for p in row]),
        min_size=1,
        max_size=4,
    )
)


@settings(max_examples=80, deadline=None)
@given(table=tables, nodes=st.integers(1, 40))
def test_lengths_are_those_of_the_best_trees(table, nodes):
    for depth in range(1, len(table) + 1):
        paths = every_path(table, depth)
        expected = [sum(paths[:n]) for n in range(nodes + 1)]
        assert rates_of(table).lengths(depth, nodes) == pytest.approx(expected)


@settings(max_examples=80, deadline=None)
@given(
    table=tables,
    verify=st.lists(st.floats(0.1, 10), min_size=6, max_size=6).map(sorted),
    level=st.floats(0.01, 3),
)
def test_the_shape_is_the_fastest_of_all(table, verify, level):
    costs = Costs(dict(zip(BUCKETS, verify, strict=True)), level)
    speeds = {(1, 0): 1 / verify[0]}
    for depth in range(1, len(table) + 1):
        paths = every_path(table, depth)
        for nodes, seconds in zip(BUCKETS[1:], verify[1:], strict=True):
            speeds[nodes, depth] = (1 + sum(paths[: nodes - 1])) / (seconds + depth * level)
    shape = best_shape(costs, rates_of(table))
    assert speeds[shape] == pytest.approx(max(speeds.values()))


def test_known_decisions():
    free = dict.fromkeys(BUCKETS, 1.0)
    sure = [[1.0], [1.0], [1.0]]
    # (1 + d) / (1 + d level): deeper while a level costs less than a step
    assert best_shape(Costs(free, 0.1), rates_of(sure)) == (8, 3)
    assert best_shape(Costs(free, 2.0), rates_of(sure)) == (1, 0)
    # 0.5 more tokens for 0.5 more time is no gain; for 0.4 it is
    assert best_shape(Costs(free, 0.5), rates_of([[0.5]])) == (1, 0)
    assert best_shape(Costs(free, 0.4), rates_of([[0.5]])) == (8, 1)
    # 16 nodes hold twice the children of 8, for a tenth more time
    wide = [[0.06] * 15]
    assert best_shape(Costs(free | {16: 1.1, 32: 9, 64: 9, 128: 9}, 0.1), rates_of(wide)) == (16, 1)
    assert best_shape(Costs(free | {16: 1.6, 32: 9, 64: 9, 128: 9}, 0.1), rates_of(wide)) == (8, 1)


def test_rates_follow_what_happens():
    rates = Rates(2, 2)
    for _ in range(300):
        rates.add([Outcome(1, 2, 1), Outcome(2, 2, None)])
    assert rates.rate(1, 0) == pytest.approx(0, abs=0.06)
    assert rates.rate(1, 1) == pytest.approx(1, abs=0.06)
    assert rates.rate(2, 0) == pytest.approx(0, abs=0.06)
    for _ in range(300):
        rates.add([Outcome(1, 1, 0), Outcome(2, 1, 0), Outcome(3, 1, 0)])
    assert rates.rate(1, 0) == pytest.approx(1, abs=0.06)
    assert rates.rate(2, 0) == pytest.approx(1, abs=0.06)
    assert rates.rate(1, 1) == pytest.approx(0, abs=0.06), "the best child leaves nothing to the second"


def played(policy: CostAware, rounds: int, hit: float, seed: int = 0) -> tuple[int, float, list[Plan]]:
    """Tokens and seconds of rounds in which the best child is drawn with probability `hit` at every depth."""
    chance, told = random.Random(seed), Told()
    tokens, seconds, plans = 0, 0.0, []
    for _ in range(rounds):
        plan = policy.plan(told)
        plans.append(plan)
        tokens += 1
        if plan.nodes == 1:
            seconds += policy.costs.verify[1]
            continue
        seconds += policy.costs.seconds(plan.nodes, plan.depth)
        for depth in range(1, plan.depth + 1):
            drawn = chance.random() < hit
            told.found.append(Outcome(depth, plan.width, 0 if drawn else None))
            if not drawn:
                break
            tokens += 1
    return tokens, seconds, plans


TYPICAL = Costs({1: 1.0, 8: 1.2, 16: 1.5, 32: 2.2, 64: 3.6, 128: 6.5}, level=0.25)


@pytest.mark.parametrize("rounds", [96, 200, 400, 1000])
def test_a_useless_draft_costs_less_than_a_twentieth(rounds):
    for seed in range(5):
        tokens, seconds, plans = played(CostAware(TYPICAL), rounds, hit=0.0, seed=seed)
        assert tokens / seconds >= 0.95 / TYPICAL.verify[1]
        assert plans[-2].nodes == 1


@pytest.mark.parametrize("rounds", [96, 400])
def test_a_good_draft_is_used_almost_as_well_as_by_one_who_knows(rounds):
    for hit in (0.5, 0.7, 0.9, 0.97):
        played_of = [played(CostAware(TYPICAL), rounds, hit, seed) for seed in range(5)]
        tokens, seconds = sum(tokens for tokens, _, _ in played_of), sum(seconds for _, seconds, _ in played_of)
        known = Rates(8, 4)
        known.rate = lambda depth, rank, hit=hit: hit if rank == 0 else 0.0
        nodes, depth = best_shape(TYPICAL, known)
        ideal = (1 + known.lengths(depth, nodes - 1)[-1]) / TYPICAL.seconds(nodes, depth) if depth else 1.0
        assert tokens / seconds >= 0.9 * ideal


def test_speculation_is_turned_down_and_up_again():
    policy = CostAware(TYPICAL, looks=0.03)
    assert played(policy, 60, hit=0.95)[2][-2].depth >= 4
    assert played(policy, 200, hit=0.0)[2][-2].nodes == 1
    _, _, plans = played(policy, 600, hit=0.95)
    assert plans[-2].depth >= 4


def test_costs_are_measured_once_by_the_clock(tmp_path, monkeypatch):
    now = [0.0]
    target = HFTarget(tiny_llava())
    verify = target.verify

    def slow(tree, state):
        now[0] += 10 + tree.tokens.shape[1]
        return verify(tree, state)

    monkeypatch.setattr(target, "verify", slow)
    head = EagleHead(EagleConfig.for_target(target.spec, intermediate_size=64))
    forward = EagleDecoder.__call__

    def slow_forward(*args):
        now[0] += 3
        return forward(*args)

    monkeypatch.setattr(EagleDecoder, "__call__", slow_forward)
    draft = EagleDraft(head)
    cache = tmp_path / "cache" / "costs.json"
    costs = costs_of(target, draft, cache=cache, clock=lambda: now[0])
    assert costs == Costs({n: 10.0 + n for n in BUCKETS}, level=3.0)
    before = now[0]
    assert costs_of(target, draft, cache=cache, clock=lambda: now[0]) == costs
    assert now[0] == before, "measured twice"
    assert [path.name for path in cache.parent.iterdir()] == ["costs.json"]
    other = EagleDraft(EagleHead(EagleConfig.for_target(target.spec, intermediate_size=96)))
    ticks = count()
    costs_of(target, other, cache=cache, clock=lambda: float(next(ticks)))
    assert len(json.loads(cache.read_text())) == 2
    key = next(iter(json.loads(cache.read_text())))
    for broken in ("{", "[]", json.dumps({key: None}), json.dumps({key: {"verify": {"1": 1}, "level": 1}})):
        cache.write_text(broken)
        assert costs_of(target, draft, cache=cache, clock=lambda: now[0]) == costs
    with pytest.raises(ValueError, match="draft: expected one that grows its trees by a policy, got NGramDraft"):
        costs_of(target, NGramDraft(), cache=cache)


def test_costs_that_cannot_be_kept_are_measured_again(tmp_path):
    target = SpecVLM(tiny_llava()).target
    draft = VLMDraft(tiny_lm())
    (tmp_path / "file").write_text("no folder")
    for _ in range(2):
        assert costs_of(target, draft, cache=tmp_path / "file" / "costs.json").level > 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("level", [0.01, 50.0], ids=["drafting pays", "drafting never pays"])
def test_answers_stay_what_they_are(temperature, level):
    model = tiny_llava()
    specvlm = SpecVLM(model)
    policy = CostAware(Costs(TYPICAL.verify, level), looks=9.0, review=3)
    torch.manual_seed(2)
    draft = EagleDraft(EagleHead(EagleConfig.for_target(specvlm.target.spec, intermediate_size=64)), policy)
    prompt = prompt_for(model) | {"temperature": temperature, "max_new_tokens": 80}
    assert specvlm.generate(**prompt, draft=draft).tokens == specvlm.generate(**prompt).tokens


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Costs({8: 1.0, 16: 1.0}, 1.0), r"verify: expected times for two or more of .*, 1 included, got \{8"),
        (lambda: Costs({1: 1.0, 9: 1.0}, 1.0), "verify: expected times for two or more of .*, 1 included"),
        (lambda: Costs({1: 1.0}, 1.0), r"verify: expected times for two or more of .*, 1 included, got \{1\}"),
        (lambda: Costs({1: 1.0, 8: 1.0}, 0.0), "costs: expected finite times above 0"),
        (lambda: Costs({1: 1.0, 8: float("nan")}, 1.0), "costs: expected finite times above 0"),
        (lambda: Costs({1: 1.0, 8: 1.0}, float("inf")), "costs: expected finite times above 0"),
        (lambda: CostAware(TYPICAL, depth=0), "depth: expected an integer >= 1, got 0"),
        (lambda: CostAware(TYPICAL, looks=0.0), "looks: expected a finite number > 0, got 0.0"),
        (lambda: CostAware(TYPICAL, looks=float("nan")), "looks: expected a finite number > 0, got nan"),
        (lambda: CostAware(TYPICAL, width=65), "width: expected an integer from 1 to 64, got 65"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_draft_that_is_right_is_followed_deeper_and_one_that_is_not_is_left_alone():
    model = tiny_llava()
    specvlm = SpecVLM(model)
    cheap = Costs(dict.fromkeys(BUCKETS, 1.0), level=0.05)
    prompt = prompt_for(model) | {"max_new_tokens": 120}
    for temperature in (0.0, 1.0):
        right = CostAware(cheap)
        specvlm.generate(**prompt, temperature=temperature, draft=VLMDraft(tiny_llava(), right))
        assert right.rates.rate(1, 0) > 0.95
        assert best_shape(cheap, right.rates)[1] == right.plan(Told()).depth == 8
    torch.manual_seed(2)
    wrong = CostAware(TYPICAL)
    head = EagleHead(EagleConfig.for_target(specvlm.target.spec, intermediate_size=64))
    specvlm.generate(**prompt, draft=EagleDraft(head, wrong))
    assert wrong.rates.rate(1, 0) < Rates(8, 4).rate(1, 0) / 2
    assert best_shape(TYPICAL, wrong.rates) == (1, 0)


def test_a_draft_that_was_measured_can_still_learn(tmp_path):
    target = HFTarget(tiny_llava().to(torch.bfloat16))
    draft = EagleDraft(EagleHead(EagleConfig.for_target(target.spec, intermediate_size=64)))
    costs_of(target, draft, cache=tmp_path / "costs.json")
    assert not any(parameter.is_inference() for parameter in draft.head.parameters())


def test_times_that_something_else_disturbed_are_not_kept(tmp_path, monkeypatch):
    assert Costs({1: 1.0, 8: 0.9, 16: 1.2}, 1.0).plausible
    assert not Costs({1: 1.0, 8: 5.0, 16: 2.0}, 1.0).plausible
    target = HFTarget(tiny_llava())
    draft = EagleDraft(EagleHead(EagleConfig.for_target(target.spec, intermediate_size=64)))
    monkeypatch.setattr(Costs, "plausible", False)
    costs_of(target, draft, cache=tmp_path / "costs.json")
    assert not (tmp_path / "costs.json").exists()
