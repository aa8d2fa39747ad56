"""Heads that draft through the target's own layer: the outputs of their modules, from weights that are held once."""

import threading

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from specvlm import SpecVLM
from specvlm.compressors import ViSpecConfig
from specvlm.drafts import EagleDraft
from specvlm.drafts.pairs import PairDraft, Pairs
from specvlm.state import capacity
from specvlm.targets.hf_attention import AttentionStep
from specvlm.targets.llama_layers import fused
from specvlm.training import DistillConfig
from specvlm.training.objectives import objective_of
from specvlm_kernels import pack_ancestors
from tests.drafts.test_eagle import random_draft as eagle
from tests.drafts.test_eagle3 import random_draft as eagle3
from tests.fakes import prompt_for, tiny_llava

CASES = {
    "eagle": (eagle, {}),
    "normed": (eagle, {"input_layernorm": True}),
    "without bias": (eagle, {"bias": False}),
    "other heads": (eagle, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}),
    "rows that enter as they are": (eagle, {"compressor": ViSpecConfig()}),
    "eagle3": (eagle3, {}),
}

#: How much of a weight's norm e4m3 may lose at random numbers, each of which loses up to a 16th of itself.
LOST = 2**-5


@pytest.fixture(scope="module")
def specvlm() -> SpecVLM:
    return SpecVLM(tiny_llava(num_hidden_layers=6, num_key_value_heads=2))


def pairs_of(rows: int, first: int, direct: bool = False) -> Pairs:
    positions = torch.arange(first, first + rows, dtype=torch.int32)[None]
    embeds, hidden = torch.randn(2, 1, rows, 128).unbind()
    return Pairs(embeds, hidden, positions, positions % 3 == 0 if direct else None)


def fused_weights(draft: PairDraft) -> list[tuple[Tensor, ...]]:
    layer = draft.head.midlayer if draft.kind == "eagle3" else draft.head.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
    return [tuple(one.weight for one in some) for some in projections]


@pytest.mark.parametrize("rows", [5, 150])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_outputs_and_keys_are_the_modules(specvlm, case, rows):
    """Of a prompt, of few rows or of many, and of a tree behind it."""
    make, changes = CASES[case]
    draft = make(specvlm, **changes)
    config = draft.head.config
    shape = (1, 2, 1, config.num_key_value_heads, capacity(rows + 8), config.head_dim)
    own, theirs = torch.zeros(2, *shape).unbind()
    empty = torch.zeros(1, dtype=torch.int32)
    tree = pack_ancestors(torch.tensor([[-1, 0, 0, 1]], dtype=torch.int32))
    torch.manual_seed(3)
    decoder = draft.decoder()
    for pairs, step in (
        (pairs_of(rows, 0, direct=config.compressor is not None), AttentionStep(empty, None)),
        (pairs_of(4, rows), AttentionStep(empty + rows, tree, first_slot=empty + rows)),
    ):
        got, expected = decoder(pairs, own, step), draft.head(pairs, theirs, step)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    assert own[:, :, :, :, : rows + 4].all(), "everything was written"


