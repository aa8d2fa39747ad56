"""Training: the batches that are learned from, and runs that are killed and go on."""

import pytest
import torch

from specvlm.demo import train as training
from specvlm.demo.build import IMAGE_TOKENS, build_processor, train_tokenizer
from specvlm.demo.data import IGNORED, LABELS, Encoder, pictures, rows, texts
from specvlm.demo.scenes import PICTURE_SIZE, Scene, render
from specvlm.demo.train import Recipe, Trainer, train

RECIPE = Recipe(vision_steps=2, steps=2, vision_batch=2, batch=1, tokenizer_scenes=100)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(texts(200, seed=0))


@pytest.fixture
def uncompiled(monkeypatch):
    """Two steps are not worth a minute of compiling."""
    monkeypatch.setattr(training.torch, "compile", lambda module, **options: module)


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_the_encoder_lays_a_dialogue_out_as_the_chat_template_does(tokenizer):
    processor, encoder = build_processor(tokenizer), Encoder(tokenizer)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the red star?"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert prompt == "USER: <image>\nWhere is the red star? ASSISTANT:"
    ids = processor(images=render(Scene((), "white")), text=prompt)["input_ids"][0]
    question, answer = encoder("Where is the red star?", "It is at the top.")
    assert list(ids) == encoder.prefix + question
    assert encoder.prefix.count(processor.image_token_id) == IMAGE_TOKENS
    chat.append({"role": "assistant", "content": [{"type": "text", "text": "It is at the top."}]})
    full = processor(images=render(Scene((), "white")), text=processor.apply_chat_template(chat))["input_ids"][0]
    assert list(full) == encoder.prefix + question + answer


def test_a_question_sees_the_picture_and_itself(tokenizer):
    encoder = Encoder(tokenizer)
    batch = rows(4, "seed", encoder)
    shared = len(encoder.prefix)
    for ids, positions, labels, mask in zip(batch.ids, batch.positions, batch.labels, batch.mask[:, 0], strict=True):
        used = int((ids != encoder.pad).sum())
        starts = [i for i in range(shared, used) if positions[i] == shared]
        for start, end in zip(starts, [*starts[1:], used], strict=True):
            assert positions[start:end].tolist() == list(range(shared, shared + end - start))
            sees = mask[start:end].clone()
            assert sees[:, :shared].all()
            assert torch.equal(sees[:, start:end], torch.ones(end - start, end - start, dtype=torch.bool).tril())
            sees[:, :shared] = sees[:, start:end] = False
            assert not sees.any()
            learned = labels[start:end] != IGNORED
            assert torch.equal(labels[start:end][learned], ids[start + 1 : end + 1][learned])
            assert labels[end - 2] == encoder.eos
            assert tokenizer.decode(ids[start:end][~learned]).endswith("</s>")
        assert mask.any(dim=-1).all(), "a row that sees nothing would turn into NaN"
        assert len(starts) >= 2


def test_batches_follow_from_their_seed(tokenizer):
    encoder = Encoder(tokenizer)
    assert torch.equal(rows(2, "a", encoder).ids, rows(2, "a", encoder).ids)
    assert not torch.equal(rows(2, "a", encoder).ids, rows(2, "b", encoder).ids)


def test_pictures_are_what_the_processor_makes_of_them(tokenizer):
    batch = pictures(3, "seed")
    assert batch.pixels.shape == (3, 3, PICTURE_SIZE, PICTURE_SIZE)
    restored = ((batch.pixels * 0.5 + 0.5) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    seen = build_processor(tokenizer).image_processor(list(restored), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen, batch.pixels, atol=1e-5, rtol=0)
    for name, values in LABELS.items():
        assert batch.cells[name].shape == (3, IMAGE_TOKENS)
        assert batch.cells[name].max() <= len(values)


@pytest.mark.usefixtures("uncompiled")
def test_a_restored_run_ends_where_an_unbroken_one_does(tokenizer):
    unbroken = Trainer(RECIPE, tokenizer)
    for _ in range(RECIPE.total):
        unbroken.train_step()
    broken = Trainer(RECIPE, tokenizer)
    for _ in range(3):
        broken.train_step()
    resumed = Trainer(RECIPE, tokenizer)
    resumed.restore(broken.state())
    while resumed.step < RECIPE.total:
        resumed.train_step()
    assert torch.equal(weights(resumed), weights(unbroken))


@pytest.mark.usefixtures("uncompiled")
def test_a_checkpoint_of_another_recipe_is_refused(tokenizer):
    state = Trainer(RECIPE, tokenizer).state()
    with pytest.raises(ValueError, match="checkpoint: expected recipe"):
        Trainer(Recipe(seed=1), tokenizer).restore(state)


@pytest.mark.usefixtures("uncompiled")
def test_a_killed_run_resumes_from_its_checkpoint_and_leaves_only_the_model(tmp_path, monkeypatch):
    out = tmp_path / "model"
    step = Trainer.train_step

    def killed(self):
        if self.step == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(out, RECIPE, checkpoint_seconds=0)
    assert not out.exists()
    done = []
    monkeypatch.setattr(Trainer, "train_step", lambda self: done.append(self.step) or step(self))
    train(out, RECIPE)
    assert done == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert len((out / training.LOG_NAME).read_text().splitlines()) == RECIPE.total
