"""The EAGLE-3 head: its arithmetic against a straight line of torch, its taps, its vocabulary, its folder."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specvlm import SpecVLM
from specvlm.drafts import Eagle3Config, Eagle3Draft, Eagle3Head
from specvlm.policies import Eagle2
from specvlm.state import Limits, Sampling
from specvlm.targets.hf import HFTarget
from specvlm.tree import DraftTree, Plan
from tests.drafts.formula import attention, check_rounds, gated, layer_weights, rms_norm
from tests.fakes import IMAGE_TOKEN, VOCAB, prompt_for, tiny_llava

#: All but the image token, and some, none of them first or next to each other.
MOST = [token for token in range(VOCAB) if token != IMAGE_TOKEN]
SOME = [*range(7, 100, 5), *range(130, 320, 3)]


@pytest.fixture(scope="module")
def specvlm() -> SpecVLM:
    """A target of 6 layers, whose taps are the inputs of three different ones."""
    return SpecVLM(tiny_llava(num_hidden_layers=6, num_key_value_heads=2))


def random_head(specvlm: SpecVLM, vocabulary: list[int] = SOME, **changes: object) -> Eagle3Head:
    torch.manual_seed(1)
    config = Eagle3Config.for_target(specvlm.target.spec, intermediate_size=96, draft_vocab_size=len(vocabulary))
    head = Eagle3Head(replace(config, **changes))
    for norm in ("norm", "midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm"):
        torch.nn.init.normal_(head.get_submodule(norm).weight, mean=1, std=0.2)
    head.set_vocabulary(torch.tensor(vocabulary))
    return head


def random_draft(specvlm: SpecVLM, plan: Plan | None = None, **changes: object) -> Eagle3Draft:
    """A head of random weights, bound to the target."""
    draft = Eagle3Draft(random_head(specvlm, **changes), Eagle2(plan))
    draft.bind(specvlm.target)
    return draft


def straight_line(draft: Eagle3Draft, embeds: Tensor, hidden: Tensor) -> Tensor:
    """A head's outputs [T, H] for a chain of embeddings and fused features, or outputs, at positions 0 to T - 1."""
    layer, config = layer_weights(draft, "midlayer."), draft.head.config
    entering = torch.cat(
        [
            rms_norm(embeds, layer["input_layernorm.weight"], config),
            rms_norm(hidden, layer["hidden_norm.weight"], config),
        ],
        dim=-1,
    )
    x = hidden + attention(entering, layer, config)
    return x + gated(rms_norm(x, layer["post_attention_layernorm.weight"], config), layer)


def straight_logits(draft: Eagle3Draft, out: Tensor) -> Tensor:
    """Logits [V] of an output [H]."""
    w = draft.head.state_dict()
    own = w["lm_head.weight"] @ rms_norm(out, w["norm.weight"], draft.head.config)
    logits = torch.full((VOCAB,), -torch.inf)
    for row, logit in enumerate(own):
        logits[row + w["d2t"][row]] = logit
    return logits


@pytest.mark.parametrize("changes", [{}, {"vocabulary": MOST}, {"taps": (1, 5)}, {"rope_theta": 500.0}], ids=str)
@torch.no_grad()
def test_draft_logits_follow_the_formula_at_every_level(specvlm, changes, monkeypatch):
    plan = Plan(nodes=16, depth=4, width=3)
    draft = random_draft(specvlm, plan, **changes)
    fc = draft.head.state_dict()["fc.weight"]
    check_rounds(
        specvlm,
        draft,
        plan,
        monkeypatch,
        line=straight_line,
        fused=lambda features: features @ fc.T,
        logits_of=lambda out: straight_logits(draft, out),
    )


