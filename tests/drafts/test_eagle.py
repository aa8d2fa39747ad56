"""The EAGLE head: its arithmetic against a straight line of torch, its tree in a lossless answer, its folder."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specvlm import SpecVLM
from specvlm.drafts import EagleConfig, EagleDraft, EagleHead
from specvlm.policies import Eagle2
from specvlm.tree import Plan
from tests.drafts.formula import attention, check_rounds, gated, layer_weights, rms_norm, spread
from tests.fakes import IMAGE_TOKEN, VOCAB, prompt_for, tiny_llava


@pytest.fixture(scope="module")
def specvlm() -> SpecVLM:
    return SpecVLM(tiny_llava(num_key_value_heads=2))


def random_draft(
    specvlm: SpecVLM, plan: Plan | None = None, vocabulary: list[int] | None = None, **changes: object
) -> EagleDraft:
    """A head of random weights, bound to the target."""
    torch.manual_seed(1)
    config = EagleConfig.for_target(specvlm.target.spec, intermediate_size=96)
    reduced = {} if vocabulary is None else {"draft_vocab_size": len(vocabulary)}
    draft = EagleDraft(EagleHead(replace(config, **reduced | changes)), Eagle2(plan))
    if vocabulary is not None:
        draft.head.vocabulary.copy_(torch.tensor(vocabulary))
    draft.bind(specvlm.target)
    return draft


def straight_line(draft: EagleDraft, embeds: Tensor, features: Tensor) -> Tensor:
    """A head's outputs [T, H] for a chain of pairs at rotary positions 0 to T - 1, each seeing those before it."""
    w, layer, config = draft.head.state_dict(), layer_weights(draft, "layers.0."), draft.head.config
    x = torch.cat([embeds, features], dim=-1) @ w["fc.weight"].T
    if config.bias:
        x = x + w["fc.bias"]
    entering = rms_norm(x, layer["input_layernorm.weight"], config) if config.input_layernorm else x
    x = x + attention(entering, layer, config)
    return x + gated(rms_norm(x, layer["post_attention_layernorm.weight"], config), layer)


@pytest.mark.parametrize("changes", [{}, {"input_layernorm": True}, {"bias": False}, {"rope_theta": 500.0}], ids=str)
@torch.no_grad()
def test_draft_logits_follow_the_formula_at_every_level(specvlm, changes, monkeypatch):
    plan = Plan(nodes=16, depth=4, width=3)
    draft = random_draft(specvlm, plan, **changes)
    head = specvlm.target.head
    check_rounds(specvlm, draft, plan, monkeypatch, line=straight_line, fused=lambda f: f, logits_of=head)


@pytest.mark.parametrize(
    "plan", [Plan(1, 1, 1), Plan(2, 1, 1), Plan(6, 5, 1), Plan(40, 4, 9), Plan(128, 8, 18)], ids=str
)
def test_answers_are_equal_with_trees_of_any_shape(specvlm, plan):
    prompt = prompt_for(specvlm.target.model)
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}):
        expected = specvlm.generate(**prompt, **options, max_new_tokens=48).tokens
        draft = random_draft(specvlm, plan)
        assert specvlm.generate(**prompt, **options, max_new_tokens=48, draft=draft).tokens == expected
        draft.shared_noise = False
        assert specvlm.generate(**prompt, **options, max_new_tokens=48, draft=draft).tokens == expected


def test_a_prompt_of_one_token(specvlm):
    inputs = {"input_ids": torch.tensor([[9]])}
    expected = specvlm.generate(**inputs, max_new_tokens=20).tokens
    assert specvlm.generate(**inputs, max_new_tokens=20, draft=random_draft(specvlm)).tokens == expected


def test_image_tokens_are_never_proposed(specvlm, monkeypatch):
    draft = random_draft(specvlm)
    favoured = torch.zeros(VOCAB)
    favoured[IMAGE_TOKEN] = 1e4
    monkeypatch.setattr(draft, "logits", lambda hidden: draft.target.head(hidden) + favoured)
    seen = []
    select = Eagle2.select
    monkeypatch.setattr(Eagle2, "select", lambda *args: seen.append(select(*args)) or seen[-1])
    specvlm.generate(**prompt_for(specvlm.target.model), max_new_tokens=12, draft=draft)
    assert seen
    assert all((tree.tokens != IMAGE_TOKEN).all() for tree in seen)


