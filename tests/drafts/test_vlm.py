"""The small model as a draft: its tree against its own plain forward, its answers, its tower, its folder."""

import json
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from specvlm import SpecVLM
from specvlm.drafts import VLMDraft, load_draft
from specvlm.policies import Eagle2
from specvlm.state import Limits, Sampling
from specvlm.targets.hf import FAMILIES
from specvlm.tree import Plan
from tests.drafts.formula import Pausing, known_chain, recorded, spread
from tests.fakes import IMAGE_TOKEN, VOCAB, prompt_for, tiny_llava, tiny_lm, tiny_processor

#: Sizes of a draft: none of them the target's, one head for two or one for itself.
GQA = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
MHA = {"hidden_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
#: A vocabulary that is the first part of the target's.
FEWER = MHA | {"vocab_size": 200}


@pytest.fixture(scope="module")
def specvlm() -> SpecVLM:
    return SpecVLM(tiny_llava(num_key_value_heads=2))


@pytest.fixture(scope="module")
def next_specvlm() -> SpecVLM:
    return SpecVLM(tiny_llava("llava_next"))


def small(kind: str, changes: dict[str, int], seed: int = 5) -> PreTrainedModel:
    """A random draft model: "llava", "llava_next", or a language of text alone."""
    make = tiny_llava if kind.startswith("llava") else tiny_lm
    return make(kind, seed=seed, **changes)


def with_tower_of(model: PreTrainedModel, draft: PreTrainedModel) -> PreTrainedModel:
    """`draft`, with equal weights in its vision tower."""
    draft.model.vision_tower.load_state_dict(model.model.vision_tower.state_dict())
    return draft


def plain_logits(model: PreTrainedModel, prompt: dict[str, Tensor], said: list[int]) -> Tensor:
    """The model's own logits [V] after a prompt and what was said, as transformers computes them.

    It reads its last id for those that it lacks, of which it says nothing.
    """
    ids = torch.cat([prompt["input_ids"], torch.tensor([said])], dim=1).clamp(max=model.lm_head.out_features - 1)
    pictures = {name: prompt[name] for name in ("pixel_values", "image_sizes") if name in prompt}
    if not isinstance(model, FAMILIES):
        ids, pictures = ids[ids != IMAGE_TOKEN][None], {}
    logits = model(input_ids=ids, **pictures).logits[0, -1]
    return torch.nn.functional.pad(logits, (0, VOCAB - len(logits)), value=-torch.inf)


@pytest.mark.parametrize("changes", [MHA, GQA, FEWER], ids=["mha", "gqa", "fewer rows"])
@pytest.mark.parametrize("kind", ["llava", "llama", "mistral", "qwen2"])
def test_draft_logits_are_the_models_own_at_every_level(specvlm, kind, changes, monkeypatch):
    model = small(kind, changes)
    check_logits(specvlm, model, prompt_for(specvlm.target.model), monkeypatch)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("shared", [False, True], ids=["own tower", "shared tower"])
def test_draft_logits_with_tiles(next_specvlm, images, shared, monkeypatch):
    model = small("llava_next", MHA)
    if shared:
        with_tower_of(next_specvlm.target.model, model)
    prompt = prompt_for(next_specvlm.target.model, images)
    check_logits(next_specvlm, model, prompt, monkeypatch, rounds=2)


@pytest.mark.parametrize("images", [0, 1, 2])
def test_draft_logits_with_a_shared_tower(specvlm, images, monkeypatch):
    model = with_tower_of(specvlm.target.model, small("llava", GQA))
    check_logits(specvlm, model, prompt_for(specvlm.target.model, images), monkeypatch, rounds=2)


def test_a_model_that_the_own_decoder_does_not_serve_drafts_through_hugging_face(specvlm, monkeypatch):
    """One whose attention's output has a bias, too; growth over transformers' code is not recorded."""
    for changes in (MHA, MHA | {"attention_bias": True}):
        draft = VLMDraft(small("llama", changes))
        assert draft.recording is None, "it is bound to none"
        draft.bind(specvlm.target)
        assert (draft.recording is None) == ("attention_bias" in changes)
    check_logits(specvlm, draft.model, prompt_for(specvlm.target.model), monkeypatch, rounds=2)


@torch.no_grad()
def check_logits(
    specvlm: SpecVLM,
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    rounds: int = 5,
) -> None:
    """Every node's logits in a few rounds, whose steps are of one token and of several; two have no tree."""
    plan, pauses = Plan(nodes=16, depth=4, width=3), frozenset({2, 3})
    draft, target = VLMDraft(model, Pausing(plan, pauses)), specvlm.target
    draft.bind(target)
    sampling = Sampling(1.0, 0, 1.0, torch.tensor([5]))
    truth = specvlm.generate(**inputs, temperature=1.0, seed=5, max_new_tokens=60).tokens
    state, prompt = target.prefill(inputs, sampling=sampling, limits=Limits(60), taps=None)
    state.first()
    logits, beams = recorded(draft, monkeypatch)
    session = draft.start(prompt, state)
    counts: list[int] = []
    for round_ in range(rounds):
        counts.append(int(state.step.count[0]))
        logits.clear()
        beams.clear()
        tree = session.propose(state)
        assert len(logits) == (0 if round_ in pauses else plan.depth)
        paths: list[list[int]] = [state.tokens[0]]
        for level in logits[:1]:
            torch.testing.assert_close(level[0, 0], plain_logits(model, inputs, paths[0]), atol=1e-4, rtol=1e-4)
        for beam, level in zip(beams, logits[1:], strict=True):
            rows = zip(beam.tokens[0].tolist(), beam.parent_rows[0].tolist(), strict=True)
            paths = [[*paths[parent], token] for token, parent in rows]
            for row, path in enumerate(paths):
                torch.testing.assert_close(level[0, row], plain_logits(model, inputs, path), atol=1e-4, rtol=1e-4)
        if not round_ % 2:  # a draft that knows makes the next chain longer than one token
            tree = known_chain(truth, len(state.tokens[0]), 2 + round_)
        scores = target.verify(tree, state)
        state.commit(tree, scores, sampling.accept(tree, scores.logits, state.kv_len))
    assert counts[1] == 3
    state.close()


@pytest.mark.parametrize("kind", ["llava", "qwen2"])
@pytest.mark.parametrize("plan", [Plan(1, 1, 1), Plan(6, 5, 1), Plan(128, 8, 18)], ids=str)
def test_answers_are_equal_with_trees_of_any_shape(specvlm, kind, plan):
    prompt = prompt_for(specvlm.target.model)
    draft = VLMDraft(small(kind, GQA), Eagle2(plan))
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}):
        expected = specvlm.generate(**prompt, **options, max_new_tokens=40).tokens
        for shared_noise in (True, False):
            draft.shared_noise = shared_noise
            assert specvlm.generate(**prompt, **options, max_new_tokens=40, draft=draft).tokens == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_target_as_its_own_draft_has_every_level_accepted(specvlm, next_specvlm, temperature):
    plan = Plan(nodes=6, depth=5, width=1)
    for model in (specvlm, next_specvlm):
        prompt = prompt_for(model.target.model)
        options = {"temperature": temperature, "max_new_tokens": 1 + 8 * (plan.depth + 1)}
        draft = VLMDraft(model.target.model, Eagle2(plan))
        answer = model.generate(**prompt, **options, draft=draft)
        assert draft.shares_tower
        assert answer.stats.tau == plan.depth + 1
        assert answer.tokens == model.generate(**prompt, **options).tokens


