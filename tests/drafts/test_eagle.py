"""The EAGLE head: its arithmetic against a straight line of torch, its tree in a lossless answer, its folder."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specvlm import SpecVLM
from specvlm.drafts import EagleConfig, EagleDraft, EagleHead
from specvlm.drafts import eagle as eagle_module
from specvlm.state import Limits, Sampling
from specvlm.tree import Beam, Growth, Plan
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
    draft = EagleDraft(EagleHead(replace(config, **reduced | changes)), plan)
    if vocabulary is not None:
        draft.head.vocabulary.copy_(torch.tensor(vocabulary))
    draft.bind(specvlm.target)
    return draft


def straight_line(draft: EagleDraft, embeds: Tensor, features: Tensor) -> Tensor:
    """A head's outputs [T, H] for a chain of pairs at rotary positions 0 to T - 1, each seeing those before it."""
    w, config = draft.head.state_dict(), draft.head.config
    length, heads, kv_heads, dim = len(embeds), config.num_attention_heads, config.num_key_value_heads, config.head_dim
    x = torch.cat([embeds, features], dim=-1) @ w["fc.weight"].T
    if config.bias:
        x = x + w["fc.bias"]

    def norm(values: Tensor, name: str) -> Tensor:
        scale = w[f"layers.0.{name}.weight"]
        return values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * scale

    entering = norm(x, "input_layernorm") if config.input_layernorm else x
    angle = torch.arange(length)[:, None] / config.rope_theta ** (torch.arange(0, dim, 2) / dim)  # [T, D/2]

    def rotated(values: Tensor) -> Tensor:
        first, second = values.chunk(2, dim=-1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def heads_of(name: str, count: int) -> Tensor:
        return (entering @ w[f"layers.0.self_attn.{name}.weight"].T).view(length, count, dim)

    q, k, v = rotated(heads_of("q_proj", heads)), rotated(heads_of("k_proj", kv_heads)), heads_of("v_proj", kv_heads)
    k, v = (each.repeat_interleave(heads // kv_heads, dim=1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / dim**0.5
    later = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
    p = scores.masked_fill(later, -torch.inf).softmax(-1)
    x = x + torch.einsum("hqk,khd->qhd", p, v).reshape(length, -1) @ w["layers.0.self_attn.o_proj.weight"].T
    y = norm(x, "post_attention_layernorm")
    gate = torch.nn.functional.silu(y @ w["layers.0.mlp.gate_proj.weight"].T)
    return x + (gate * (y @ w["layers.0.mlp.up_proj.weight"].T)) @ w["layers.0.mlp.down_proj.weight"].T


@pytest.mark.parametrize("changes", [{}, {"input_layernorm": True}, {"bias": False}, {"rope_theta": 500.0}], ids=str)
@torch.no_grad()
def test_draft_logits_follow_the_formula_at_every_level(specvlm, changes, monkeypatch):
    plan = Plan(nodes=16, depth=4, width=3)
    draft = random_draft(specvlm, plan, **changes)
    target = specvlm.target
    prompt_inputs = prompt_for(target.model)
    sampling = Sampling(1.0, 0, 1.0, torch.tensor([5]))
    state, prompt = target.prefill(prompt_inputs, sampling=sampling, limits=Limits(60), taps=None)
    state.first()
    session = draft.start(prompt, state)
    logits: list[Tensor] = []
    beams: list[Beam] = []
    draft_logits, grow_beam = draft.logits, Growth.beam
    monkeypatch.setattr(draft, "logits", lambda hidden: logits.append(draft_logits(hidden)) or logits[-1])
    monkeypatch.setattr(Growth, "beam", lambda growth: beams.append(grow_beam(growth)) or beams[-1])

    # A chain of everything said so far, whose pairs are true: feature i with the embedding of token i + 1.
    embeds, features = [prompt.embeds[0, 1:]], [prompt.features[0, :-1]]
    for _ in range(6):
        count = int(state.step.count[0])
        embeds.append(target.embed(state.step.tokens[0, :count]))
        features.append(state.step.features[0, :count])
        logits.clear()
        beams.clear()
        tree = session.propose(state)
        assert len(logits) == plan.depth
        chain = torch.cat(embeds), torch.cat(features)
        out = straight_line(draft, *chain)
        torch.testing.assert_close(logits[0][0, 0], target.head(out[-1]), atol=1e-5, rtol=1e-5)
        check_levels(draft, chain, out[-1], beams, logits)
        accepted = sampling.accept(tree, target.verify(tree, state).logits, state.kv_len)
        state.commit(tree, target.verify(tree, state), accepted)


def check_levels(draft: EagleDraft, chain: tuple[Tensor, Tensor], at_root: Tensor, beams: list, logits: list) -> None:
    """Every node's logits: the chain, then the path to the node, whose features are its parents' outputs."""
    paths: list[tuple[list[Tensor], list[Tensor]]] = [([], [at_root])]
    for beam, level in zip(beams, logits[1:], strict=True):
        grown = []
        for row, (token, parent) in enumerate(zip(beam.tokens[0], beam.parent_rows[0].tolist(), strict=True)):
            tokens, outputs = paths[parent]
            tokens = [*tokens, token]
            path = draft.target.embed(torch.stack(tokens)), torch.stack(outputs)
            out = straight_line(draft, *(torch.cat(pair) for pair in zip(chain, path, strict=True)))[-1]
            torch.testing.assert_close(level[0, row], draft.target.head(out), atol=1e-5, rtol=1e-5)
            grown.append((tokens, [*outputs, out]))
        paths = grown


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
    rerank = eagle_module.rerank
    monkeypatch.setattr(eagle_module, "rerank", lambda *args: seen.append(rerank(*args)) or seen[-1])
    specvlm.generate(**prompt_for(specvlm.target.model), max_new_tokens=12, draft=draft)
    assert seen
    assert all((tree.tokens != IMAGE_TOKEN).all() for tree in seen)


def test_a_reduced_vocabulary_proposes_only_what_it_holds(specvlm, monkeypatch):
    draft = random_draft(specvlm, vocabulary=list(range(100, 180, 2)))
    seen = []
    rerank = eagle_module.rerank
    monkeypatch.setattr(eagle_module, "rerank", lambda *args: seen.append(rerank(*args)) or seen[-1])
    prompt = prompt_for(specvlm.target.model)
    expected = specvlm.generate(**prompt, max_new_tokens=24, temperature=1.0).tokens
    assert specvlm.generate(**prompt, max_new_tokens=24, temperature=1.0, draft=draft).tokens == expected
    assert all(token in range(100, 180, 2) for tree in seen for token in tree.tokens[0, 1:][tree.parents[0, 1:] >= 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "eagle hidden_size: expected the target's 128, got 64"),
        ({"vocab_size": 300}, "eagle vocab_size: expected the target's 320, got 300"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of 4, got 3"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected an integer >= 1, got 0"),
        ({"head_dim": 256}, "head_dim: expected an integer from 32 to 128, got 256"),
        ({"draft_vocab_size": 321}, "draft_vocab_size: expected an integer from 1 to 320, got 321"),
        ({"draft_vocab_size": 8}, r"eagle vocabulary: expected no image or video ids, got \[4\]"),
    ],
)
def test_heads_that_do_not_fit_the_target(specvlm, changes, message):
    with pytest.raises(ValueError, match=message):
        random_draft(specvlm, **changes)


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
    assert [path.name for path in folder.parent.iterdir()] == ["head"], "saving left something behind"
    EagleDraft.from_pretrained(folder).save_pretrained(folder)
    assert EagleDraft.from_pretrained(folder).head.config == random_draft(specvlm).head.config


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
