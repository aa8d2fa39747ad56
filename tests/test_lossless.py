"""The answer with a draft is the answer without one, token for token, and Hugging Face's when greedy."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specvlm import SpecVLM
from specvlm.compressors import ViSpecConfig
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
    NGramDraft,
    VLMDraft,
)
from specvlm.targets.base import TargetSpec
from specvlm.targets.hf import HFTarget
from specvlm.targets.llama import LlamaTarget
from tests.fakes import IMAGE_TOKEN, SAMPLING, VOCAB, ScriptedDraft, prompt_for, tiny_llava

TOKENS = 72
#: family, language model, key-value heads, pictures
MODELS = [
    ("llava", "llama", 4, 1),
    ("llava", "qwen2", 2, 2),
    ("llava_next", "mistral", 2, 1),
    ("llava_next", "llama", 1, 2),
]


CASES = [(*model, "cpu") for model in MODELS]
CASES += [pytest.param((*model, "cuda"), marks=pytest.mark.gpu) for model in MODELS[:3]]


@pytest.fixture(scope="module", params=CASES, ids=lambda params: "-".join(map(str, params)))
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    family, language, kv_heads, images, device = request.param
    model = tiny_llava(family, language, num_key_value_heads=kv_heads).to(device)
    return model, prompt_for(model, images)


def drafts(answer: list[int], target: HFTarget) -> dict[str, Draft]:
    """Every kind of draft, some of which know the `answer`."""
    spec, family = target.spec, target.model.config.model_type
    small = tiny_llava(family, seed=3, hidden_size=64, num_hidden_layers=1, num_key_value_heads=2)
    torch.manual_seed(3)
    return {
        "eagle": EagleDraft(EagleHead(EagleConfig.for_target(spec, intermediate_size=64))),
        "eagle, few tokens": EagleDraft(EagleHead(EagleConfig.for_target(spec, 64))).with_vocabulary(range(5, 160)),
        "eagle, ViSpec": EagleDraft(
            EagleHead(replace(EagleConfig.for_target(spec, 64), compressor=ViSpecConfig(heads=4)))
        ),
        "eagle with the n-gram": JoinedDraft(EagleDraft(EagleHead(EagleConfig.for_target(spec, 64)))),
        "eagle3": eagle3(spec),
        "block": BlockDraft(BlockHead(BlockConfig.for_target(spec, 64, block_size=5, num_hidden_layers=1))),
        "vlm": VLMDraft(small),
        "ngram": NGramDraft(),
        "knows": ScriptedDraft(answer, depth=5),
        "knows, branching": ScriptedDraft(answer, depth=5, decoys=2),
        "lies": ScriptedDraft(answer, depth=4, lies=True, decoys=1),
        "a long chain": ScriptedDraft(answer, depth=31),
    }


def eagle3(spec: TargetSpec) -> Eagle3Draft:
    """A head that can propose what stands behind the image token."""
    tokens = torch.arange(IMAGE_TOKEN + 1, VOCAB)
    head = Eagle3Head(Eagle3Config.for_target(spec, intermediate_size=64, draft_vocab_size=len(tokens)))
    head.set_vocabulary(tokens)
    return Eagle3Draft(head)


@pytest.mark.parametrize(
    ("path", "sampling"),
    [*((LlamaTarget, sampling) for sampling in SAMPLING), (HFTarget, SAMPLING[-1])],
    ids=lambda one: one.__name__ if isinstance(one, type) else str(one),
)
def test_every_draft_gives_the_answer_of_autoregressive_decoding(case, path, sampling):
    model, prompt = case
    specvlm = SpecVLM.from_target(path(model))
    options = prompt | sampling | {"seed": 11}
    longer = specvlm.generate(**options, max_new_tokens=TOKENS + 40).tokens
    for name, draft in drafts(longer, specvlm.target).items():
        answer = specvlm.generate(**options, max_new_tokens=TOKENS, draft=draft)
        assert answer.tokens == longer[:TOKENS], name


@pytest.mark.parametrize("path", [LlamaTarget, HFTarget])
def test_greedy_answers_are_those_of_transformers(case, path):
    model, prompt = case
    expected = model.generate(**prompt, do_sample=False, max_new_tokens=TOKENS)
    specvlm = SpecVLM.from_target(path(model))
    assert torch.equal(specvlm.generate(**prompt, max_new_tokens=TOKENS).sequences, expected)
    known = expected[0, prompt["input_ids"].shape[1] :].tolist()
    for name, draft in drafts(known + [5] * 40, specvlm.target).items():
        answer = specvlm.generate(**prompt, max_new_tokens=TOKENS, draft=draft)
        assert torch.equal(answer.sequences, expected), name
    again = model.generate(**prompt, do_sample=False, max_new_tokens=TOKENS)
    assert torch.equal(again, expected), "wrapping changed the user's model"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_draft_that_knows_makes_tau_depth_plus_one_and_the_one_that_lies_one(case, temperature):
    model, prompt = case
    specvlm = SpecVLM(model)
    options = prompt | {"temperature": temperature, "max_new_tokens": 64}
    longer = specvlm.generate(**options | {"max_new_tokens": 80}).tokens
    knows = specvlm.generate(**options, draft=ScriptedDraft(longer, depth=6, decoys=1)).stats
    assert knows.tau == 7
    assert knows.accepted_histogram == (0, 0, 0, 0, 0, 0, 9)
    lies = specvlm.generate(**options, draft=ScriptedDraft(longer, depth=6, lies=True)).stats
    assert lies.tau == 1
    assert lies.from_draft == 0


def test_answers_of_the_random_models_are_not_trivial(case):
    model, prompt = case
    tokens = SpecVLM(model).generate(**prompt, max_new_tokens=TOKENS).tokens
    assert len(set(tokens)) > TOKENS // 3


def test_seeds_change_a_sampled_answer_and_repeat_it(case):
    model, prompt = case
    specvlm = SpecVLM(model)
    options = prompt | {"temperature": 1.0, "max_new_tokens": 32}
    first, other, again = (specvlm.generate(**options, seed=seed).tokens for seed in (1, 2, 1))
    assert first == again
    assert first != other
    drawn = specvlm.generate(**options, seed=None)
    assert specvlm.generate(**options, seed=drawn.stats.seed).tokens == drawn.tokens
