"""The block draft: its arithmetic against a straight line of torch, what does not fit, its folder."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specvlm import SpecVLM
from specvlm.drafts import BlockConfig, BlockDraft, BlockHead, Eagle3Config, Eagle3Draft, Eagle3Head, VLMDraft
from specvlm.drafts.block import BestFirst
from specvlm.policies import Eagle2, TreePolicy
from specvlm.state import DecodeState, Limits, Sampling, SlabPool, Step
from specvlm.tree import Plan
from tests.drafts.formula import Pausing, gated, known_chain, layer_weights, recorded, rms_norm, rotated
from tests.fakes import prompt_for, tiny_llava, tiny_lm


@pytest.fixture(scope="module")
def specvlm() -> SpecVLM:
    """A target of 6 layers, three of which are tapped."""
    return SpecVLM(tiny_llava(num_hidden_layers=6, num_key_value_heads=2))


def random_head(specvlm: SpecVLM, **changes: object) -> BlockHead:
    """Random weights, none of them at a value that hides a mistake."""
    torch.manual_seed(1)
    config = BlockConfig.for_target(specvlm.target.spec, intermediate_size=96, block_size=6, num_hidden_layers=3)
    head = BlockHead(replace(config, **changes))
    for name, weight in head.named_parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, mean=0 if name == "mask_embedding" else 1, std=0.2)
    return head


def random_draft(specvlm: SpecVLM, policy: TreePolicy | None = None, **changes: object) -> BlockDraft:
    """A draft of random weights, bound to the target."""
    draft = BlockDraft(random_head(specvlm, **changes), policy)
    draft.bind(specvlm.target)
    return draft


def straight_logits(draft: BlockDraft, features: Tensor, root: Tensor) -> Tensor:
    """Logits [block_size - 1, V] behind a root [H] that stands behind the target's features [p, F]."""
    w, config, before = draft.head.state_dict(), draft.head.config, len(features)
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    context = rms_norm(features @ w["fc.weight"].T, w["hidden_norm.weight"], config)
    x = torch.stack([root, *[w["mask_embedding"]] * (config.block_size - 1)])
    positions = torch.arange(before + config.block_size)
    for number in range(config.num_hidden_layers):
        of = layer_weights(draft, f"layers.{number}.")
        h = rms_norm(x, of["input_layernorm.weight"], config)
        rows = torch.cat([context, h])
        q = (h @ of["self_attn.q_proj.weight"].T).view(-1, heads, dim)
        k = (rows @ of["self_attn.k_proj.weight"].T).view(-1, kv_heads, dim)
        v = (rows @ of["self_attn.v_proj.weight"].T).view(-1, kv_heads, dim)
        q = rotated(rms_norm(q, of["self_attn.q_norm.weight"], config), positions[before:], config)
        k = rotated(rms_norm(k, of["self_attn.k_norm.weight"], config), positions, config)
        k, v = (each.repeat_interleave(heads // kv_heads, dim=1) for each in (k, v))
        p = (torch.einsum("qhd,khd->hqk", q, k) / dim**0.5).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", p, v).reshape(len(x), -1) @ of["self_attn.o_proj.weight"].T
        x = x + gated(rms_norm(x, of["post_attention_layernorm.weight"], config), of)
    return rms_norm(x, w["norm.weight"], config)[1:] @ draft.target.model.lm_head.weight.T


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"taps": (1, 5)},
        {"block_size": 2},
        {"block_size": 64},
        {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 48},
    ],
    ids=str,
)
@torch.no_grad()
def test_logits_follow_the_formula_round_after_round(specvlm, changes, monkeypatch):
    """Every other round accepts several tokens, and some have no tree: what was missed then is read later."""
    target, pauses = specvlm.target, frozenset({2, 3, 4, 7, 8})
    draft = random_draft(specvlm, Pausing(Plan(nodes=16, depth=5, width=3), pauses), **changes)
    inputs = prompt_for(target.model)
    sampling = Sampling(1.0, 0, 1.0, torch.tensor([5]))
    truth = specvlm.generate(**inputs, temperature=1.0, seed=5, max_new_tokens=60).tokens
    state, prompt = target.prefill(inputs, sampling=sampling, limits=Limits(60), taps=draft.taps)
    state.first()
    logits, _ = recorded(draft, monkeypatch)
    session = draft.start(prompt, state)
    features, counts = [prompt.features[0, :-1]], []
    for round_ in range(10):
        counts.append(int(state.step.count[0]))
        features.append(state.step.features[0, : counts[-1]])
        logits.clear()
        tree = session.propose(state)
        assert len(logits) == (round_ not in pauses)
        for found in logits:
            expected = straight_logits(draft, torch.cat(features), target.embed(state.root)[0])
            torch.testing.assert_close(found[0], expected[:5], atol=1e-5, rtol=1e-5)
        if round_ % 2:
            tree = known_chain(truth, len(state.tokens[0]), 1 + round_)
        scores = target.verify(tree, state)
        state.commit(tree, scores, sampling.accept(tree, scores.logits, state.kv_len))
    assert max(counts) >= 5
    state.close()