@pytest.mark.parametrize("make", [eagle, eagle3])
def test_logits_of_few_rows_are_those_of_many(specvlm, make):
    draft = make(specvlm, vocabulary=[*range(7, 100, 5), *range(130, 320, 3)])
    hidden = torch.randn(1, 200, 128)
    with torch.no_grad():
        few = torch.cat([draft.logits(some) for some in hidden.split(40, dim=1)], dim=1)
        torch.testing.assert_close(few, draft.logits(hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [eagle, eagle3])
def test_weights_are_held_once_and_a_second_time_move_no_more(specvlm, make):
    draft = make(specvlm)
    before = {name: one.clone() for name, one in draft.head.state_dict().items()}
    draft.decoder()
    places = [one.data_ptr() for one in draft.held()]
    draft.decoder()
    assert [one.data_ptr() for one in draft.held()] == places
    for weights in fused_weights(draft):
        assert len({one.untyped_storage().data_ptr() for one in weights}) == 1
        assert weights[0].untyped_storage().nbytes() == sum(one.nbytes for one in weights)
    for name, one in draft.head.state_dict().items():
        assert torch.equal(one, before[name]), name


def test_weights_of_another_dtype_are_fused_anew(specvlm):
    draft = eagle(specvlm)
    specvlm.generate(**prompt_for(specvlm.target.model), max_new_tokens=4, draft=draft)
    half = SpecVLM(tiny_llava(num_hidden_layers=6, num_key_value_heads=2).to(torch.bfloat16))
    again = EagleDraft(draft.head, draft.policy)
    prompt = prompt_for(half.target.model)
    assert (
        half.generate(**prompt, max_new_tokens=20, draft=again).tokens
        == half.generate(**prompt, max_new_tokens=20).tokens
    )
    for weights in fused_weights(again):
        assert {one.dtype for one in weights} == {torch.bfloat16}
        assert weights[0].untyped_storage().nbytes() == sum(one.nbytes for one in weights)


def test_what_a_head_learns_behind_a_first_answer_counts(specvlm):
    draft, prompt = eagle(specvlm), prompt_for(specvlm.target.model)
    specvlm.generate(**prompt, max_new_tokens=4, draft=draft)
    pairs, step = pairs_of(7, 0), AttentionStep(torch.zeros(1, dtype=torch.int32), None)
    optimizer = torch.optim.AdamW(draft.head.parameters(), lr=0.01)
    draft.head(pairs, None, step).square().sum().backward()
    gradients = [one.grad for some in fused_weights(draft) for one in some]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    optimizer.step()
    slab = torch.zeros(1, 2, 1, 2, capacity(7), 32)
    with torch.no_grad():
        torch.testing.assert_close(
            draft.decoder()(pairs, slab, step), draft.head(pairs, None, step), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("make", [eagle, eagle3])
def test_a_head_that_has_drafted_is_saved_whole(specvlm, make, tmp_path):
    draft, fresh = make(specvlm), make(specvlm)
    specvlm.generate(**prompt_for(specvlm.target.model), max_new_tokens=4, draft=draft)
    draft.save_pretrained(tmp_path / "used")
    fresh.save_pretrained(tmp_path / "fresh")
    sizes = {(tmp_path / name / "model.safetensors").stat().st_size for name in ("used", "fresh")}
    assert len(sizes) == 1
    expected = load_file(tmp_path / "fresh" / "model.safetensors")
    for name, one in load_file(tmp_path / "used" / "model.safetensors").items():
        assert torch.equal(one, expected[name]), name
    assert type(draft).from_pretrained(tmp_path / "used").head.config == draft.head.config


@pytest.mark.parametrize("rows", [5, 150])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_weights_of_8_bits_move_outputs_by_what_they_lose(specvlm, case, rows):
    make, changes = CASES[case]
    draft = make(specvlm, **changes)
    small = draft.quantized()
    small.bind(specvlm.target)
    assert small.head is draft.head
    full, rounded, config = draft.decoder(), small.decoder(), draft.head.config
    torch.manual_seed(3)
    pairs, step = pairs_of(rows, 0), AttentionStep(torch.zeros(1, dtype=torch.int32), None)
    slab = torch.zeros(1, 2, 1, config.num_key_value_heads, capacity(rows), config.head_dim)
    whole, hidden = full(pairs, slab, step), rounded(pairs, slab, step)
    assert 0 < (hidden - whole).norm() / whole.norm() < 0.1
    logits = draft.logits(whole)
    assert 0 < (small.logits(whole) - logits).norm() / logits.norm() < LOST
    for weight, other in zip(full.weights(), rounded.weights(), strict=True):
        read = other.read(torch.float32)
        assert 0 < (weight.values - read).norm() / weight.values.norm() < LOST
        assert 4 * other.values.nbytes == weight.values.nbytes
        weight.values.copy_(read)
    # The modules, with weights that are what is left.
    torch.testing.assert_close(hidden, draft.head(pairs, slab, step), rtol=1e-4, atol=1e-4)


def test_a_head_whose_modules_are_more_than_weights_drafts_by_them(specvlm):
    prompt, seen = prompt_for(specvlm.target.model), []
    draft, adapted, plain = eagle(specvlm), eagle(specvlm), eagle(specvlm)
    draft.head.layers[0].mlp.register_forward_hook(lambda *args: seen.append(args))
    adapted.head.layers[0].self_attn.q_proj = torch.nn.Sequential(adapted.head.layers[0].self_attn.q_proj)
    histogram = specvlm.generate(**prompt, max_new_tokens=20, draft=plain).stats.accepted_histogram
    for one, reason in (
        (draft, "hooks: expected none, got one on layers.0.mlp"),
        (adapted, "projections: expected Linear, got Sequential"),
    ):
        assert one.recording is None
        assert specvlm.generate(**prompt, max_new_tokens=20, draft=one).stats.accepted_histogram == histogram
        with pytest.raises(ValueError, match=f"eagle e4m3: {reason}"):
            one.quantized().bind(specvlm.target)
    assert seen
    assert plain.recording is not None


@pytest.mark.parametrize("make", [eagle, eagle3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_of_8_bits_leaves_the_answer_as_it_is(specvlm, make, temperature):
    vocabulary = [*range(7, 100, 5), *range(130, 320, 3)]
    prompt = prompt_for(specvlm.target.model) | {"temperature": temperature, "max_new_tokens": 20}
    expected = specvlm.generate(**prompt).tokens
    for draft in (make(specvlm).quantized(), make(specvlm, vocabulary=vocabulary).quantized()):
        assert specvlm.generate(**prompt, draft=draft).tokens == expected
        assert draft.sizes["e4m3"]
        assert draft.with_vocabulary(vocabulary[:9]).e4m3


@pytest.mark.parametrize("make", [eagle, eagle3])
def test_a_draft_of_8_bits_does_not_learn(specvlm, make):
    draft = make(specvlm).quantized()
    draft.bind(specvlm.target)
    with pytest.raises(ValueError, match="draft: expected one that reads its own weights, got one that reads copies"):
        objective_of(specvlm.target, draft, DistillConfig(steps=1))


def test_threads_that_fuse_the_same_weights_read_the_same_tensor():
    parameters = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(8)]
    start, found = threading.Barrier(4), []

    def fuse():
        start.wait()
        found.append(fused(parameters).data_ptr())

    threads = [threading.Thread(target=fuse) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {parameters[0].data_ptr()}
    assert len(found) == 4
