"""Compressors before a head: rows and positions, the head's arithmetic behind them in straight lines of torch."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from specvlm import SpecVLM
from specvlm.compressors import (
    CompressorConfig,
    DecoupledConfig,
    TextOnlyConfig,
    ViSpecConfig,
    compressor_config,
    keep_rows,
    picture_runs,
)
from specvlm.drafts import Eagle3Config, Eagle3Draft, Eagle3Head, EagleConfig, EagleDraft, EagleHead
from specvlm.policies import Eagle2
from specvlm.targets.base import Prompt
from specvlm.tree import Plan
from tests.drafts.formula import StraightLine, attention, check_rounds, gated, layer_weights, rms_norm
from tests.fakes import IMAGE_TOKEN, VOCAB, prompt_for, tiny_llava

CONFIGS = [TextOnlyConfig(), DecoupledConfig(), ViSpecConfig(queries=2, heads=4), ViSpecConfig(queries=4, heads=2)]


@pytest.fixture(scope="module")
def specvlm() -> SpecVLM:
    return SpecVLM(tiny_llava(num_hidden_layers=4, num_key_value_heads=2))


def widened(head: torch.nn.Module) -> None:
    """Makes what begins as nothing count: the adaptor's part in the features."""
    for name, parameter in head.named_parameters():
        if "img_fc" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def eagle(specvlm: SpecVLM, compressor: CompressorConfig, plan: Plan | None = None) -> EagleDraft:
    torch.manual_seed(1)
    config = replace(EagleConfig.for_target(specvlm.target.spec, intermediate_size=96), compressor=compressor)
    draft = EagleDraft(EagleHead(config), Eagle2(plan))
    widened(draft.head)
    draft.bind(specvlm.target)
    return draft


def eagle3(specvlm: SpecVLM, compressor: CompressorConfig) -> Eagle3Draft:
    torch.manual_seed(1)
    some = [token for token in range(VOCAB) if token != IMAGE_TOKEN]
    config = Eagle3Config.for_target(specvlm.target.spec, intermediate_size=96, draft_vocab_size=len(some))
    draft = Eagle3Draft(Eagle3Head(replace(config, compressor=compressor)))
    draft.head.set_vocabulary(torch.tensor(some))
    widened(draft.head)
    draft.bind(specvlm.target)
    return draft


def outputs_of_queries(draft: EagleDraft, picture: Tensor) -> Tensor:
    """[queries, H] for a picture's embeddings [T, H], an output and a head at a time."""
    w = {name.removeprefix("compressor.imadpt."): tensor for name, tensor in draft.head.state_dict().items()}
    queries, heads, dim = w["q"].shape
    k, v = picture @ w["k_proj.weight"].T, picture @ w["v_proj.weight"].T
    made = []
    for query in range(queries):
        parts = []
        for head in range(heads):
            mine = slice(head * dim, (head + 1) * dim)
            p = (k[:, mine] @ w["q"][query, head] / dim**0.5).softmax(0)
            parts.append(p @ v[:, mine])
        made.append(w["o_proj.weight"] @ torch.cat(parts))
    return torch.stack(made)


def straight_line(ids: list[int]) -> StraightLine:
    """The formula for a head with a compressor, on a prompt of `ids`."""

    def line(draft: EagleDraft, embeds: Tensor, features: Tensor) -> Tensor:
        w, layer, config = draft.head.state_dict(), layer_weights(draft, "layers.0."), draft.head.config
        compressor = config.compressor
        queries = compressor.queries if isinstance(compressor, ViSpecConfig) else 0
        is_image = [token == IMAGE_TOKEN for token in ids] + [False] * (len(embeds) + 1 - len(ids))
        # Token i's embedding is embeds[i - 1]; token 0, which no pair has, is text.
        rows: list[tuple[int, Tensor | None, bool]] = []  # position, embedding, picture
        guide, guides = torch.zeros(config.hidden_size), {}
        i = 0
        while i < len(is_image):
            if not is_image[i]:
                guides[i] = guide
                rows.append((i, embeds[i - 1] if i else None, False))
                i += 1
                continue
            end = i
            while is_image[end]:
                end += 1
            picture = embeds[i - 1 : end - 1]
            if queries:
                *kept, after = outputs_of_queries(draft, picture)
                rows += [(end - len(kept) + j, row, True) for j, row in enumerate(kept)]
                guides |= {end - len(kept) + j: guide for j in range(len(kept))}
                guide = after
                guides[end - 1] = guide
            elif isinstance(compressor, DecoupledConfig):
                rows += [(i + j, row, True) for j, row in enumerate(picture)]
            i = end
        entering, positions = [], []
        for (before, _, _), (at, embed, direct) in pairwise(rows):
            h = features[before]
            if queries:
                joined = torch.cat([h, guides[before]])
                h = w["compressor.img_fc.weight"] @ joined + w["compressor.img_fc.bias"]
            entering.append(embed if direct else w["fc.weight"] @ torch.cat([embed, h]) + w["fc.bias"])
            positions.append(at - 1)
        x = torch.stack(entering)
        x = x + attention(x, layer, config, torch.tensor(positions))
        return x + gated(rms_norm(x, layer["post_attention_layernorm.weight"], config), layer)

    return line