def test_prompts_of_one_token_and_of_a_picture_alone(specvlm):
    picture = prompt_for(specvlm.target.model)
    picture["input_ids"] = picture["input_ids"][picture["input_ids"] == IMAGE_TOKEN][None]
    del picture["attention_mask"]
    for inputs in ({"input_ids": torch.tensor([[9]])}, picture):
        expected = specvlm.generate(**inputs, max_new_tokens=20).tokens
        for kind in ("llava", "llama"):
            draft = VLMDraft(small(kind, MHA))
            assert specvlm.generate(**inputs, max_new_tokens=20, draft=draft).tokens == expected


@pytest.mark.parametrize("kind", ["llava", "llama"])
def test_answers_past_the_drafts_context(specvlm, kind):
    prompt = prompt_for(specvlm.target.model)
    draft = VLMDraft(small(kind, MHA | {"max_position_embeddings": 24}))
    expected = specvlm.generate(**prompt, max_new_tokens=40).tokens
    assert specvlm.generate(**prompt, max_new_tokens=40, draft=draft).tokens == expected


def test_image_tokens_are_never_proposed(specvlm, monkeypatch):
    draft = VLMDraft(small("llama", MHA))
    favoured = torch.zeros(VOCAB)
    favoured[IMAGE_TOKEN] = 1e4
    logits = draft.logits
    monkeypatch.setattr(draft, "logits", lambda hidden: logits(hidden) + favoured)
    seen = []
    select = Eagle2.select
    monkeypatch.setattr(Eagle2, "select", lambda *args: seen.append(select(*args)) or seen[-1])
    specvlm.generate(**prompt_for(specvlm.target.model), max_new_tokens=12, draft=draft)
    assert seen
    assert all((tree.tokens != IMAGE_TOKEN).all() for tree in seen)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_shared_tower_encodes_a_picture_once(specvlm, next_specvlm, family):
    model = {"llava": specvlm, "llava_next": next_specvlm}[family]
    prompt = prompt_for(model.target.model)
    same = VLMDraft(with_tower_of(model.target.model, small(family, MHA)))
    own = VLMDraft(small(family, MHA))
    calls: list[str] = []
    hooks = [
        each.model.vision_tower.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, each in (("target", model.target.model), ("same", same.model), ("own", own.model))
    ]
    for draft, expected in ((same, ["target"]), (own, ["target", "own"])):
        draft.bind(model.target)
        calls.clear()
        model.generate(**prompt, max_new_tokens=4, draft=draft)
        assert calls == expected
    for hook in hooks:
        hook.remove()