@torch.no_grad()
def test_features_are_the_inputs_of_the_tapped_layers_low_to_high(specvlm):
    target, draft = HFTarget(specvlm.target.model), random_draft(specvlm)
    assert draft.taps == (2, 3, 3)
    seen: dict[int, Tensor] = {}

    def keep(layer: int):
        return lambda module, args, kwargs: seen.__setitem__(layer, args[0] if args else kwargs["hidden_states"])

    hooks = [
        layer.register_forward_pre_hook(keep(i), with_kwargs=True)
        for i, layer in enumerate(target.model.model.language_model.layers)
    ]
    sampling = Sampling(0.0, 0, 1.0, torch.tensor([0]))
    for taps in (draft.taps, (0, 5)):
        state, prompt = target.prefill(prompt_for(target.model), sampling=sampling, limits=Limits(9), taps=taps)
        state.close()
        assert torch.equal(prompt.features, torch.cat([seen[tap] for tap in taps], dim=-1))
        state, own = specvlm.target.prefill(prompt_for(target.model), sampling=sampling, limits=Limits(9), taps=taps)
        state.close()
        torch.testing.assert_close(own.features, prompt.features, rtol=1e-4, atol=1e-5)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("layers", "taps"), [(32, (2, 16, 29)), (28, (2, 14, 25)), (6, (2, 3, 3)), (2, (0, 1, 1)), (1, (0, 0, 0))]
)
def test_the_layers_that_are_tapped(specvlm, layers, taps):
    spec = replace(specvlm.target.spec, num_layers=layers)
    assert Eagle3Config.for_target(spec, intermediate_size=96).taps == taps


def test_the_tensors_have_their_published_names_and_shapes(specvlm):
    width, inside, kv = 128, 4 * 32, 2 * 32
    layer = {
        "self_attn.q_proj": (inside, 2 * width),
        "self_attn.k_proj": (kv, 2 * width),
        "self_attn.v_proj": (kv, 2 * width),
        "self_attn.o_proj": (width, inside),
        "mlp.gate_proj": (96, width),
        "mlp.up_proj": (96, width),
        "mlp.down_proj": (width, 96),
        "hidden_norm": (width,),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    expected = {f"midlayer.{name}.weight": shape for name, shape in layer.items()}
    expected |= {"fc.weight": (width, 3 * width), "norm.weight": (width,), "lm_head.weight": (len(SOME), width)}
    expected |= {"d2t": (len(SOME),), "t2d": (VOCAB,)}
    tensors = random_head(specvlm).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize("vocabulary", [MOST, SOME], ids=["most", "some"])
@pytest.mark.parametrize("plan", [None, Plan(1, 1, 1), Plan(6, 5, 1), Plan(40, 4, 9)], ids=str)
def test_answers_are_equal_with_trees_of_any_shape(specvlm, plan, vocabulary):
    prompt = prompt_for(specvlm.target.model)
    draft = random_draft(specvlm, plan, vocabulary=vocabulary)
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}):
        expected = specvlm.generate(**prompt, **options, max_new_tokens=40).tokens
        for draft.shared_noise in (True, False):
            assert specvlm.generate(**prompt, **options, max_new_tokens=40, draft=draft).tokens == expected


def test_a_prompt_of_one_token(specvlm):
    inputs = {"input_ids": torch.tensor([[9]])}
    expected = specvlm.generate(**inputs, max_new_tokens=20).tokens
    assert specvlm.generate(**inputs, max_new_tokens=20, draft=random_draft(specvlm)).tokens == expected


def test_only_its_own_tokens_are_proposed(specvlm, monkeypatch):
    trees: list[DraftTree] = []
    select = Eagle2.select
    monkeypatch.setattr(Eagle2, "select", lambda *args: trees.append(select(*args)) or trees[-1])
    draft = random_draft(specvlm, Plan(nodes=30, depth=3, width=8))
    specvlm.generate(**prompt_for(specvlm.target.model), temperature=1.0, max_new_tokens=24, draft=draft)
    proposed = {token for tree in trees for token in tree.tokens[0, 1:][tree.parents[0, 1:] >= 0].tolist()}
    assert len(proposed) > 20
    assert proposed <= set(SOME)