@pytest.mark.parametrize(("compressor", "images"), list(zip(CONFIGS, (1, 2, 1, 2), strict=True)), ids=str)
@torch.no_grad()
def test_draft_logits_follow_the_formula_at_every_level(specvlm, compressor, images, monkeypatch):
    plan = Plan(nodes=12, depth=3, width=2)
    draft = eagle(specvlm, compressor, plan)
    ids = prompt_for(specvlm.target.model, images)["input_ids"][0].tolist()
    check_rounds(
        specvlm,
        draft,
        plan,
        monkeypatch,
        line=straight_line(ids),
        fused=lambda features: features,
        logits_of=specvlm.target.head,
        images=images,
    )


@pytest.mark.parametrize("make", [eagle, eagle3])
@pytest.mark.parametrize("compressor", CONFIGS, ids=str)
@pytest.mark.parametrize("images", [0, 2])
def test_answers_are_equal_whatever_the_draft_sees(specvlm, make, compressor, images):
    prompt = prompt_for(specvlm.target.model, images) | {"max_new_tokens": 24, "seed": 3}
    for temperature in (0.0, 1.0):
        expected = specvlm.generate(**prompt, temperature=temperature).tokens
        drafted = specvlm.generate(**prompt, temperature=temperature, draft=make(specvlm, compressor))
        assert drafted.tokens == expected


def random_prompt(masks: list[list[int]], width: int = 3) -> Prompt:
    image_mask = torch.tensor(masks).bool()
    batch, length = image_mask.shape
    count = batch * length
    return Prompt(
        input_ids=torch.arange(count).view(batch, length),
        positions=torch.arange(length, dtype=torch.int32).expand(batch, -1),
        embeds=torch.randn(batch, length, width),
        image_mask=image_mask,
        features=torch.randn(batch, length, width),
        vision=None,
        inputs={},
        lengths=torch.full((batch,), length, dtype=torch.int32),
    )


def test_rows_that_are_kept_stay_in_order_at_their_positions():
    prompt = random_prompt([[0, 1, 1, 0, 1, 0], [1, 0, 0, 0, 1, 0]])
    kept = keep_rows(prompt, ~prompt.image_mask)
    assert kept.lengths.tolist() == [3, 4]
    assert kept.positions[0, :3].tolist() == [0, 3, 5]
    assert kept.positions[1].tolist() == [1, 2, 3, 5]
    assert kept.input_ids[1].tolist() == [7, 8, 9, 11]
    assert torch.equal(kept.embeds[0, :3], prompt.embeds[0, [0, 3, 5]])
    assert torch.equal(kept.features[1], prompt.features[1, [1, 2, 3, 5]])
    assert bool(kept.image_mask[0, 3])  # garbage is what was left out


def test_runs_of_image_tokens():
    assert picture_runs(torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]]).bool()) == [
        (0, 1, 3),
        (1, 0, 1),
        (1, 3, 4),
    ]