def test_a_tower_is_shared_when_all_of_it_is_equal(specvlm):
    def shares(change) -> bool:
        model = with_tower_of(specvlm.target.model, small("llava", MHA))
        change(model)
        draft = VLMDraft(model)
        draft.bind(specvlm.target)
        return draft.shares_tower

    assert shares(lambda model: None)
    assert shares(lambda model: setattr(model.config.vision_config, "dtype", torch.float16))
    assert not shares(lambda model: setattr(model.config, "vision_feature_layer", -2))
    assert not shares(lambda model: setattr(model.config.vision_config, "hidden_act", "gelu"))
    assert not shares(lambda model: next(model.model.vision_tower.parameters()).data.add_(1e-6))


def test_in_half_precision_the_rotary_frequencies_stay_exact():
    half = SpecVLM(tiny_llava().to(torch.bfloat16))
    draft = VLMDraft(with_tower_of(half.target.model, small("llava", MHA)))
    exact = draft.model.model.language_model.rotary_emb.inv_freq.clone()
    draft.bind(half.target)
    assert draft.shares_tower
    assert torch.equal(draft.model.model.language_model.rotary_emb.inv_freq, exact)
    assert {parameter.dtype for parameter in draft.model.parameters()} == {torch.bfloat16}
    prompt = prompt_for(half.target.model)
    assert len(half.generate(**prompt, max_new_tokens=8, draft=draft).tokens) == 8
    with pytest.raises(ValueError, match=r"vlm: expected a target on .*bfloat16.*, got one on .*float32"):
        draft.bind(SpecVLM(tiny_llava()).target)