def test_a_reduced_vocabulary_proposes_only_what_it_holds(specvlm, monkeypatch):
    draft = random_draft(specvlm, vocabulary=list(range(100, 180, 2)))
    seen = []
    select = Eagle2.select
    monkeypatch.setattr(Eagle2, "select", lambda *args: seen.append(select(*args)) or seen[-1])
    prompt = prompt_for(specvlm.target.model)
    expected = specvlm.generate(**prompt, max_new_tokens=24, temperature=1.0).tokens
    assert specvlm.generate(**prompt, max_new_tokens=24, temperature=1.0, draft=draft).tokens == expected
    assert all(token in range(100, 180, 2) for tree in seen for token in tree.tokens[0, 1:][tree.parents[0, 1:] >= 0])
    # The trees are those of logits that are spread over the whole vocabulary.
    own, trees = draft.logits, list(seen)
    seen.clear()
    whole = random_draft(specvlm)
    whole.head.load_state_dict({x: w for x, w in draft.head.state_dict().items() if x != "vocabulary"})
    monkeypatch.setattr(whole, "logits", lambda hidden: spread(draft, own(hidden)))
    assert specvlm.generate(**prompt, max_new_tokens=24, temperature=1.0, draft=whole).tokens == expected
    assert len(trees) == len(seen)
    for tree, other in zip(trees, seen, strict=True):
        assert torch.equal(tree.tokens, other.tokens)
        assert torch.equal(tree.parents, other.parents)
        torch.testing.assert_close(tree.scores, other.scores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "eagle hidden_size: expected the target's 128, got 64"),
        ({"vocab_size": 300}, "eagle vocab_size: expected the target's 320, got 300"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of 4, got 3"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected an integer >= 1, got 0"),
        ({"head_dim": 256}, "head_dim: expected an integer from 32 to 128, got 256"),
        ({"head_dim": 33}, "head_dim: expected an even number, got 33"),
        ({"rope_theta": float("nan")}, "rope_theta: expected a finite number > 0, got nan"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps: expected a finite number > 0, got -1e-06"),
        ({"draft_vocab_size": 321}, "draft_vocab_size: expected an integer from 1 to 320, got 321"),
        ({"draft_vocab_size": 8}, r"eagle vocabulary: expected no image or video ids, got \[4\]"),
    ],
)
def test_heads_that_do_not_fit_the_target(specvlm, changes, message):
    with pytest.raises(ValueError, match=message):
        random_draft(specvlm, **changes)


def test_a_tree_wider_than_what_the_head_can_propose(specvlm):
    with pytest.raises(ValueError, match="width: expected at most the 3 tokens that the head can propose, got 4"):
        random_draft(specvlm, Plan(nodes=8, depth=2, width=4), vocabulary=[7, 8, 9])
    with pytest.raises(ValueError, match="width: expected an integer from 1 to 64, got 65"):
        Plan(nodes=8, depth=2, width=65)


def test_in_half_precision_the_rotary_frequencies_stay_exact():
    half = SpecVLM(tiny_llava().to(torch.bfloat16))
    draft = random_draft(half)
    exact = EagleHead(draft.head.config).rotary.inv_freq
    assert torch.equal(draft.head.rotary.inv_freq, exact)
    assert {parameter.dtype for parameter in draft.head.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"eagle: expected a target on .*bfloat16.*, got one on .*float32"):
        draft.bind(SpecVLM(tiny_llava()).target)


def test_one_head_serves_two_targets_in_turn(specvlm):
    other = SpecVLM(tiny_llava(seed=4, num_key_value_heads=2))
    draft = random_draft(specvlm)
    first, second = SpecVLM(specvlm.target.model, draft=draft), SpecVLM(other.target.model, draft=draft)
    for each in (first, second, first):
        prompt = prompt_for(each.target.model)
        alone = each.generate(**prompt, max_new_tokens=12, draft=random_draft(each)).stats
        assert each.generate(**prompt, max_new_tokens=12).stats.accepted_histogram == alone.accepted_histogram
        assert draft.target is each.target


def test_vocabularies_out_of_order(specvlm):
    for ids in ([9, 8, 7], [7, 7, 8], [7, 8, VOCAB]):
        with pytest.raises(ValueError, match=r"eagle vocabulary: expected ascending ids in \[0, 320\)"):
            random_draft(specvlm, vocabulary=ids)


@pytest.fixture
def folder(specvlm, tmp_path):
    random_draft(specvlm).save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def test_a_saved_head_comes_back(specvlm, folder):
    prompt = prompt_for(specvlm.target.model)
    plain = specvlm.generate(**prompt, max_new_tokens=24, draft=random_draft(specvlm))
    loaded = specvlm.generate(**prompt, max_new_tokens=24, draft=folder)
    assert loaded.tokens == plain.tokens
    assert loaded.stats.accepted_histogram == plain.stats.accepted_histogram
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    (folder / "notes.txt").write_text("mine")
    EagleDraft.from_pretrained(folder).save_pretrained(folder)
    assert EagleDraft.from_pretrained(folder).head.config == random_draft(specvlm).head.config
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


def test_every_bad_tensor_is_listed(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["fc.bias"]
    tensors["layers.0.mlp.up_proj.weight"] = tensors["layers.0.mlp.up_proj.weight"][1:].clone()
    tensors["lm_head.weight"] = torch.zeros(2, 2)
    save_file(tensors, folder / "model.safetensors")
    expected = (
        r"draft: expected the tensors of its config in .*head, got missing fc.bias; unexpected lm_head.weight; "
        r"misshapen layers.0.mlp.up_proj.weight \(expected \[96, 128\], got \[95, 128\]\)"
    )
    with pytest.raises(ValueError, match=expected):
        EagleDraft.from_pretrained(folder)


def test_broken_folders(folder, tmp_path):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="draft: expected a whole safetensors file"):
        EagleDraft.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"heads": 3}))
    with pytest.raises(ValueError, match=r"config.json: expected fields among .*, got heads"):
        EagleDraft.from_pretrained(folder)
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: .*hidden_size"):
        EagleDraft.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="draft: expected a JSON object"):
        EagleDraft.from_pretrained(folder)
