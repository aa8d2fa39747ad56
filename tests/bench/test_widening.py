"""A widened demo: the small model's answers and its head's acceptance, from matrices of another size."""

import copy
from dataclasses import replace

import pytest
import torch

from bench.floors import Sizes, layer_weights
from bench.widening import STD, widened, widened_head
from specvlm import SpecVLM, load
from specvlm.demo.run import tasks
from specvlm.drafts import EagleConfig, EagleDraft, EagleHead
from specvlm.policies import Eagle2
from specvlm.tree import Plan
from tests.fakes import tiny_llava

SIZES = Sizes("wide", hidden=384, inner=1024, layers=9, heads=3, kv_heads=3, vocabulary=825)
SAMPLING = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 3.0, "top_p": 0.95}]


@pytest.fixture(scope="module")
def small() -> SpecVLM:
    return load("demo", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def prompts(small):
    return [small.prepare(task.picture, task.question) for task in tasks(2, seed=3)]


def wide_of(
    small: SpecVLM, *, sizes: Sizes = SIZES, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> SpecVLM:
    """Target and head, widened."""
    made = {"seed": seed, "device": device, "dtype": dtype}
    head = widened_head(small.draft.head, sizes, **made)
    return SpecVLM(widened(small.target.model, sizes, **made), EagleDraft(head), small.processor)


@pytest.fixture(scope="module")
def wide(small):
    return wide_of(small)


@torch.no_grad()
def logits_of(model: torch.nn.Module, prompt: dict) -> torch.Tensor:
    """By transformers' own forward, [T, V]."""
    return model(**prompt | {"pixel_values": prompt["pixel_values"].to(model.dtype)}).logits[0]


@pytest.fixture(scope="module")
def exact(small, prompts):
    """The small model's logits of each prompt in float64."""
    model = copy.deepcopy(small.target.model).double()
    return [logits_of(model, prompt) for prompt in prompts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("hidden", "heads"), [(384, 3), (1024, 4)])
def test_logits_are_the_small_models_to_rounding(small, prompts, exact, hidden, heads, dtype):
    sizes = replace(SIZES, hidden=hidden, heads=heads, kv_heads=heads)
    model = widened(small.target.model, sizes, device="cpu", dtype=dtype)
    assert model.config.text_config.rms_norm_eps == pytest.approx(1e-5 * 256 / hidden)
    same = copy.deepcopy(small.target.model).to(dtype)
    for prompt, right in zip(prompts, exact, strict=True):
        got, own = logits_of(model, prompt), logits_of(same, prompt)
        assert (got[:, :725] - right).norm() <= 2 * (own - right).norm()
        assert (got[:, 725:] == -torch.inf).all()


def check_answer(small: SpecVLM, wide: SpecVLM, options: dict) -> None:
    """The small model's answer, with the widened head and without, and the small head's acceptance, round by round."""
    expected, got = small.generate(**options), wide.generate(**options)
    assert got.tokens == expected.tokens == wide.generate(**options, draft=None).tokens
    assert got.stats.accepted_histogram == expected.stats.accepted_histogram
    assert got.stats.tau == expected.stats.tau > 1.5


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_answers_and_what_the_head_is_granted_are_the_small_models(small, wide, prompts, sampling):
    assert "own decoder: its states" in wide.target.why
    check_answer(small, wide, prompts[0] | sampling | {"seed": 5, "max_new_tokens": 24})


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_whole_answers_are_the_small_models(small, sampling):
    wide = wide_of(small, sizes=Sizes("wide", 768, 1024, 10, 6, 6, 2000))
    for task in tasks(3, seed=4):
        prompt = small.prepare(task.picture, task.question)
        check_answer(small, wide, prompt | sampling | {"seed": 5, "max_new_tokens": 96})


def test_in_bf16_it_tells_the_truth_and_the_head_serves(small):
    wide, task = wide_of(small, dtype=torch.bfloat16), tasks(2, seed=3)[1]
    answer = wide.generate(**wide.prepare(task.picture, task.question), max_new_tokens=96)
    assert task.is_answered_by(wide.processor.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip())
    assert answer.stats.tau > 3


def test_another_seed_adds_other_numbers_that_do_not_matter(small, wide, prompts):
    other = wide_of(small, seed=1)
    for one, two in ((wide.target.model, other.target.model), (wide.draft.head, other.draft.head)):
        differ = {name for name, weight in one.named_parameters() if not torch.equal(weight, two.get_parameter(name))}
        surrounded = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
        surrounded += ("lm_head.weight", "linear_1.weight", "fc.weight")
        language = {name for name, _ in one.named_parameters() if "vision_tower" not in name}
        assert differ == {name for name in language if name.endswith(surrounded)}
    for prompt in prompts:
        assert torch.equal(logits_of(wide.target.model, prompt), logits_of(other.target.model, prompt))
    options = prompts[0] | {"temperature": 1.0, "seed": 5, "max_new_tokens": 24}
    got, expected = (each.generate(**options) for each in (other, wide))
    assert got.tokens == expected.tokens
    assert got.stats.accepted_histogram == expected.stats.accepted_histogram


@torch.no_grad()
def test_what_is_added_is_of_a_weights_size_and_layers_beyond_the_small_models_are_no_smaller(wide):
    language, head = wide.target.model.model.language_model, wide.draft.head
    for layer in (*language.layers[7:], head.layers[0]):
        for one in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
            beside, below = one.weight[:, 256:], one.weight[704 if len(one.weight) > 704 else 256 :]
            for added in (beside, below):
                assert float(added.std()) == pytest.approx(STD, rel=0.05)
                assert float(added.mean()) == pytest.approx(0, abs=0.05 * STD)
                assert added.isfinite().all()
    assert float(wide.target.model.lm_head.weight[:725, 256:].std()) == pytest.approx(STD, rel=0.05)
    for half in head.fc.weight[:256].chunk(2, dim=1):
        assert float(half[:, 256:].std()) == pytest.approx(STD, rel=0.05)


def test_a_layer_has_the_bytes_of_its_sizes(wide):
    for layer in wide.target.model.model.language_model.layers:
        assert sum(weight.nbytes for weight in layer.parameters()) == layer_weights(SIZES, itemsize=4)


def test_no_filler_is_proposed(wide, prompts, monkeypatch):
    seen = []
    select = Eagle2.select
    monkeypatch.setattr(Eagle2, "select", lambda *args: seen.append(select(*args)) or seen[-1])
    plan = Plan(nodes=128, depth=3, width=60)
    expected = wide.generate(**prompts[0], max_new_tokens=5, temperature=1.5, seed=1, draft=None).tokens
    whole = EagleDraft(wide.draft.head, Eagle2(plan))
    reduced = EagleDraft(wide.draft.head, Eagle2(plan)).with_vocabulary([2, *range(700, 825)])
    for draft, most in ((whole, 60), (reduced, 26)):
        seen.clear()
        answer = wide.generate(**prompts[0], max_new_tokens=5, temperature=1.5, seed=1, draft=draft)
        assert answer.tokens == expected
        assert all((tree.tokens < 725).all() for tree in seen)
        children = max(int((tree.depths[0] == 1).sum()) for tree in seen)
        assert 1 < children <= most


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 128}, "hidden: expected at least the 256 of the model, got 128"),
        ({"inner": 500}, "inner: expected at least the 512 of the model, got 500"),
        ({"layers": 7}, "layers: expected at least the 8 of the model, got 7"),
        ({"heads": 1, "kv_heads": 1}, "^heads: expected at least the 2 of the model, got 1"),
        ({"kv_heads": 1}, "kv_heads: expected at least the 2 of the model, got 1"),
        ({"kv_heads": 2}, "kv_heads: expected one for each 1 heads, as the model has, got 2 for 3"),
        ({"heads": 5, "kv_heads": 5}, "heads: expected a divisor of the hidden 384, got 5"),
        ({"vocabulary": 724}, "vocabulary: expected at least the 725 of the model, got 724"),
        ({"head_dim": 64}, "head_dim: expected the 128 of the model, got 64"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused_by_name(small, changes, message):
    with pytest.raises(ValueError, match=message):
        widened(small.target.model, replace(SIZES, **changes), device="cpu", dtype=torch.float32)


def test_a_head_or_a_model_that_cannot_be_widened_is_refused_by_name(small):
    made = {"device": "cpu", "dtype": torch.float32}
    with pytest.raises(ValueError, match="inner: expected at least the 704 of the head, got 600"):
        widened_head(small.draft.head, replace(SIZES, inner=600), **made)
    with pytest.raises(ValueError, match="head_dim: expected the 128 of the head, got 64"):
        widened_head(small.draft.head, replace(SIZES, head_dim=64), **made)
    config = replace(EagleConfig.for_target(small.target.spec, 64), compressor={"kind": "text_only"})
    with pytest.raises(ValueError, match="compressor: expected none, got "):
        widened_head(EagleHead(config), SIZES, **made)
    with pytest.raises(ValueError, match=r"got LlavaForConditionalGeneration over Qwen2Model"):
        widened(tiny_llava(language="qwen2"), SIZES, **made)
    with pytest.raises(ValueError, match="model: expected a LLaVA over a Llama, got SpecVLM"):
        widened(small, SIZES, **made)


@pytest.mark.parametrize("changes", [{"input_layernorm": False}, {"bias": False}, {"draft_vocab_size": 200}], ids=str)
def test_a_head_of_any_make_is_widened(small, wide, prompts, changes):
    torch.manual_seed(3)
    head = EagleHead(replace(small.draft.head.config, **changes))
    if "draft_vocab_size" in changes:
        head.vocabulary.copy_(torch.tensor([2, *range(5, 204)]))
    wide_head = widened_head(head, SIZES, seed=2, device="cpu", dtype=torch.float32)
    options = prompts[0] | {"temperature": 1.0, "seed": 5, "max_new_tokens": 10}
    got = wide.generate(**options, draft=EagleDraft(wide_head))
    expected = small.generate(**options, draft=EagleDraft(head))
    assert got.tokens == expected.tokens
    assert got.stats.accepted_histogram == expected.stats.accepted_histogram


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_on_a_gpu_a_wide_models_answers_are_the_small_ones(sampling):
    small = load("demo", device="cuda", dtype="float32")
    sizes = Sizes("wide", hidden=4096, inner=11008, layers=10, heads=32, kv_heads=32, vocabulary=32064)
    wide = wide_of(small, sizes=sizes, device="cuda")
    for task in tasks(2, seed=3):
        prompt = small.prepare(task.picture, task.question)
        check_answer(small, wide, prompt | sampling | {"seed": 5, "max_new_tokens": 96})