@torch.no_grad()
def test_a_batch_whose_prompts_go_on_at_different_paces(specvlm, monkeypatch):
    draft, length = random_draft(specvlm, Eagle2(Plan(8, 3, 2))), 24  # the pictures stand before that
    inputs = [prompt_for(specvlm.target.model, seed=seed) for seed in (0, 1)]
    both = {name: torch.cat([each[name] for each in inputs]) for name in ("input_ids", "pixel_values")}
    taught, _ = specvlm.target.teach(both, draft.taps)
    ids, features = taught.input_ids, taught.features
    state = DecodeState(
        slab=torch.empty(1, 2, 2, 1, 256, 32),
        kv_len=torch.full((2,), length, dtype=torch.int32),
        sampling=Sampling(0.0, 0, 1.0, torch.tensor([3, 4])),
        limits=Limits(60),
        step=Step(ids[:, length : length + 1], features[:, length - 1 : length], torch.ones(2, dtype=torch.int32)),
        taps=draft.taps,
        prompt_ids=ids[:, :length].tolist(),
        pool=SlabPool(1, 1, 32, torch.float32, torch.device("cpu")),
    )
    state.tokens = [[0], [0]]
    logits, _ = recorded(draft, monkeypatch)
    session = draft.start(replace(taught, features=features[:, :length]), state)
    first = session.propose(state)
    state.step = Step(
        ids[:, length + 1 : length + 4], features[:, length : length + 3], torch.tensor([3, 1], dtype=torch.int32)
    )
    state.kv_len = state.kv_len + state.step.count
    second = session.propose(state)
    for found, tree, ends in ((logits[0], first, (length, length)), (logits[1], second, (length + 3, length + 1))):
        for row, end in enumerate(ends):
            expected = straight_logits(draft, features[row, :end], taught.embeds[row, end])[:3]
            torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)
            assert tree.tokens[row, 0] == ids[row, end]


@pytest.mark.parametrize(
    ("layers", "taps"),
    [
        (36, (2, 10, 18, 26, 34)),
        (32, (2, 9, 16, 23, 30)),
        (8, (2, 3, 4, 5, 6)),
        (6, (2, 3, 4)),
        (4, (2,)),
        (3, (1, 2)),
        (2, (1,)),
        (1, (0,)),
    ],
)
def test_the_layers_that_are_tapped(specvlm, layers, taps):
    """Five outputs, `round(linspace(1, L - 3, 5))`, each the next layer's input."""
    spec = replace(specvlm.target.spec, num_layers=layers)
    assert BlockConfig.for_target(spec, intermediate_size=96).taps == taps
    assert BlockConfig.for_target(spec, intermediate_size=96, taps=[0]).taps == (0,)


