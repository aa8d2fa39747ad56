"""The own decoder: Hugging Face's states and answers, from weights that are held once."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from specvlm import SpecVLM, load
from specvlm.graphs import PLAIN_DESK
from specvlm.targets import llama
from specvlm.targets.hf import HFTarget
from specvlm.targets.llama import LlamaTarget, target_for
from specvlm.targets.llama_layers import Weight, fused, rotary_tables, through
from specvlm_kernels import pack_ancestors
from tests.fakes import ScriptedDraft, prompt_for, tiny_llava, tiny_processor

#: Every static kind of rotation.
ROPES = {
    "default": {"rope_theta": 1e4},
    "linear": {"rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def weights(language: nn.Module) -> list[tuple[torch.Tensor, ...]]:
    """The parameters of each fused tensor, layer by layer."""
    layers = []
    for layer in language.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layers.append(tuple(linear.weight for linear in (attention.q_proj, attention.k_proj, attention.v_proj)))
        layers.append((mlp.gate_proj.weight, mlp.up_proj.weight))
    return layers


@pytest.mark.parametrize("rope", ROPES)
def test_every_static_rotation_is_hugging_faces(rope):
    model = tiny_llava(rope_parameters={"rope_type": rope} | ROPES[rope])
    prompt, target = prompt_for(model), target_for(model)
    assert type(target) is LlamaTarget
    expected = model.generate(**prompt, do_sample=False, max_new_tokens=100)
    assert torch.equal(SpecVLM.from_target(target).generate(**prompt, max_new_tokens=100).sequences, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("language", "kv_heads"), [("llama", 4), ("mistral", 2), ("qwen2", 1)])
def test_states_are_hugging_faces(language, kv_heads, dtype):
    target = LlamaTarget(tiny_llava(language=language, num_key_value_heads=kv_heads).to(dtype))
    assert target._disagreement() < (1e-6 if dtype == torch.float64 else 1.5e-2), "Hugging Face norms in fp32 at most"


@pytest.mark.parametrize("taps", [(0,), (0, 1), (1, 1)], ids=str)
def test_features_are_the_inputs_of_the_layers_tapped(taps):
    model = tiny_llava(num_hidden_layers=2)
    own, theirs, prompt = LlamaTarget(model), HFTarget(model), prompt_for(model)
    for target in (own, theirs):
        target.seen = target._merge(prompt["input_ids"], prompt, PLAIN_DESK)[0]
    step = llama.AttentionStep(torch.zeros(1, dtype=torch.int32), None)
    positions = torch.arange(own.seen.shape[1], dtype=torch.int32)[None]
    with torch.no_grad():
        slabs = [own._pool.borrow(1, 256), own._pool.borrow(1, 256)]
        (_, got), (_, expected) = (
            target._forward(target.seen, positions, slab.zero_(), step, taps)
            for target, slab in zip((own, theirs), slabs, strict=True)
        )
    assert got.shape[-1] == len(taps) * own.spec.hidden_size
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slabs[0], slabs[1], rtol=1e-4, atol=1e-5)


def test_weights_are_held_once_and_a_second_time_move_no_more():
    model = tiny_llava(language="qwen2", num_key_value_heads=2)
    before = [[one.clone() for one in parameters] for parameters in weights(model.model.language_model)]
    target = LlamaTarget(model)
    for parameters, values in zip(weights(model.model.language_model), before, strict=True):
        assert len({one.untyped_storage().data_ptr() for one in parameters}) == 1
        assert parameters[0].untyped_storage().nbytes() == sum(one.nbytes for one in parameters)
        for one, value in zip(parameters, values, strict=True):
            assert torch.equal(one, value)
    again = LlamaTarget(model)
    for one, other in zip(target._decoder._layers, again._decoder._layers, strict=True):
        assert one.qkv.values.data_ptr() == other.qkv.values.data_ptr() == one.qkv.values.untyped_storage().data_ptr()
        assert one.qkv_bias.data_ptr() == other.qkv_bias.data_ptr()
        assert one.gate_up.values.data_ptr() == other.gate_up.values.data_ptr()
        assert torch.equal(one.gate_up.values, other.gate_up.values)


def test_what_is_written_to_the_models_weights_counts():
    model = tiny_llava()
    prompt, target = prompt_for(model), LlamaTarget(model)
    model.load_state_dict(tiny_llava(seed=7).state_dict())
    expected = model.generate(**prompt, do_sample=False, max_new_tokens=20)
    assert torch.equal(SpecVLM.from_target(target).generate(**prompt, max_new_tokens=20).sequences, expected)


def test_parameters_apart_are_not_taken_for_neighbours():
    whole = torch.arange(24.0).view(6, 4)
    order = [nn.Parameter(whole[2:4]), nn.Parameter(whole[:2])]
    assert torch.equal(fused(order), torch.cat([whole[2:4], whole[:2]]))
    gap = [nn.Parameter(whole[:2]), nn.Parameter(whole[4:])]
    assert torch.equal(fused(gap), torch.cat([whole[:2], whole[4:]]))
    every_other = [nn.Parameter(whole[:, ::2][:3]), nn.Parameter(whole[:, ::2][3:])]
    assert torch.equal(fused(every_other), whole[:, ::2])
    neighbours = [nn.Parameter(whole[1:3]), nn.Parameter(whole[3:6])]
    assert fused(neighbours).data_ptr() == whole[1:].data_ptr()


def test_a_model_is_saved_whole(tmp_path):
    model = tiny_llava()
    expected = {name: one.clone() for name, one in model.state_dict().items()}
    LlamaTarget(model)
    model.save_pretrained(tmp_path)
    read = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype="auto").state_dict()
    assert read.keys() == expected.keys()
    for name, one in expected.items():
        assert torch.equal(read[name], one), name
    size = sum(one.nbytes for one in expected.values())
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 1.1 * size


def test_loading_says_which_target_it_took_and_why(tmp_path):
    model = tiny_llava()
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    own = load(tmp_path, device="cpu").target
    assert type(own) is LlamaTarget
    assert repr(own).startswith("LlamaTarget(llava of llama, torch.float32 on cpu; own decoder: its states differ from")
    model.config.text_config.hidden_act = "gelu"
    model.save_pretrained(tmp_path)
    other = load(tmp_path, device="cpu").target
    assert type(other) is HFTarget
    assert repr(other).endswith("own decoder: hidden_act: expected silu, got gelu)")


class Subclassed(llama.LlamaDecoderLayer):
    """A layer that may compute anything."""


def adapted(language):
    language.layers[1].mlp.up_proj = nn.Sequential(language.layers[1].mlp.up_proj)


def subclassed(language):
    language.layers[0].__class__ = Subclassed


def hooked(language):
    language.layers[1].self_attn.register_forward_hook(lambda *args: None)


def replaced(language):
    language.layers[0].forward = language.layers[0].forward


def biased(language):
    language.layers[0].self_attn.o_proj.bias = nn.Parameter(torch.ones(128))


def biased_in_part(language):
    language.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.ones(128))


def of_two_dtypes(language):
    language.norm.double()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (adapted, "projections: expected Linear, got Sequential"),
        (subclassed, "layers: expected LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, got Subclassed"),
        (hooked, "hooks: expected none, got one on layers.1.self_attn"),
        (replaced, "hooks: expected none, got one on layers.0"),
        (biased, "bias: expected none but of q, k and v, got one"),
        (biased_in_part, "bias: expected one for each of q, k and v, or none, got some"),
        (of_two_dtypes, "weights: expected all in torch.float32 on cpu, got norm.weight in torch.float64 on cpu"),
    ],
)
def test_what_the_own_decoder_does_not_serve_goes_to_hugging_face(change, message):
    model = tiny_llava()
    with torch.no_grad():
        change(model.model.language_model)
    assert llama.why_not(model.model.language_model) == message


def test_a_model_that_was_asked_for_hidden_states_is_served():
    """Transformers then leaves hooks of its own in the layers."""
    model = tiny_llava()
    with torch.no_grad():
        model(**prompt_for(model), output_hidden_states=True)
    assert any(layer._forward_hooks for layer in model.model.language_model.layers)
    assert type(target_for(model)) is LlamaTarget


def test_a_model_with_biases_answers_through_hugging_face():
    model = tiny_llava(attention_bias=True)
    prompt, specvlm = prompt_for(model), SpecVLM(model)
    assert type(specvlm.target) is HFTarget
    assert specvlm.target.why == "own decoder: bias: expected none but of q, k and v, got one"
    expected = model.generate(**prompt, do_sample=False, max_new_tokens=20)
    assert torch.equal(specvlm.generate(**prompt, max_new_tokens=20).sequences, expected)


def test_rotations_that_are_no_table_of_halves_are_refused(monkeypatch):
    model = tiny_llava()
    rotary = model.model.language_model.rotary_emb
    turned = rotary.forward
    growing = torch.arange(32)
    monkeypatch.setattr(type(rotary), "forward", lambda self, x, ids: tuple(growing * t for t in turned(x, ids)))
    with pytest.raises(ValueError, match=r"own decoder: expected rotations of a head's 32 elements .* \[1, 512, 32\]"):
        rotary_tables(rotary, 512, 32)


def wrong_angles(decoder):
    cos, sin = decoder.tables = [table.roll(1, 0) for table in decoder.tables]
    cos[5:], sin[5:] = cos[4:-1].clone(), sin[4:-1].clone()


def wrong_eps(decoder):
    decoder._eps = 0.5


def wrong_eps_inside(decoder):
    decoder._layers = [replace(layer, eps=0.5) for layer in decoder._layers]


def wrong_scale(decoder):
    decoder._layers = [replace(layer, scaling=1.5 * layer.scaling) for layer in decoder._layers]


def wrong_norm(decoder):
    decoder._norm = decoder._norm + 0.2


def turned_gate(decoder):
    decoder._layers = [replace(one, gate_up=Weight(one.gate_up.values.roll(160, 0))) for one in decoder._layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spoil", [wrong_angles, wrong_eps, wrong_eps_inside, wrong_scale, wrong_norm, turned_gate])
def test_a_decoder_that_disagrees_is_not_taken(monkeypatch, spoil, dtype):
    made = llama.LlamaDecoder

    def spoiled(language):
        decoder = made(language)
        spoil(decoder)
        return decoder

    monkeypatch.setattr(llama, "LlamaDecoder", spoiled)
    target = target_for(tiny_llava().to(dtype))
    assert type(target) is HFTarget
    assert "expected states within" in target.why


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_in_bf16_do_not_hang_on_the_draft(temperature):
    """Equal to the last token, since a row is computed alike alone and among 64."""
    model = tiny_llava(num_key_value_heads=2)
    prompt = {name: value.to("cuda") for name, value in prompt_for(model).items()}
    specvlm = SpecVLM.from_target(LlamaTarget(model.to("cuda", torch.bfloat16)))
    options = prompt | {"temperature": temperature, "max_new_tokens": 200}
    longer = specvlm.generate(**options | {"max_new_tokens": 240}).tokens
    for draft in (ScriptedDraft(longer, depth=6, decoys=2), ScriptedDraft(longer, depth=31), "ngram"):
        assert specvlm.generate(**options, draft=draft).tokens == longer[:200]


@pytest.mark.gpu
def test_a_verify_never_waits_for_the_host():
    target = LlamaTarget(tiny_llava().to("cuda", torch.bfloat16))
    slab, kv_len = target._pool.borrow(1, 512), torch.tensor([40], dtype=torch.int32, device="cuda")
    words = pack_ancestors(torch.tensor([[-1, 0, 0, 1]], dtype=torch.int32, device="cuda"))
    embeds = torch.randn(1, 4, 128, device="cuda", dtype=torch.bfloat16)
    positions = torch.full((1, 4), 40, dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            hidden, _ = target._forward(embeds, positions, slab, llama.AttentionStep(kv_len, words), None)
            target.head(hidden)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_hook_on_an_output_head_is_met_by_few_rows_too():
    model = tiny_llava()
    layer, seen = torch.nn.Linear(8, 8), []
    layer.register_forward_hook(lambda *args: seen.append(args))
    with torch.no_grad():
        through(layer, torch.zeros(1, 2, 8))
    assert seen
    model.lm_head.register_forward_hook(lambda module, given, logits: 2 * logits)
    with pytest.raises(ValueError, match="own decoder: hooks: expected none, got one on the output head"):
        LlamaTarget(model)
    assert type(target_for(model)) is HFTarget
