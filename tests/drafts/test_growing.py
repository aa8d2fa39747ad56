"""What drafts that grow trees share: steps that were not read yet, and what policies are told of rounds."""

from itertools import zip_longest

import pytest
import torch

from specvlm import SpecVLM
from specvlm.drafts import Draft, EagleConfig, EagleDraft, EagleHead, VLMDraft
from specvlm.drafts.growing import merged
from specvlm.policies import Eagle2, OptTree, Sage
from specvlm.state import Step
from specvlm.tree import Plan
from tests.fakes import prompt_for, tiny_llava


def step(first: int, width: int, count: int) -> Step:
    """`width` tokens from `first` on, each with itself as its feature, of which `count` are said."""
    tokens = torch.arange(first, first + width)[None]
    return Step(tokens, tokens[..., None].float(), torch.tensor([count], dtype=torch.int32))


def test_runs_of_single_tokens_become_one_step_and_others_stand_alone():
    steps = [step(10, 3, 2), step(20, 1, 1), step(30, 1, 1), step(40, 4, 3), step(50, 1, 1)]
    found = merged(steps)
    assert [one.tokens.tolist() for one in found] == [[[10, 11, 12]], [[20, 30]], [[40, 41, 42, 43]], [[50]]]
    assert [one.count.tolist() for one in found] == [[2], [2], [3], [1]]
    assert all(torch.equal(one.features[..., 0], one.tokens.float()) for one in found)
    assert {one.count.dtype for one in found} == {torch.int32}


@pytest.mark.parametrize("policy", [Sage, OptTree])
def test_policies_learn_what_the_rounds_before_told(policy, monkeypatch):
    specvlm = SpecVLM(tiny_llava())
    plans, plan = [], policy.plan
    monkeypatch.setattr(policy, "plan", lambda *args: plans.append(plan(*args)) or plans[-1])
    draft = VLMDraft(tiny_llava(), policy())  # the target itself
    specvlm.generate(**prompt_for(specvlm.target.model), max_new_tokens=60, draft=draft)
    assert len({(made.depth, made.width) for made in plans}) > 1


def test_a_round_without_a_tree_tells_nothing():
    specvlm = SpecVLM(tiny_llava())
    told = []

    class Resting(Eagle2):
        looks_back = True

        def plan(self, history):
            told.append(history.outcomes())
            return Plan(1, 1, 1) if len(told) % 2 else Plan(8, 3, 2)

    specvlm.generate(**prompt_for(specvlm.target.model), max_new_tokens=40, draft=VLMDraft(tiny_llava(), Resting()))
    assert all(told[2::2])
    assert not any(told[1::2])


@pytest.mark.parametrize("kind", ["eagle", "eagle, few tokens", "vlm"])
def test_streams_on_two_targets_keep_their_own(kind):
    first, second = (SpecVLM(tiny_llava(seed=seed)) for seed in (0, 4))
    torch.manual_seed(0)
    draft: Draft = VLMDraft(tiny_llava())  # knows what the first target says
    if kind != "vlm":
        draft = EagleDraft(EagleHead(EagleConfig.for_target(first.target.spec, intermediate_size=64)))
        draft = draft.with_vocabulary(range(5, 160)) if kind == "eagle, few tokens" else draft
    prompt = prompt_for(first.target.model) | {"max_new_tokens": 40, "temperature": 1.0, "draft": draft}
    alone = [list(model.stream(**prompt)) for model in (first, second)]
    streams = [model.stream(**prompt) for model in (first, second)]
    rounds = list(zip_longest(*streams))  # in turn
    assert [[one for one in stream if one is not None] for stream in zip(*rounds, strict=True)] == alone