def test_in_half_precision(specvlm):
    half = SpecVLM(tiny_llava(num_hidden_layers=3).to(torch.bfloat16))
    draft = random_draft(half)
    assert torch.equal(draft.head.rotary.inv_freq, Eagle3Head(draft.head.config).rotary.inv_freq)
    assert {parameter.dtype for parameter in draft.head.parameters()} == {torch.bfloat16}
    assert draft.head.vocabulary.tolist() == SOME
    prompt = prompt_for(half.target.model) | {"max_new_tokens": 12}
    prompt["pixel_values"] = prompt["pixel_values"].bfloat16()
    assert half.generate(**prompt, draft=draft).stats.rounds > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "eagle3 hidden_size: expected the target's 128, got 64"),
        ({"vocab_size": 330}, "eagle3 vocab_size: expected the target's 320, got 330"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of 4, got 3"),
        ({"head_dim": 33}, "head_dim: expected an even number, got 33"),
        ({"taps": (2, 3, 6)}, r"eagle3 taps: expected layers below 6, got \[2, 3, 6\]"),
        ({"taps": (3, 2)}, r"taps: expected layers from low to high, got \[3, 2\]"),
        ({"taps": (-1, 2)}, "taps: expected an integer >= 0, got -1"),
        ({"taps": ()}, r"taps: expected one layer or more, got \(\)"),
        ({"vocabulary": [3, 4, 5]}, r"eagle3 d2t: expected no image or video ids, got \[4\]"),
    ],
)
def test_heads_that_do_not_fit_the_target(specvlm, changes, message):
    with pytest.raises(ValueError, match=message):
        random_draft(specvlm, **changes)


@pytest.mark.parametrize(
    ("d2t", "t2d", "message"),
    [
        ([7, 7, VOCAB - 2], [7, 8], r"eagle3 d2t: expected tokens in \[0, 320\), got 320"),
        ([-1, 7, 7], [8, 9], r"eagle3 d2t: expected tokens in \[0, 320\), got -1"),
        ([7, 7, 7], [7, 8], "eagle3 t2d: expected 3 tokens, as many as in d2t, got 2"),
        ([7, 7, 7], [7, 8, 10], "eagle3 d2t: expected token 10 of t2d in row 2, got 9"),
        ([9, 7, 5], [7, 8, 9], "eagle3 d2t: expected token 7 of t2d in row 0, got 9"),
        ([7, 6, 7], [7, 8, 9], "eagle3 d2t: expected token 8 of t2d in row 1, got 7"),
    ],
)
def test_vocabularies_that_disagree(specvlm, d2t, t2d, message):
    head = random_head(specvlm, vocabulary=[7, 8, 9])
    head.d2t.copy_(torch.tensor(d2t))
    head.t2d.zero_()[t2d] = True
    with pytest.raises(ValueError, match=message):
        Eagle3Draft(head).bind(specvlm.target)


def test_a_tree_wider_than_what_the_head_can_propose(specvlm):
    with pytest.raises(ValueError, match="width: expected at most the 3 tokens that the head can propose, got 4"):
        random_draft(specvlm, Plan(nodes=8, depth=2, width=4), vocabulary=[7, 8, 9])


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
    again = Eagle3Draft.from_pretrained(folder).head
    assert again.config == random_head(specvlm).config
    assert all(
        torch.equal(again.state_dict()[name], value) for name, value in random_head(specvlm).state_dict().items()
    )
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_broken_folders(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["fc.weight"]
    tensors["d2t"] = tensors["d2t"][1:].clone()
    tensors["embed_tokens.weight"] = torch.zeros(2, 2)
    save_file(tensors, folder / "model.safetensors")
    expected = (
        r"draft: expected the tensors of its config in .*head, got missing fc.weight; unexpected embed_tokens.weight; "
        rf"misshapen d2t \(expected \[{len(SOME)}\], got \[{len(SOME) - 1}\]\)"
    )
    with pytest.raises(ValueError, match=expected):
        Eagle3Draft.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"taps": "low"}, "taps: expected one layer or more, got 'low'"),
        ({"taps": [1.5]}, r"config.json: taps: expected an integer, got 1.5"),
        ({"heads": 3}, r"config.json: expected fields among .*, got heads"),
        ({"draft_type": "eagle"}, 'draft_type: expected "eagle3" in'),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            Eagle3Draft.from_pretrained(folder)
    del config["taps"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: .*taps"):
        Eagle3Draft.from_pretrained(folder)
