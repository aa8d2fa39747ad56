"""A whole answer through the kernels: in Triton's interpreter, and on a GPU."""

import importlib

import pytest
import torch

from specvlm import SpecVLM
from specvlm.drafts import EagleConfig, EagleDraft, EagleHead, NGramDraft, VLMDraft
from specvlm.policies import Eagle2
from specvlm.tree import Plan
from tests.fakes import ScriptedDraft, prompt_for, tiny_llava

LAUNCHERS = {
    "ancestors": ("launch_pack_ancestors",),
    "tree_attention": ("launch_tree_attention",),
    "kv_cache": ("launch_write_kv", "launch_compact_kv"),
    "acceptance": ("launch_draw", "launch_walk"),
    "drafting": ("launch_draft_topk",),
    "decoder_ops": ("launch_add_rms_norm",),
    "decoder_linear": ("launch_linear", "launch_gated_linear"),
    "rotary": ("launch_rotary_linear",),
}


@pytest.fixture
def launches(monkeypatch) -> dict[str, int]:
    """How often each kernel was launched."""
    counts: dict[str, int] = {}

    def counted(name, launcher):
        def run(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return launcher(*args, **kwargs)

        return run

    for family, names in LAUNCHERS.items():
        module = importlib.import_module(f"specvlm_kernels.{family}")
        for name in names:
            monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return counts


def eagle(specvlm: SpecVLM, plan: Plan) -> EagleDraft:
    """A head of random weights."""
    torch.manual_seed(1)
    return EagleDraft(EagleHead(EagleConfig.for_target(specvlm.target.spec, intermediate_size=96)), Eagle2(plan))


def vlm(plan: Plan) -> VLMDraft:
    """A small model of random weights."""
    return VLMDraft(tiny_llava(seed=1, hidden_size=64, num_hidden_layers=1, num_key_value_heads=2), Eagle2(plan))


@pytest.mark.interpreter
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_through_the_interpreter(launches, temperature):
    specvlm = SpecVLM(tiny_llava(num_key_value_heads=2, hidden_size=64, intermediate_size=64))
    prompt = prompt_for(specvlm.target.model) | {"temperature": temperature, "max_new_tokens": 5}
    plain = specvlm.generate(**prompt, draft=None).tokens
    plan = Plan(nodes=6, depth=2, width=3)
    for draft in (eagle(specvlm, plan), vlm(plan)):
        assert specvlm.generate(**prompt, draft=draft).tokens == plain
    knows = ScriptedDraft([*plain, 5, 5, 5], depth=3, decoys=1)
    answer = specvlm.generate(**prompt, draft=knows)
    assert answer.tokens == plain
    assert answer.stats.from_draft >= 3
    assert launches.keys() == {name for names in LAUNCHERS.values() for name in names}
    if temperature == 0:
        inputs = {name: value for name, value in prompt.items() if isinstance(value, torch.Tensor)}
        expected = specvlm.target.model.generate(**inputs, do_sample=False, max_new_tokens=5)
        assert plain == expected[0, -5:].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_equal_on_a_gpu(launches, temperature):
    model = tiny_llava(num_key_value_heads=2)
    prompt = {name: value.to("cuda") for name, value in prompt_for(model).items()}
    specvlm = SpecVLM(model.to("cuda"))
    options = prompt | {"temperature": temperature, "max_new_tokens": 64}
    longer = specvlm.generate(**options | {"max_new_tokens": 80}).tokens
    plan = Plan(32, 4, 6)
    drafts = [NGramDraft(), ScriptedDraft(longer, depth=6, decoys=2), eagle(specvlm, plan), vlm(plan)]
    drafts.append(eagle(specvlm, plan).quantized())
    for draft in drafts:
        assert specvlm.generate(**options, draft=draft).tokens == longer[:64]
    assert launches.keys() == {name for names in LAUNCHERS.values() for name in names}