def test_the_tensors_have_their_published_names_and_shapes(specvlm):
    width, inside, kv, taps = 128, 4 * 32, 2 * 32, 3
    layer = {
        "self_attn.q_proj": (inside, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, inside),
        "self_attn.q_norm": (32,),
        "self_attn.k_norm": (32,),
        "mlp.gate_proj": (96, width),
        "mlp.up_proj": (96, width),
        "mlp.down_proj": (width, 96),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    expected = {f"layers.{i}.{name}.weight": shape for i in range(3) for name, shape in layer.items()}
    expected |= {"fc.weight": (width, taps * width), "hidden_norm.weight": (width,), "norm.weight": (width,)}
    expected |= {"mask_embedding": (width,)}
    assert {name: tuple(tensor.shape) for name, tensor in random_head(specvlm).state_dict().items()} == expected


def test_a_round_without_a_tree_costs_the_draft_nothing(specvlm, monkeypatch):
    draft = random_draft(specvlm, Eagle2(Plan(1, 1, 1)))
    calls: list[str] = []
    for name in ("context", "forward"):
        inner = getattr(draft, name)
        monkeypatch.setattr(draft, name, lambda *args, name=name, inner=inner: calls.append(name) or inner(*args))
    specvlm.generate(**prompt_for(specvlm.target.model), max_new_tokens=12, draft=draft)
    assert calls == ["context"]  # the prompt's


def test_a_prompt_of_one_token(specvlm):
    inputs = {"input_ids": torch.tensor([[9]])}
    expected = specvlm.generate(**inputs, max_new_tokens=20).tokens
    assert specvlm.generate(**inputs, max_new_tokens=20, draft=random_draft(specvlm)).tokens == expected


def test_positions_past_the_context_are_its_last(monkeypatch):
    short = SpecVLM(tiny_llava(max_position_embeddings=60))
    draft = random_draft(short, block_size=9)
    seen: list[Tensor] = []
    forward = draft.head.forward
    monkeypatch.setattr(draft.head, "forward", lambda *args, **kwargs: seen.append(args[1]) or forward(*args, **kwargs))
    prompt = prompt_for(short.target.model)
    room = 60 - prompt["input_ids"].shape[1]
    expected = short.generate(**prompt, max_new_tokens=room).tokens
    assert short.generate(**prompt, max_new_tokens=room, draft=draft).tokens == expected
    assert torch.cat(seen).max() == 59
    assert (seen[-1] == 59).sum() > 1


def test_in_half_precision():
    half = SpecVLM(tiny_llava(num_hidden_layers=3).to(torch.bfloat16))
    draft = random_draft(half)
    assert torch.equal(draft.head.rotary.inv_freq, random_head(half).rotary.inv_freq)
    assert {parameter.dtype for parameter in draft.head.parameters()} == {torch.bfloat16}
    prompt = prompt_for(half.target.model) | {"max_new_tokens": 12}
    prompt["pixel_values"] = prompt["pixel_values"].bfloat16()
    assert half.generate(**prompt, draft=draft).stats.rounds > 0


@pytest.mark.gpu
@torch.inference_mode()
def test_a_proposal_waits_for_nothing_on_a_gpu():
    specvlm = SpecVLM(tiny_llava(num_hidden_layers=3).cuda())
    draft = random_draft(specvlm)
    inputs = {name: value.cuda() for name, value in prompt_for(specvlm.target.model).items()}
    sampling = Sampling(1.0, 0, 1.0, torch.tensor([5], device="cuda"))
    state, prompt = specvlm.target.prefill(inputs, sampling=sampling, limits=Limits(20), taps=draft.taps)
    state.first()
    session = draft.start(prompt, state)
    session.propose(state)  # kernels are compiled, and what is remembered by shape is made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        session.propose(state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    state.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "block hidden_size: expected the target's 128, got 64"),
        ({"vocab_size": 330}, "block vocab_size: expected the target's 320, got 330"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of 4, got 3"),
        ({"head_dim": 33}, "head_dim: expected an even number, got 33"),
        ({"head_dim": 16}, "head_dim: expected an integer from 32 to 128, got 16"),
        ({"block_size": 1}, "block_size: expected an integer from 2 to 64, got 1"),
        ({"block_size": 65}, "block_size: expected an integer from 2 to 64, got 65"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected an integer from 1 to 32, got 0"),
        ({"num_hidden_layers": 33}, "num_hidden_layers: expected an integer from 1 to 32, got 33"),
        ({"taps": (2, 3, 6)}, r"block taps: expected layers below 6, got \[2, 3, 6\]"),
        ({"taps": (3, 2)}, r"taps: expected layers from low to high, got \[3, 2\]"),
        ({"taps": (-1, 2)}, "taps: expected an integer >= 0, got -1"),
        ({"taps": ()}, r"taps: expected one layer or more, got \(\)"),
    ],
)
def test_heads_that_do_not_fit_the_target(specvlm, changes, message):
    with pytest.raises(ValueError, match=message):
        random_draft(specvlm, **changes)


def test_a_target_elsewhere(specvlm):
    draft = random_draft(specvlm)
    half = SpecVLM(tiny_llava(num_hidden_layers=6).to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"block: expected a target on .*float32.*, got one on .*bfloat16"):
        draft.bind(half.target)


@pytest.mark.parametrize("nodes", [1, 66])
def test_best_first_trees_out_of_range(nodes):
    with pytest.raises(ValueError, match=f"nodes: expected an integer from 2 to 65, got {nodes}"):
        BestFirst(nodes)


def test_a_tree_wider_than_the_vocabulary():
    few = SpecVLM(tiny_llava(vocab_size=40))
    with pytest.raises(ValueError, match="width: expected at most the 40 tokens that the head can propose, got 63"):
        random_draft(few, BestFirst(64))


def test_best_first_trees_are_for_block_drafts(specvlm):
    spec = specvlm.target.spec
    message = "policy: expected one whose levels a draft's KV has room for, got BestFirst, which is for block drafts"
    for draft in (
        Eagle3Draft(Eagle3Head(Eagle3Config.for_target(spec, intermediate_size=64)), BestFirst()),
        VLMDraft(tiny_lm(num_hidden_layers=1), BestFirst()),
    ):
        with pytest.raises(ValueError, match=message):
            draft.bind(specvlm.target)


@pytest.fixture
def folder(specvlm, tmp_path):
    random_draft(specvlm).save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def test_a_saved_draft_comes_back(specvlm, folder):
    prompt = prompt_for(specvlm.target.model)
    plain = specvlm.generate(**prompt, max_new_tokens=12, draft=random_draft(specvlm))
    loaded = specvlm.generate(**prompt, max_new_tokens=12, draft=folder)
    assert loaded.tokens == plain.tokens
    assert loaded.stats.accepted_histogram == plain.stats.accepted_histogram
    again, head = BlockDraft.from_pretrained(folder).head, random_head(specvlm)
    assert again.config == head.config
    assert all(torch.equal(again.state_dict()[name], value) for name, value in head.state_dict().items())


def test_broken_folders(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["fc.weight"]
    tensors["mask_embedding"] = tensors["mask_embedding"][1:].clone()
    tensors["lm_head.weight"] = torch.zeros(2, 2)
    save_file(tensors, folder / "model.safetensors")
    expected = (
        r"draft: expected the tensors of its config in .*head, got missing fc.weight; unexpected lm_head.weight; "
        r"misshapen mask_embedding \(expected \[128\], got \[127\]\)"
    )
    with pytest.raises(ValueError, match=expected):
        BlockDraft.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"taps": "low"}, "taps: expected one layer or more, got 'low'"),
        ({"block_size": 1.5}, r"config.json: block_size: expected an integer, got 1.5"),
        ({"mask_token_id": 3}, r"config.json: expected fields among .*, got mask_token_id"),
        ({"draft_type": "eagle"}, 'draft_type: expected "block" in'),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            BlockDraft.from_pretrained(folder)