def test_one_draft_serves_two_targets_in_turn(specvlm):
    other = SpecVLM(tiny_llava(seed=4))
    draft = VLMDraft(with_tower_of(specvlm.target.model, small("llava", MHA)))
    for each, shares in ((specvlm, True), (other, False), (specvlm, True)):
        prompt = prompt_for(each.target.model)
        expected = each.generate(**prompt, max_new_tokens=12).tokens
        assert each.generate(**prompt, max_new_tokens=12, draft=draft).tokens == expected
        assert draft.shares_tower is shares


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"vocab_size": 330}, "vlm vocab_size: expected at most the target's 320, got 330"),
        ("llava", {"vocab_size": 330}, "vlm vocab_size: expected at most the target's 320, got 330"),
        ("llava_next", {}, "vlm model_type: expected the target's llava, got llava_next"),
        ("llama", {"head_dim": 16}, "vlm head_dim: expected 32 to 128, got 16 in llama"),
        (
            "mistral",
            {"sliding_window": 64},
            "vlm sliding_window: expected none, or at least the context of 512, got 64",
        ),
    ],
)
def test_models_that_do_not_fit_the_target(specvlm, kind, changes, message):
    with pytest.raises(ValueError, match=message):
        VLMDraft(small(kind, MHA | changes)).bind(specvlm.target)


@pytest.mark.parametrize("kind", ["llava", "llama"])
def test_a_model_of_fewer_rows_proposes_what_it_knows(specvlm, kind, monkeypatch):
    trees = []
    select = Eagle2.select
    monkeypatch.setattr(Eagle2, "select", lambda *args: trees.append(select(*args)) or trees[-1])
    prompt = prompt_for(specvlm.target.model)
    draft = VLMDraft(small(kind, FEWER), Eagle2(Plan(nodes=32, depth=3, width=8)))
    for options in ({"temperature": 0.0}, {"temperature": 1.5}):
        expected = specvlm.generate(**prompt, **options, max_new_tokens=40).tokens
        assert max(expected) >= 200, "it is to read what it lacks"
        assert specvlm.generate(**prompt, **options, max_new_tokens=40, draft=draft).tokens == expected
    proposed = {token for tree in trees for token in tree.tokens[0, 1:][tree.parents[0, 1:] >= 0].tolist()}
    assert 150 < max(proposed) < 200
    with pytest.raises(ValueError, match="width: expected at most the 6 tokens of the vocabulary, got 7"):
        VLMDraft(small("llama", MHA | {"vocab_size": 6}), Eagle2(Plan(8, 2, 7))).bind(specvlm.target)


def test_a_draft_goes_from_a_larger_target_to_one_of_its_own_size(specvlm):
    draft, few = VLMDraft(small("llama", FEWER)), SpecVLM(tiny_llava(vocab_size=200))
    for target in (specvlm.target, few.target, specvlm.target):
        draft.bind(target)
        assert spread(draft, draft.logits(torch.randn(1, 2, MHA["hidden_size"]))).shape == (
            1,
            2,
            target.spec.vocab_size,
        )


def test_models_of_another_kind():
    config = OPTConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, ffn_dim=32)
    with pytest.raises(ValueError, match=r"vlm: expected one of Llava.*, Qwen2ForCausalLM, got OPTForCausalLM"):
        VLMDraft(OPTForCausalLM(config))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("image_token_id", 5, "vlm image_token_id: expected the target's 4, got 5"),
        ("image_size", 64, "vlm image_size: expected the target's 32, got 64"),
        ("patch_size", 16, "vlm image tokens a picture: expected the target's 16, got 4"),
        ("vision_feature_select_strategy", "full", "vlm image tokens a picture: expected the target's 16, got 17"),
    ],
)
def test_pictures_that_are_read_otherwise(specvlm, name, value, message):
    config = deepcopy(small("llava", MHA).config)
    setattr(config if hasattr(config, name) else config.vision_config, name, value)
    draft = VLMDraft(type(specvlm.target.model)(config))
    with pytest.raises(ValueError, match=message):
        draft.bind(specvlm.target)


def test_tiles_that_are_cut_otherwise(next_specvlm):
    model = small("llava_next", MHA)
    model.config.image_grid_pinpoints = [[32, 64]]
    with pytest.raises(ValueError, match=r"vlm image_grid_pinpoints: expected the target's \[\[32, 64\], .*\], got \["):
        VLMDraft(model).bind(next_specvlm.target)


