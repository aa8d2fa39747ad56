"""The shipped head: small, lossless in every way an answer can go and end, and faster in rounds than a word a round."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from specvlm import SpecVLM, load
from specvlm.compressors import TextOnlyConfig
from specvlm.demo import HEAD_DIR, MODEL_DIR, SMALL_DIR, train_head
from specvlm.demo.data import Encoder
from specvlm.demo.run import tasks
from specvlm.drafts import EagleDraft
from specvlm.options import run
from specvlm.training import DistillConfig
from specvlm.training.students import eagle_head
from tests.fakes import SAMPLING

DOCS = Path(__file__).parents[2] / "docs" / "training.md"


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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_of_8_bits_guess_as_well(model, prompts, temperature):
    """Over 16 questions tau was 5.34 beside the whole weights' 5.31, and the same at temperature 1."""
    small = model.draft.quantized()
    for prompt in prompts:
        options = prompt | {"temperature": temperature, "seed": 5, "max_new_tokens": 96}
        whole, rounded = (model.generate(**options, draft=draft) for draft in (model.draft, small))
        assert rounded.tokens == whole.tokens
        assert rounded.stats.tau > 0.9 * whole.stats.tau
    assert "e4m3" not in model.draft.sizes


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


@pytest.fixture
def quick(monkeypatch):
    """Batches of two examples, and no decoding."""
    batch_of = train_head.batch_of
    monkeypatch.setattr(train_head, "batch_of", lambda step, encoder: batch_of(step, encoder, size=2))
    monkeypatch.setattr(train_head, "measured_tau", lambda model, draft: 1.0)


def test_a_run_writes_a_head_and_its_log_and_leaves_nothing_else(tmp_path, quick):
    train_head.train(tmp_path / "head", train_head.HEAD, DistillConfig(steps=2, checkpoint_every=1))
    assert [path.name for path in tmp_path.iterdir()] == ["head"]
    assert EagleDraft.from_pretrained(tmp_path / "head").head.config.hidden_size == 256
    assert len((tmp_path / "head" / train_head.LOG_NAME).read_text().splitlines()) == 2


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run(train_head.app, "train_head", [str(argument) for argument in arguments])
    return ended.value.code or 0


def test_without_options_the_command_trains_the_shipped_head(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(train_head, "train", lambda *given: trained.append(given))
    assert command("--out", tmp_path) == 0
    ((out, head, config),) = trained
    assert (out, config) == (tmp_path, DistillConfig(**asdict(train_head.RECIPE), steps=3000))
    draft = EagleDraft.from_pretrained(HEAD_DIR)
    assert eagle_head(head, load("demo").target).head.config == draft.head.config


def test_the_documented_command_trains_a_head_that_reads_no_picture(tmp_path, quick, model, prompts, monkeypatch):
    line = re.search(r"^(python -m specvlm.demo.train_head .*) &&", DOCS.read_text(), re.M)
    _, _, _, *arguments = shlex.split(line[1])
    used = []
    train = train_head.train
    monkeypatch.setattr(train_head, "train", lambda *given: used.append(given[2]) or train(*given))
    assert command(*arguments, "--steps", 2, "--out", tmp_path / "head") == 0
    (config,) = used
    assert (config.unrolled, config.learning_rate, config.warm_up) == (3, 3e-3, train_head.RECIPE.warm_up)
    draft = EagleDraft.from_pretrained(tmp_path / "head")
    assert draft.head.config.compressor == TextOnlyConfig()
    plain, drafted = (model.generate(**prompts[0], max_new_tokens=8, draft=given).tokens for given in (None, draft))
    assert drafted == plain


def test_a_head_that_cannot_be_is_refused_before_anything_is_written(tmp_path, capsys):
    assert command("--out", tmp_path / "head", "--compressor", "nosuch") == 2
    assert "\nerror: compressor: expected a kind of text_only, decoupled" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
