"""The elastic compressor: its primitives by hand, its gate, its gradients, and answers that do not notice it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from specvlm import SpecVLM
from specvlm.compressors import ConcatConfig, SelectConfig, WeightConfig, compressor_config
from specvlm.compressors.primitives import PRIMITIVES, spaced
from specvlm.targets.base import Prompt
from tests.compressors.test_compressors import eagle, random_prompt
from tests.fakes import prompt_for, tiny_llava

OPTIONS = (("pool", 4), ("convolve", 4), ("prune", 8), ("prune_random", 5), ("resample", 2), ("all", 1), ("none", 1))
EQUAL = (("pool", 4), ("convolve", 4), ("prune", 4))
CONFIGS = [
    SelectConfig(OPTIONS),
    *(SelectConfig((option,)) for option in OPTIONS),
    WeightConfig(EQUAL),
    ConcatConfig((("pool", 4), ("resample", 2), ("prune", 8))),
]
GRID = 16


def name_of(config: SelectConfig) -> str:
    return f"{config.kind}-{'+'.join(name for name, _ in config.options)}"


@pytest.mark.parametrize(("name", "amount"), OPTIONS)
@pytest.mark.parametrize("length", [16, 36])
def test_every_primitive_makes_as_many_as_it_says(name, amount, length):
    torch.manual_seed(0)
    primitive = PRIMITIVES[name](amount, 8)
    rows, features, question = torch.randn(2, length, 8), torch.randn(2, length, 8), torch.randn(2, 8)
    outputs, at = primitive(rows, features, question)
    assert outputs.shape == (2, primitive.count(length), 8)
    assert at.shape == outputs.shape[:2]
    assert (at.diff(dim=1) > 0).all()
    assert ((at >= 0) & (at < length)).all()
    if name == "prune":
        assert torch.equal(outputs, rows.gather(1, at[..., None].expand(-1, -1, 8)))
        best = (features * question[:, None]).sum(-1).topk(primitive.count(length)).indices.sort(dim=1).values
        assert torch.equal(at, best)


def test_pooling_and_a_fresh_convolution_are_means_of_squares():
    rows = torch.arange(16.0)[None, :, None].expand(1, 16, 3)
    means = [2.5, 4.5, 10.5, 12.5]
    for name in ("pool", "convolve"):
        outputs, at = PRIMITIVES[name](4, 3)(rows, rows, rows[:, 0])
        torch.testing.assert_close(outputs[0, :, 0], torch.tensor(means))
        assert at.tolist() == [[3, 7, 11, 15]]


def test_what_is_no_square_is_pooled_along_the_line():
    rows = torch.arange(10.0)[None, :, None]
    outputs, at = PRIMITIVES["pool"](4, 1)(rows, rows, rows[:, 0])
    torch.testing.assert_close(outputs[0, :, 0], torch.tensor([1.5, 5.5, 8.5]))
    assert at.tolist() == [[2, 5, 9]]
    with pytest.raises(ValueError, match="convolve: expected a grid of at least 2 rows, got 1 x 10"):
        PRIMITIVES["convolve"](4, 1).count(10)
    with pytest.raises(ValueError, match="resample: expected pictures of at least 11 rows, got 10"):
        PRIMITIVES["resample"](11, 1).count(10)


def test_evenly_spaced_rows():
    assert spaced(torch.zeros(1, 10, 2), 3).tolist() == [[2, 5, 9]]
    assert spaced(torch.zeros(2, 3, 2), 3).tolist() == [[0, 1, 2]] * 2
    assert spaced(torch.zeros(1, 3, 2), 0).shape == (1, 0)


def pictured(batch: int, width: int = 8, text: int = 4) -> Prompt:
    """Prompts of one picture of 16 rows, behind one row of text and before others."""
    return random_prompt([[0] + [1] * GRID + [0] * text] * batch, width)


def test_the_gate_chooses_for_every_prompt_and_the_others_do_not_matter():
    torch.manual_seed(0)
    select = SelectConfig(OPTIONS).build(8).eval()
    torch.nn.init.normal_(select.gate.out.weight, std=3)
    prompt = pictured(12)
    seen = select(prompt)
    assert seen.choice is not None
    picked = seen.choice.picked.tolist()
    assert len(set(picked)) > 2
    assert torch.equal(seen.choice.probabilities.argmax(-1), seen.choice.picked)
    for row, option in enumerate(picked):
        rows = select.primitives[option].count(GRID)
        assert int(seen.lengths[row]) == 5 + rows
        alone = SelectConfig((OPTIONS[option],)).build(8).eval()
        alone.primitives[0].load_state_dict(select.primitives[option].state_dict())
        one = alone(_rows_of(prompt, [row]))
        torch.testing.assert_close(one.embeds[0], seen.embeds[row, : 5 + rows])
        assert one.positions[0].tolist() == seen.positions[row, : 5 + rows].tolist()
        assert one.choice is None
    assert seen.choice.rows.tolist() == pytest.approx([4 / 16, 4 / 16, 2 / 16, 4 / 16, 2 / 16, 1, 0])


def test_choices_in_training_are_draws_and_leave_the_rows_as_they_are():
    torch.manual_seed(0)
    select = SelectConfig((("pool", 4), ("all", 1))).build(8).train()
    prompt = pictured(2000)
    seen = select(prompt)
    chosen = seen.choice.picked.float().mean()
    expected = seen.choice.probabilities[:, 1].mean()
    assert abs(chosen - expected) < 5 * (0.25 / 2000) ** 0.5
    row = int((seen.choice.picked == 1).nonzero()[0])
    torch.testing.assert_close(seen.embeds[row], prompt.embeds[row])
    seen.embeds.sum().backward()
    assert select.gate.out.weight.grad.abs().sum() > 0


def test_the_gate_does_not_see_the_answer():
    torch.manual_seed(0)
    select = SelectConfig(OPTIONS).build(8).eval()
    prompt = pictured(3, text=6)
    asked = torch.tensor([18, 20, 23], dtype=torch.int32)
    seen = select(replace(prompt, asked=asked)).choice.probabilities
    for row, end in enumerate(asked.tolist()):
        cut = _rows_of(prompt, [row], end)
        torch.testing.assert_close(select(cut).choice.probabilities[0], seen[row])
    assert not torch.allclose(select(prompt).choice.probabilities[0], seen[0])


def test_weights_sum_what_the_primitives_make():
    torch.manual_seed(0)
    weight, prompt = WeightConfig(EQUAL).build(8), pictured(2)
    seen = weight(prompt)
    shares = weight.gate(prompt).softmax(-1)
    rows, features, question = prompt.embeds[:, 1:17], prompt.features[:, 1:17], prompt.features[:, -1]
    expected = sum(
        shares[:, o, None, None] * primitive(rows, features, question)[0]
        for o, primitive in enumerate(weight.primitives)
    )
    torch.testing.assert_close(seen.embeds[:, 1:5], expected)
    assert seen.positions[0].tolist() == [0, 4, 8, 12, 16, 17, 18, 19, 20]


def test_concatenated_outputs_stand_one_behind_the_other():
    torch.manual_seed(0)
    concat, prompt = ConcatConfig((("pool", 4), ("resample", 2))).build(8), pictured(1)
    seen = concat(prompt)
    rows, features, question = prompt.embeds[:, 1:17], prompt.features[:, 1:17], prompt.features[:, -1]
    made = torch.cat([primitive(rows, features, question)[0] for primitive in concat.primitives], dim=1)
    torch.testing.assert_close(seen.embeds[:, 1:7], made)
    assert int(seen.positions[0, 6]) == 16


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_answers_are_equal_and_heads_come_back(config, tmp_path):
    specvlm = SpecVLM(tiny_llava(num_key_value_heads=2))
    draft = eagle(specvlm, config)
    for images in (0, 2):
        prompt = prompt_for(specvlm.target.model, images) | {"max_new_tokens": 24, "seed": 3}
        for temperature in (0.0, 1.0):
            expected = specvlm.generate(**prompt, temperature=temperature).tokens
            assert specvlm.generate(**prompt, temperature=temperature, draft=draft).tokens == expected
    draft.save_pretrained(tmp_path)
    again = specvlm.generate(**prompt, draft=tmp_path).stats.accepted_histogram
    assert again == specvlm.generate(**prompt, draft=draft).stats.accepted_histogram


@pytest.mark.parametrize("config", [SelectConfig((option,)) for option in OPTIONS] + CONFIGS[-2:], ids=name_of)
def test_gradients_in_float64(config):
    torch.manual_seed(0)
    compressor = config.build(4).double()
    prompt = pictured(1, width=4)

    def compressed(embeds: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(dict(compressor.named_parameters()), weights, strict=True))
        given = replace(prompt, embeds=embeds, features=prompt.features.double())
        return torch.func.functional_call(compressor, named, (given,)).embeds

    weights = [parameter.detach().requires_grad_() for parameter in compressor.parameters()]
    assert torch.autograd.gradcheck(compressed, [prompt.embeds.double().requires_grad_(), *weights])


def test_a_gates_gradient_in_float64():
    """Straight through: as if what was chosen were scaled by its chance over what that chance is now."""
    torch.manual_seed(0)
    select = SelectConfig((("pool", 4), ("resample", 3), ("all", 1))).build(4).double().train()
    prompt = pictured(5, width=4)
    prompt = replace(prompt, embeds=prompt.embeds.double(), features=prompt.features.double())
    weights = list(select.gate.parameters())

    def chances(*given: Tensor) -> Tensor:
        torch.manual_seed(1)
        named = dict(zip(dict(select.gate.named_parameters()), given, strict=True))
        logits = torch.func.functional_call(select.gate, named, (prompt,))
        return (logits - torch.log(-torch.log(torch.rand_like(logits)))).softmax(dim=-1)

    torch.manual_seed(1)
    seen = select(prompt)
    assert len(set(seen.choice.picked.tolist())) > 1
    weighed = seen.embeds * torch.randn_like(seen.embeds)
    found = torch.autograd.grad(weighed.sum(), weights)
    counts = seen.image_mask & (torch.arange(seen.embeds.shape[1]) < seen.lengths[:, None])
    shares = (weighed.sum(dim=-1) * counts).sum(dim=1).detach()
    assert torch.autograd.gradcheck(chances, weights, fast_mode=True)
    chance = chances(*weights).gather(1, seen.choice.picked[:, None])[:, 0]
    expected = torch.autograd.grad((shares * chance).sum(), weights)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": []}, r"options: expected a primitive and its amount each, got \[\]"),
        ({"options": [["pool"]]}, r"options: expected a primitive and its amount each, got \['pool'\]"),
        ({"options": [["shrink", 3]]}, "primitive: expected one of all, none, pool, .*, got 'shrink'"),
        ({"options": [["pool", 0]]}, "pool: expected an integer >= 1, got 0"),
        ({"options": [["pool", 3], ["pool", 3]]}, "options: expected every one once"),
        ({}, "options"),
    ],
)
def test_settings_that_are_none(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        compressor_config({"kind": "select"} | settings)


def test_options_that_do_not_fit_a_picture():
    with pytest.raises(ValueError, match=r"options: expected equally many rows of a picture's 16, got \{'pool 4': 4"):
        WeightConfig((("pool", 4), ("resample", 2))).build(8)(pictured(1))
    with pytest.raises(ValueError, match="options: expected at most a picture's 16 rows, got 20"):
        ConcatConfig((("pool", 4), ("all", 1))).build(8)(pictured(1))


def _rows_of(prompt: Prompt, rows: list[int], end: int | None = None) -> Prompt:
    """Some of the prompts, alone, up to row `end`."""
    names = ("input_ids", "positions", "embeds", "image_mask", "features")
    lengths = prompt.lengths[rows] if end is None else torch.full((len(rows),), end, dtype=torch.int32)
    return replace(prompt, **{name: getattr(prompt, name)[rows, :end] for name in names}, lengths=lengths)
