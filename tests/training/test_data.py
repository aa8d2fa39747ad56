"""Encoding by the target's own template, and batches: the same for the same number, whoever asks and when."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from specvlm import SpecVLM, load
from specvlm.demo.data import Encoder as DemoEncoder
from specvlm.training.data import Batches, PictureCache, fingerprint, split, survey
from specvlm.training.encoding import Encoder
from specvlm.training.records import Example, Stored, Turn
from tests.fakes import IMAGE_SIDE, picture, tiny_llava, tiny_processor

LLAVA_15 = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<unk>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '</s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<unk>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(4):
        picture(number).resize((30 + 30 * number, 40)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def specvlm() -> SpecVLM:
    return SpecVLM(tiny_llava(), processor=tiny_processor())


@pytest.fixture(scope="module")
def encoder(specvlm) -> Encoder:
    return Encoder(specvlm.processor, specvlm.target)


def example(folder: Path, *turns: Turn, id_: str = "a", **changes: object) -> Example:
    shown = sum(turn.pictures for turn in turns)
    pictures = tuple(Stored(f"{number}.png", folder / f"{number}.png") for number in range(shown))
    return replace(Example(id_, pictures, turns), **changes)


def rows(one: Example, encoder: Encoder) -> list[int]:
    return [encoder.rows_of(stored) for stored in one.pictures]


def runs(answers: Tensor) -> list[list[int]]:
    """Where the answers are."""
    found: list[list[int]] = []
    for place in answers.nonzero()[:, 0].tolist():
        if found and found[-1][-1] == place - 1:
            found[-1].append(place)
        else:
            found.append([place])
    return found


@pytest.mark.parametrize("template", [None, LLAVA_15, CHATML], ids=["plain", "llava-1.5", "chatml"])
def test_prompts_are_those_of_decoding_and_answers_end(folder, template):
    processor = tiny_processor()
    processor.chat_template = template or processor.chat_template
    model = SpecVLM(tiny_llava(), processor=processor)
    encoder, tokenizer = Encoder(processor, model.target), processor.tokenizer
    one = example(folder, Turn("what is it", "a red circle", 2), Turn("is it red", "it is", 1))
    encoded = encoder.sequence(one, rows(one, encoder))
    pictures = [stored.picture() for stored in one.pictures]
    prompt = model.prepare(pictures[:2], "what is it")
    first, second = runs(encoded.answers)
    assert encoded.ids[: first[0]].tolist() == prompt["input_ids"][0].tolist()
    assert tokenizer.decode(encoded.ids[first]).strip() == "a red circle</s>"
    assert tokenizer.decode(encoded.ids[second]).strip() == "it is</s>"
    assert (encoded.ids == tokenizer.eos_token_id).sum() == (4 if template is CHATML else 2)
    between = tokenizer.decode(encoded.ids[first[-1] + 1 : second[0]])
    assert between.endswith("assistant\n" if template is CHATML else "ASSISTANT:")
    asked = encoder.question(one, 0)
    assert all(torch.equal(asked[name], prompt[name]) for name in prompt)
    again = encoder.question(one, 1)
    assert again["input_ids"][0].tolist() == encoded.ids[: second[0]].tolist()
    assert len(again["pixel_values"]) == 3
    assert len(model.generate(**again, max_new_tokens=3).tokens) == 3
    cut = encoder.sequence(replace(one, turns=(replace(one.turns[0], ended=False), one.turns[1])), rows(one, encoder))
    assert cut.ids[: first[-1]].tolist() == encoded.ids[: first[-1]].tolist()
    assert not cut.answers[first[-1]]


def test_the_demos_own_encoder_agrees():
    model = load("demo")
    said = DemoEncoder(model.processor.tokenizer)
    question, answer = said("What is there?", "A large red circle, and a star.")
    one = Example("a", (), (Turn("What is there?", "A large red circle, and a star.", 1),))
    encoder = Encoder(model.processor, model.target)
    encoded = encoder.sequence(one, [encoder.rows((432, 432))])
    assert encoded.ids.tolist() == [*said.prefix, *question, *answer]
    assert runs(encoded.answers) == [list(range(len(said.prefix) + len(question), len(encoded.ids)))]


def test_pictures_of_a_llava_next_have_rows_by_their_shape(folder):
    processor = load_next_processor()
    model = SpecVLM(tiny_llava("llava_next"), processor=processor)
    encoder = Encoder(processor, model.target)
    assert len({encoder.rows(size) for size in ((30, 40), (120, 40))}) == 2
    one = example(folder, Turn("what is it", "a red circle", 3))
    found = survey([one, replace(one, id="b")], encoder)
    batch = Batches(found, encoder, size=2, per_step=1, seed=0)(0)
    prompt = model.prepare([stored.picture() for stored in one.pictures], "what is it")
    width = prompt["input_ids"].shape[1]
    assert batch.inputs["input_ids"][0, :width].tolist() == prompt["input_ids"][0].tolist()
    assert torch.equal(batch.inputs["image_sizes"][:3], prompt["image_sizes"])
    taught, _ = model.target.teach(batch.inputs)
    assert int(taught.image_mask.sum()) == 2 * int(
        (prompt["input_ids"] == model.target.model.config.image_token_id).sum()
    )


def load_next_processor():
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    plain = tiny_processor()
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    pinpoints = [[IMAGE_SIDE, 2 * IMAGE_SIDE], [2 * IMAGE_SIDE, IMAGE_SIDE], [2 * IMAGE_SIDE, 2 * IMAGE_SIDE]]
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": IMAGE_SIDE}, crop_size=side, image_grid_pinpoints=pinpoints
        ),
        tokenizer=plain.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=plain.chat_template,
    )


def many(folder: Path, count: int = 23) -> list[Example]:
    rng = Random(0)
    return [
        example(folder, Turn("what", "a red circle " * rng.randint(1, 9), rng.randint(0, 2)), id_=str(number))
        for number in range(count)
    ]


def test_batches_follow_from_their_numbers(folder, encoder):
    found = survey(many(folder), encoder)
    batches = Batches(found, encoder, size=3, per_step=2, seed=5)
    assert (batches.steps_per_epoch, batches.left_over) == (3, 5)
    places = [batches.places(number) for number in range(18)]
    again = Batches(found, encoder, size=3, per_step=2, seed=5)
    assert [again.places(number) for number in (17, 3, 9, 0)] == [places[number] for number in (17, 3, 9, 0)]
    for epoch in range(3):
        drawn = [place for number in range(6 * epoch, 6 * epoch + 6) for place in places[number]]
        assert len(set(drawn)) == 18
    assert len({tuple(sorted(p for batch in places[i : i + 6] for p in batch)) for i in (0, 6, 12)}) > 1
    assert places[:6] != [Batches(found, encoder, size=3, per_step=2, seed=6).places(number) for number in range(6)]


def test_batches_hold_examples_of_like_length(folder, encoder):
    found = survey(many(folder, 60), encoder)
    batches = Batches(found, encoder, size=4, per_step=1, seed=0)
    spread = [
        max(lengths) - min(lengths)
        for number in range(15)
        for lengths in [[found.lengths[place] for place in batches.places(number)]]
    ]
    assert sum(spread) < 0.35 * 15 * (max(found.lengths) - min(found.lengths))


def test_a_batch_is_its_examples_padded_at_their_ends(folder, specvlm, encoder):
    examples = many(folder)
    batches = Batches(survey(examples, encoder), encoder, size=5, per_step=1, seed=1)
    batch, again = batches(2), batches(2)
    shown = []
    for row, id_ in enumerate(batch.ids):
        one = examples[int(id_)]
        encoded = encoder.sequence(one, rows(one, encoder))
        length = len(encoded.ids)
        assert batch.inputs["input_ids"][row, :length].equal(encoded.ids)
        assert batch.answers[row, :length].equal(encoded.answers)
        assert not batch.answers[row, length:].any()
        shown += [stored.picture() for stored in one.pictures]
    assert torch.equal(batch.inputs["pixel_values"], encoder.pixels(shown)["pixel_values"])
    assert all(torch.equal(batch.inputs[name], again.inputs[name]) for name in batch.inputs)
    specvlm.target.teach(batch.inputs)


def test_kept_pictures_are_looked_at_once_and_teach_the_same(folder, specvlm, encoder, monkeypatch):
    target, found = specvlm.target, survey(many(folder), encoder)
    looked = []
    picture_rows = type(target).picture_rows
    monkeypatch.setattr(type(target), "picture_rows", lambda *given: looked.append(1) or picture_rows(*given))
    plain = Batches(found, encoder, size=4, per_step=1, seed=0)
    a_picture = picture_rows(target, encoder.pixels([picture(0)])).nbytes
    for budget, at_most in ((10 * a_picture, 2), (a_picture, 100), (0, 100)):
        kept = Batches(found, encoder, size=4, per_step=1, seed=0, cache=PictureCache(target, encoder, budget))
        looked.clear()
        for number in range(10):
            batch, whole = kept(number), plain(number)
            assert ("picture_rows" in batch.inputs) == ("pixel_values" in whole.inputs)
            (prompt, hidden), (other, expected) = target.teach(batch.inputs), target.teach(whole.inputs)
            torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)
            assert torch.equal(prompt.image_mask, other.image_mask)
        assert len(looked) <= at_most
        assert (len(looked) > 2) == (budget < 2 * a_picture)


def test_text_alone_makes_batches_without_pictures(folder, specvlm, encoder):
    examples = [example(folder, Turn("what", "a red circle"), id_=str(number)) for number in range(2)]
    batch = Batches(survey(examples, encoder), encoder, size=2, per_step=1, seed=0)(0)
    assert list(batch.inputs) == ["input_ids"]
    specvlm.target.teach(batch.inputs)


def test_what_is_longer_than_the_context_is_cut_and_counted_or_refused(folder, specvlm, encoder):
    short = example(folder, Turn("what", "a red circle", 1), id_="short")
    long = example(folder, Turn("what", "z " * 600, 1), id_="long")
    hopeless = example(folder, Turn("z " * 600, "a red circle", 1), id_="hopeless")
    talk = example(folder, Turn("what", "a circle", 1), Turn("z " * 600, "a circle", 1), id_="talk")
    found = survey([short, long, hopeless, talk], encoder)
    assert [one.id for one in found.examples] == ["short", "long", "talk"]
    assert (found.truncated, found.left_out) == (2, 1)
    assert found.lengths[1] == 512
    batch = Batches(found, encoder, size=3, per_step=1, seed=0)(0)
    row = batch.ids.index("long")
    assert batch.answers[row].sum() == batch.answers[row].nonzero().max() - batch.answers[row].nonzero().min() + 1
    assert batch.inputs["input_ids"].shape == (3, 512)
    assert len(batch.inputs["pixel_values"]) == 3  # the second picture of the talk is behind the cut
    specvlm.target.teach(batch.inputs)
    with pytest.raises(
        ValueError,
        match=r"data: expected examples within the context of 512 tokens, got 3 .*: long \(\d+ tokens\), hope",
    ):
        survey([short, long, hopeless, talk], encoder, refuse_long=True)
    with pytest.raises(ValueError, match="data: expected an answer of two tokens or more, got none in 1 examples"):
        survey([hopeless], encoder)


def test_data_that_cannot_be_learned_from(folder, specvlm, encoder):
    unanswered = [example(folder, Turn("what", None), id_=str(number)) for number in range(12)]
    with pytest.raises(ValueError, match="got 12 examples without: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more; self_gen"):
        survey(unanswered, encoder)
    found = survey(many(folder, 3), encoder)
    with pytest.raises(ValueError, match="batch: expected at most the 3 examples that there are to learn from, got 4"):
        Batches(found, encoder, size=2, per_step=2, seed=0)
    mixed = tiny_processor()
    mixed.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(ValueError, match="data: expected 1 <image>, one a picture, in what the chat template makes"):
        Encoder(mixed, specvlm.target).question(example(folder, Turn("what", None, 1)), 0)
    mixed.chat_template = "{{ messages | length }}"
    with pytest.raises(ValueError, match="processor: expected a chat template whose conversations go on from their"):
        Encoder(mixed, specvlm.target).sequence(example(folder, Turn("what", "a circle")), [])
    mixed.chat_template = None
    with pytest.raises(ValueError, match="processor: expected one with a chat template, got none"):
        Encoder(mixed, specvlm.target)


def test_a_split_by_hash(folder):
    base = many(folder, 200)
    examples = [
        replace(one, pictures=tuple(replace(stored, name=f"{i // 2}") for stored in one.pictures[:1]))
        for i, one in enumerate(base)
    ]
    apart = split(examples, 0.1)
    kept, out = ({one.id for one in part} for part in (apart.training, apart.held_out))
    assert len(kept) + len(out) == 200
    assert not kept & out
    assert 8 <= len(out) <= 40
    by_picture = {one.pictures[0].name for one in apart.held_out if one.pictures}
    assert not by_picture & {one.pictures[0].name for one in apart.training if one.pictures}
    shuffled = split(Random(1).sample(examples, 200), 0.1)
    assert [one.id for one in shuffled.held_out if one.pictures] == [one.id for one in apart.held_out if one.pictures]
    assert not split(examples, 0.0).held_out
    told = [replace(one, held_out=i % 5 == 0) for i, one in enumerate(examples)]
    assert {one.id for one in split(told, 0.1).held_out} == {str(i) for i in range(0, 200, 5)}
    with pytest.raises(ValueError, match="data: expected more than what is held out, got 1 examples, all held out"):
        split(examples[:1], 0.5)


def test_a_fingerprint_of_the_data(folder):
    examples = many(folder, 4)
    told = {
        fingerprint(examples),
        fingerprint(examples[::-1]),
        fingerprint(examples[:3]),
        fingerprint([replace(examples[0], turns=(Turn("why", "b"),)), *examples[1:]]),
    }
    assert len(told) == 4
    assert fingerprint(many(folder, 4)) in told