def test_a_tree_wider_than_the_vocabulary():
    few = SpecVLM(tiny_llava(vocab_size=40))
    draft = VLMDraft(small("llama", MHA | {"vocab_size": 40}), Eagle2(Plan(nodes=64, depth=1, width=41)))
    with pytest.raises(ValueError, match="width: expected at most the 40 tokens of the vocabulary, got 41"):
        draft.bind(few.target)


def test_tokenizers_that_differ():
    processor = tiny_processor()
    specvlm = SpecVLM(tiny_llava(), processor=processor)
    same = VLMDraft(small("llama", MHA), tokenizer=tiny_processor().tokenizer)
    same.bind(specvlm.target)
    other = deepcopy(processor.tokenizer)
    state = json.loads(other.backend_tokenizer.to_str())
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    merged = {"".join(pair) for pair in merges}
    plain = [token for token in vocabulary if token not in merged and len(token) == 1]
    first, second = plain[3], plain[7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    other._tokenizer = type(other.backend_tokenizer).from_str(json.dumps(state))
    ids = sorted((vocabulary[first], vocabulary[second]))
    message = rf"vlm tokenizer: expected the target's tokens, got others at ids {ids[0]} \('.', the target's '.'\), "
    with pytest.raises(ValueError, match=message + rf"{ids[1]} \('.', the target's '.'\)$"):
        VLMDraft(small("llama", MHA), tokenizer=other).bind(specvlm.target)
    with pytest.raises(ValueError, match=message):
        VLMDraft(small("llama", MHA | {"vocab_size": ids[1] + 1}), tokenizer=other).bind(specvlm.target)
    VLMDraft(small("llama", MHA | {"vocab_size": ids[0]}), tokenizer=other).bind(specvlm.target)


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llama", "mistral", "qwen2"])
def test_a_saved_model_is_a_draft(specvlm, next_specvlm, kind, tmp_path):
    target = next_specvlm if kind == "llava_next" else specvlm
    model = small(kind, GQA)
    if kind.startswith("llava"):
        with_tower_of(target.target.model, model)
    model.save_pretrained(tmp_path)
    prompt = prompt_for(target.target.model) | {"max_new_tokens": 24}
    plain = target.generate(**prompt, draft=VLMDraft(model))
    loaded = load_draft(tmp_path)
    assert isinstance(loaded, VLMDraft)
    assert loaded.tokenizer is None
    again = target.generate(**prompt, draft=loaded)
    assert again.tokens == plain.tokens
    assert again.stats.accepted_histogram == plain.stats.accepted_histogram
    assert loaded.shares_tower is kind.startswith("llava")


def test_a_saved_tokenizer_comes_with_the_model(tmp_path):
    small("llama", MHA).save_pretrained(tmp_path)
    tiny_processor().tokenizer.save_pretrained(tmp_path)
    draft = VLMDraft.from_pretrained(tmp_path)
    assert draft.tokenizer.get_vocab() == tiny_processor().tokenizer.get_vocab()
    draft.bind(SpecVLM(tiny_llava(), processor=tiny_processor()).target)


def test_broken_folders(tmp_path):
    small("llama", MHA).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="draft: expected whole safetensors files in"):
        load_draft(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="draft: expected a model folder or hub id, got"):
        load_draft(tmp_path)
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"draft: expected every tensor in .*, got missing_keys \['model.layers.1"):
        load_draft(tmp_path)


def test_weights_that_move_or_get_a_hook_behind_the_first_answer_are_followed():
    specvlm = SpecVLM(tiny_llava())
    draft, seen = VLMDraft(tiny_lm()), []
    prompt = prompt_for(specvlm.target.model) | {"max_new_tokens": 8}
    specvlm.generate(**prompt, draft=draft)
    before = draft.recording
    layer = draft.model.model.layers[0]
    layer.mlp.down_proj.weight.data = torch.zeros_like(layer.mlp.down_proj.weight)
    draft.bind(specvlm.target)
    assert draft.recording not in (None, before)
    assert draft._decoder._layers[0].down.values.data_ptr() == layer.mlp.down_proj.weight.data_ptr()
    layer.register_forward_hook(lambda *args: seen.append(args))
    specvlm.generate(**prompt, draft=draft)
    assert seen
    assert draft.recording is None
