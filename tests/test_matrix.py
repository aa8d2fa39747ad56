"""Every draft under every tree policy at temperatures 0 and 1: the answer is that of autoregressive decoding."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch

from specvlm import SpecVLM
from specvlm.compressors import TextOnlyConfig, ViSpecConfig
from specvlm.cost_aware import CostAware, Costs
from specvlm.drafts import (
    BlockConfig,
    BlockDraft,
    BlockHead,
    Draft,
    Eagle3Config,
    Eagle3Draft,
    Eagle3Head,
    EagleConfig,
    EagleDraft,
    EagleHead,
    JoinedDraft,
    VLMDraft,
)
from specvlm.policies import Confidence, Eagle2, FixedShape, OptTree, Sage, TreePolicy
from specvlm.targets.hf import HFTarget
from specvlm.tree import BUCKETS, Plan
from tests.fakes import prompt_for, tiny_llava, tiny_lm

FREE = Costs(dict.fromkeys(BUCKETS, 1.0), level=0.01)
DEAR = Costs(dict.fromkeys(BUCKETS, 1.0), level=9.0)

POLICIES: dict[str, Callable[[], TreePolicy]] = {
    "EAGLE-2": Eagle2,
    "a large tree": lambda: Eagle2(Plan(nodes=128, depth=8, width=18)),
    "fixed": FixedShape,
    "confidence": lambda: Confidence(0.02),
    "SAGE": Sage,
    "OPT-Tree": lambda: OptTree(rise=0.05),
    "cost-aware": lambda: CostAware(FREE, review=3),
    "cost-aware, to AR and back": lambda: CostAware(DEAR, review=3, looks=2.0),
}


def eagle(target: HFTarget, policy: TreePolicy) -> Draft:
    return EagleDraft(EagleHead(EagleConfig.for_target(target.spec, 64)), policy)


def few_tokens(target: HFTarget, policy: TreePolicy) -> Draft:
    return EagleDraft(EagleHead(EagleConfig.for_target(target.spec, 64)), policy).with_vocabulary(range(5, 160))


def vispec(target: HFTarget, policy: TreePolicy) -> Draft:
    config = EagleConfig.for_target(target.spec, 64)
    return EagleDraft(EagleHead(replace(config, compressor=ViSpecConfig(heads=4))), policy)


def text_only(target: HFTarget, policy: TreePolicy) -> Draft:
    config = EagleConfig.for_target(target.spec, 64)
    return EagleDraft(EagleHead(replace(config, compressor=TextOnlyConfig())), policy)


def usual_tree(target: HFTarget, policy: TreePolicy) -> Draft:
    return EagleDraft(EagleHead(EagleConfig.for_target(target.spec, 64)), policy, shared_noise=False)


def eagle3(target: HFTarget, policy: TreePolicy) -> Draft:
    head = Eagle3Head(Eagle3Config.for_target(target.spec, intermediate_size=64, draft_vocab_size=200))
    head.set_vocabulary(torch.arange(5, 205))
    return Eagle3Draft(head, policy)


def with_ngram(target: HFTarget, policy: TreePolicy) -> Draft:
    return JoinedDraft(eagle3(target, policy))


def block(target: HFTarget, policy: TreePolicy) -> Draft:
    """One whose block ends before most of the trees would."""
    return BlockDraft(BlockHead(BlockConfig.for_target(target.spec, 64, block_size=5, num_hidden_layers=1)), policy)


def vlm(target: HFTarget, policy: TreePolicy) -> Draft:
    family = target.model.config.model_type
    return VLMDraft(tiny_llava(family, num_hidden_layers=1, seed=5), policy)


def language_model(target: HFTarget, policy: TreePolicy) -> Draft:
    return VLMDraft(tiny_lm("qwen2", num_hidden_layers=1, seed=5), policy)


DRAFTS = {
    "eagle": eagle,
    "eagle, few tokens": few_tokens,
    "eagle, usual tree": usual_tree,
    "eagle, ViSpec": vispec,
    "eagle, text only": text_only,
    "eagle3": eagle3,
    "eagle3 with the n-gram": with_ngram,
    "vlm": vlm,
    "vlm of text alone": language_model,
    "block": block,
}

CELLS = list(product(DRAFTS, POLICIES, (0.0, 1.0)))


MODELS = [
    ("llava", "llama", 2, "cpu"),
    ("llava_next", "mistral", 4, "cpu"),
    pytest.param(("llava", "llama", 2, "cuda"), marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda params: f"{params[0]}-{params[-1]}")
def specvlm(request: pytest.FixtureRequest) -> SpecVLM:
    family, language, kv_heads, device = request.param
    return SpecVLM(tiny_llava(family, language, num_key_value_heads=kv_heads).to(device))


@pytest.mark.parametrize(
    ("draft", "policy", "temperature"),
    # A spread in the fast tests: every draft and every policy comes by, at one temperature.
    [pytest.param(*cell, marks=() if number % 5 == 0 else pytest.mark.slow) for number, cell in enumerate(CELLS)],
)
def test_answers_are_equal(specvlm, draft, policy, temperature):
    torch.manual_seed(1)
    made = DRAFTS[draft](specvlm.target, POLICIES[policy]())
    for seed in (0, 1):
        prompt = prompt_for(specvlm.target.model, seed=seed)
        options = prompt | {"temperature": temperature, "seed": seed, "max_new_tokens": 64}
        assert specvlm.generate(**options, draft=made).tokens == specvlm.generate(**options).tokens


def test_the_fast_cells_are_a_spread():
    fast = CELLS[::5]
    assert {draft for draft, _, _ in fast} == set(DRAFTS)
    assert {policy for _, policy, _ in fast} == set(POLICIES)
    assert {temperature for _, _, temperature in fast} == {0.0, 1.0}
