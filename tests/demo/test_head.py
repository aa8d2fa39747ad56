"""The shipped head: small, lossless in every way an answer can go and end, and faster in rounds than a word a round."""

import pytest

from specvlm import SpecVLM, load
from specvlm.demo import HEAD_DIR, MODEL_DIR, SMALL_DIR, train_head
from specvlm.demo.data import Encoder
from specvlm.demo.run import tasks
from specvlm.drafts import EagleDraft
from specvlm.training import DistillConfig
from tests.fakes import SAMPLING


@pytest.fixture(scope="module")
def model() -> SpecVLM:
    return load("demo")


@pytest.fixture(scope="module")
def prompts(model):
    return [model.prepare(task.picture, task.question) for task in tasks(2, seed=3)]


def test_the_package_stays_below_25_mb():
    assert sum(file.stat().st_size for folder in (MODEL_DIR, HEAD_DIR, SMALL_DIR) for file in folder.iterdir()) <= 25e6


def test_the_shipped_head_comes_with_the_shipped_target(model):
    assert isinstance(model.draft, EagleDraft)


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_answers_are_those_of_autoregressive_decoding(model, prompts, sampling):
    for prompt in prompts:
        plain = model.generate(**prompt, **sampling, seed=5, max_new_tokens=96, draft=None)
        drafted = model.generate(**prompt, **sampling, seed=5, max_new_tokens=96)
        assert drafted.tokens == plain.tokens
        assert drafted.stats.tau > 1.5


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8, 13])
def test_the_limit_cuts_an_accepted_run(model, prompts, limit):
    answer = model.generate(**prompts[0], max_new_tokens=96, draft=None).tokens
    assert model.generate(**prompts[0], max_new_tokens=limit).tokens == answer[:limit]


def test_stop_strings_and_the_end_cut_an_accepted_run(model, prompts):
    answer = model.generate(**prompts[0], max_new_tokens=160)
    assert answer.tokens[-1] in model.target.spec.eos_ids
    text = model.processor.tokenizer.decode(answer.tokens, skip_special_tokens=True)
    for stop in {word for word in text.split() if len(word) > 3}:
        plain, drafted = (
            model.generate(**prompts[0], max_new_tokens=160, stop_strings=[stop], **options).tokens
            for options in ({"draft": None}, {})
        )
        assert drafted == plain
        assert len(drafted) < len(answer.tokens)


def test_streams_do_not_disturb_each_other(model, prompts):
    alone = [model.generate(**prompt, max_new_tokens=60, draft=None).tokens for prompt in prompts]
    said: list[list[int]] = [[], []]
    streams = [model.stream(**prompt, max_new_tokens=60) for prompt in prompts]
    dropped = model.stream(**prompts[0], max_new_tokens=60)
    next(dropped)
    del dropped
    while any(left := [next(stream, None) for stream in streams]):
        for tokens, emitted in zip(said, left, strict=True):
            tokens += emitted.tokens[0] if emitted else []
    assert said == alone


def test_batches_hold_answers_and_mark_them(model):
    tokenizer = model.processor.tokenizer
    batch = train_head.batch_of(3, Encoder(tokenizer), size=3)
    again = train_head.batch_of(3, Encoder(tokenizer), size=3)
    assert batch.inputs["input_ids"].equal(again.inputs["input_ids"])
    for ids, answers in zip(batch.inputs["input_ids"], batch.answers, strict=True):
        used = ids[: int(answers.nonzero().max()) + 1]
        said = tokenizer.decode(ids[answers])
        assert said.startswith(" ")
        assert said.endswith("</s>")
        assert tokenizer.decode(used).endswith(f"ASSISTANT:{said}")
        assert (ids[len(used) :] == tokenizer.pad_token_id).all()


def test_a_run_writes_a_head_and_its_log_and_leaves_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(train_head, "BATCH", 2)
    train_head.train(tmp_path / "head", DistillConfig(steps=2, checkpoint_every=1))
    assert [path.name for path in tmp_path.iterdir()] == ["head"]
    assert EagleDraft.from_pretrained(tmp_path / "head").head.config.hidden_size == 256
    assert len((tmp_path / "head" / train_head.LOG_NAME).read_text().splitlines()) == 2