def test_an_adaptor_begins_by_leaving_features_as_they_are():
    prompt = random_prompt([[0, 1, 1, 1, 0]], width=8)
    seen = ViSpecConfig(queries=3, heads=2).build(8)(prompt)
    assert seen.positions.tolist() == [[0, 2, 3, 4]]
    torch.testing.assert_close(seen.features, prompt.features[:, [0, 2, 3, 4]])
    assert seen.guide is not None
    assert seen.guide.any()


def test_pictures_of_many_prompts_go_as_if_alone():
    torch.manual_seed(0)
    adaptor = ViSpecConfig(queries=2, heads=2).build(8)
    widened(adaptor)
    prompt = random_prompt([[0, 1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]], width=8)
    together = adaptor(prompt)
    for row, length in enumerate(together.lengths.tolist()):
        alone = adaptor(
            replace(
                prompt,
                input_ids=prompt.input_ids[row : row + 1],
                positions=prompt.positions[row : row + 1],
                embeds=prompt.embeds[row : row + 1],
                image_mask=prompt.image_mask[row : row + 1],
                features=prompt.features[row : row + 1],
                lengths=prompt.lengths[row : row + 1],
            )
        )
        assert alone.lengths.tolist() == [length]
        for name in ("positions", "embeds", "features"):
            torch.testing.assert_close(getattr(together, name)[row, :length], getattr(alone, name)[0])
        torch.testing.assert_close(together.guide[row], alone.guide[0])


def test_the_adaptors_gradients():
    torch.manual_seed(0)
    adaptor = ViSpecConfig(queries=3, heads=2).build(4).double()
    widened(adaptor)
    prompt = random_prompt([[0, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 0]], width=4)

    def compressed(embeds: Tensor, features: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(dict(adaptor.named_parameters()), weights, strict=True))
        seen = torch.func.functional_call(adaptor, named, (replace(prompt, embeds=embeds, features=features),))
        guided = torch.func.functional_call(
            _Guided(adaptor), {f"adaptor.{name}": w for name, w in named.items()}, (features[:, :2], seen.guide)
        )
        return seen.embeds, seen.features, seen.guide, guided

    given = [prompt.embeds.double(), prompt.features.double(), *adaptor.parameters()]
    assert torch.autograd.gradcheck(compressed, [x.detach().requires_grad_() for x in given])


class _Guided(torch.nn.Module):
    def __init__(self, adaptor: torch.nn.Module) -> None:
        super().__init__()
        self.adaptor = adaptor

    def forward(self, features: Tensor, guide: Tensor) -> Tensor:
        return self.adaptor.guided(features, guide)


@pytest.mark.parametrize("compressor", CONFIGS, ids=str)
def test_a_head_comes_back_with_its_compressor(specvlm, compressor, tmp_path):
    draft = eagle(specvlm, compressor)
    draft.save_pretrained(tmp_path)
    again = EagleDraft.from_pretrained(tmp_path)
    assert again.head.config == draft.head.config
    assert again.head.config.compressor == compressor
    prompt = prompt_for(specvlm.target.model) | {"max_new_tokens": 24}
    expected = specvlm.generate(**prompt, draft=draft).stats
    assert specvlm.generate(**prompt, draft=tmp_path).stats.accepted_histogram == expected.accepted_histogram


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "magic"}, "compressor: expected a kind of text_only, decoupled, vispec, .*, got 'magic'"),
        ("vispec", "compressor: expected a kind of .*, got 'vispec'"),
        ({"kind": "vispec", "ratio": 3}, "compressor: expected settings of vispec, got ratio"),
        ({"kind": "vispec", "queries": 1}, "queries: expected an integer >= 2, got 1"),
        ({"kind": "vispec", "heads": 0}, "heads: expected an integer >= 1, got 0"),
    ],
)
def test_settings_that_are_none(settings, message):
    with pytest.raises(ValueError, match=message):
        compressor_config(settings)


def test_adaptors_that_do_not_fit(specvlm):
    with pytest.raises(ValueError, match="heads: expected a divisor of the hidden_size 128, got 3"):
        eagle(specvlm, ViSpecConfig(heads=3))
    draft = eagle(specvlm, ViSpecConfig(queries=18, heads=4))
    with pytest.raises(ValueError, match="queries: expected at most 17 for the picture's rows, got 18"):
        specvlm.generate(**prompt_for(specvlm.target.model), draft=draft)
