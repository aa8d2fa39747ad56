"""`specvlm train`: what it leaves behind, what it takes up again, what it refuses."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from specvlm import SpecVLM, load
from specvlm.cli import main
from specvlm.config import Recipe, TrainConfig
from specvlm.drafts import BlockDraft, Eagle3Draft, EagleDraft, VLMDraft, load_draft
from specvlm.drafts.pairs import PairDraft
from specvlm.training import run as training
from specvlm.training.data import Batches
from specvlm.training.watching import read_metrics, tau_estimate
from tests.fakes import IMAGE_TOKEN, VOCAB, picture
from tests.training.datasets import small_data, small_target

RECIPE = Recipe(learning_rate=1e-3, checkpoint_every=2, feature_noise=0.1)


class Killed(BaseException):
    """What a test stops a run with."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(target: Path, data: Path, tmp_path: Path):
    """Settings of a training of 6 steps, 3 an epoch."""

    def config(**changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "target": str(target),
            "data": str(data),
            "out": str(tmp_path / "out"),
            "epochs": 2,
            "batch": 4,
            "micro_batch": 2,
            "intermediate_size": 64,
            "max_new_tokens": 12,
        }
        return TrainConfig(**settings | changes)

    return config


@pytest.fixture(autouse=True)
def without_plots(request, monkeypatch):
    """Plots take longer than trainings here; tests that are about them have them."""
    if "plots" not in request.node.name and "by_the_command" not in request.node.name:
        monkeypatch.setattr(training, "draw_plots", lambda metrics, out: [])


@pytest.fixture
def command(capsys):
    """Runs a command line in this process: exit status, stdout, stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return ended.value.code or 0, *capsys.readouterr()

    return command


def test_a_trained_draft_answers_by_the_command(command, target, data, tmp_path):
    out = tmp_path / "deep" / "head"
    line = ("train", "--target", target, "--data", data, "--out", out, "--batch", 4, "--micro-batch", 2)
    options = ("--epochs", 2, "--max-new-tokens", 12, "--learning-rate", 1e-3, "--betas", 0.9, 0.99, "--unrolled", 2)
    status, printed, notes = command(*line, *options, "--json")
    found = json.loads(printed)
    assert (status, found["steps"], found["epochs"], found["examples"]) == (0, 6, 2.0, 12)
    assert (found["truncated"], found["left_out"], found["left_over"]) == (0, 0, 0)
    assert found["tau"] >= 1
    assert [line.split(":")[0] for line in notes.splitlines()] == ["epoch 1.00", "epoch 2.00"]
    names = ["config.json", "losses.png", "metrics.jsonl", "model.safetensors", "tau.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert ["tau" in line for line in lines] == [False, False, True] * 2
    assert set(lines[0]) == {"step", "epoch", "loss", "cross_entropy", "feature", "agreement", "learning_rate"}
    assert lines[-1]["loss"] == pytest.approx(found["loss"], rel=1e-5)
    asked = ("--target", target, "--image", data.parent / "1.png", "--prompt", "what is it", "--max-new-tokens", 20)
    drafted = json.loads(command("generate", *asked, "--draft", out, "--json")[1])
    plain = json.loads(command("generate", *asked, "--json")[1])
    assert drafted["tokens"] == plain["tokens"]
    assert drafted["stats"]["rounds"] <= plain["stats"]["rounds"]


def test_for_people(command, target, data, tmp_path):
    line = ("train", "--target", target, "--data", data, "--out", tmp_path / "out", "--tau-prompts", 0)
    status, printed, notes = command(*line, "--batch", 4, "--steps", 1)
    assert status == 0
    assert printed == f"{tmp_path / 'out'}: 1 steps, 0.33 epochs of 12 examples\n"
    assert notes.startswith("epoch 0.33: loss ")


def test_the_examples_that_fill_no_step_are_told_first(config, capsys):
    found = training.train(config(batch=8, steps=2, tau_prompts=0), RECIPE)
    assert (found.examples, found.left_over) == (12, 4)
    told = "an epoch is 1 steps of 8 examples; 4 of the 12, others each time, are left over"
    notes = [line for line in capsys.readouterr().err.splitlines() if "epoch" in line]
    assert notes[0] == told
    assert [line.split(":")[0] for line in notes[1:]] == ["epoch 1.00", "epoch 2.00"]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"draft": "eagle3"}, Eagle3Draft),
        ({"draft": "block"}, BlockDraft),
        ({"draft": "vlm", "intermediate_size": None}, VLMDraft),
        ({"compressor": "text_only"}, EagleDraft),
        ({"compressor": '{"kind": "vispec", "queries": 3, "heads": 2}', "draft": "eagle3"}, Eagle3Draft),
        ({"vocabulary": "ids.json", "draft": "eagle3"}, Eagle3Draft),
    ],
    ids=str,
)
def test_drafts_of_every_kind(config, tmp_path, changes, kind):
    ids = [2, *range(20, 300, 3)]
    (tmp_path / "ids.json").write_text(json.dumps({"ids": ids}))
    if "vocabulary" in changes:
        changes = changes | {"vocabulary": str(tmp_path / "ids.json")}
    settings = config(steps=2, tau_prompts=1, **changes)
    assert training.train(settings, Recipe(checkpoint_every=1, learning_rate=1e-3)) is not None
    model, draft = load(settings.target), load_draft(settings.out)
    assert type(draft) is kind
    if "compressor" in changes:
        assert draft.head.config.compressor.kind in changes["compressor"]
    if issubclass(kind, PairDraft):
        everything = [token for token in range(VOCAB) if token != IMAGE_TOKEN]
        wanted = ids if "vocabulary" in changes else everything if kind is Eagle3Draft else None
        draft.bind(model.target)
        assert (None if draft.vocabulary is None else draft.vocabulary.tolist()) == wanted
    prompt = model.prepare(picture(3), "what is it") | {"max_new_tokens": 16}
    assert model.generate(**prompt, draft=draft).tokens == model.generate(**prompt).tokens


def test_a_gates_choices_are_in_the_metrics(config):
    elastic = {"kind": "select", "options": [["pool", 4], ["prune", 2], ["none", 1]]}
    settings = config(steps=3, tau_prompts=0, compressor=json.dumps(elastic))
    training.train(settings, Recipe(learning_rate=1e-3, rows_weight=0.1))
    for line in read_metrics(Path(settings.out) / "metrics.jsonl"):
        chosen = [share for name, share in line.items() if name.startswith("chose ")]
        assert len(chosen) == 3
        assert sum(chosen) == pytest.approx(1, abs=1e-4)
        assert line["GFLOPs saved"] > 0
        assert {"balance", "rows", "rows left"} <= line.keys()


def test_a_trained_draft_can_learn_on(config, tmp_path):
    training.train(config(tau_prompts=0), RECIPE)
    further = config(draft=str(tmp_path / "out"), out=str(tmp_path / "further"), intermediate_size=None, tau_prompts=0)
    training.train(further, Recipe(learning_rate=0.0))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "further"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_does_not_go_on_from_what_another_draft_has_become(config, tmp_path, monkeypatch):
    training.train(config(steps=1, tau_prompts=0), RECIPE)

    def killed(*args: object) -> None:
        raise Killed

    def further(draft: str) -> TrainConfig:
        return config(draft=draft, out=str(tmp_path / "further"), intermediate_size=None, steps=1, tau_prompts=0)

    with monkeypatch.context() as patched:
        patched.setattr(training, "save_draft", killed)
        with pytest.raises(Killed):
            training.train(further(str(tmp_path / "out")), RECIPE)
    (tmp_path / "out").rename(tmp_path / "other")
    with pytest.raises(ValueError, match=r"got one with data\.draft '.*out' instead of '.*other'$"):
        training.train(further(str(tmp_path / "other")), RECIPE)


def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_draft(config, tmp_path, monkeypatch):
    whole = config(out=str(tmp_path / "whole"), self_generate=True)
    training.train(whole, RECIPE)
    stopped = config(self_generate=True)

    def stop_at(owner: Any, name: str, count: int) -> None:
        """One run, to the `count`th call of a function."""
        calls, real = iter(range(count)), getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if next(calls, None) is None:
                raise Killed
            return real(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, counted)
            with pytest.raises(Killed):
                training.train(stopped, RECIPE)

    stop_at(SpecVLM, "generate", 3)
    part = tmp_path / "out" / "answers.jsonl.part"
    assert len(part.read_text().splitlines()) == 4
    with part.open("a") as file:
        file.write('[["half an ans')
    stop_at(SpecVLM, "generate", 4)
    assert len(part.read_text().splitlines()) == 8
    stop_at(Batches, "__call__", 5)  # in the third step, behind the first checkpoint
    stop_at(Batches, "__call__", 1)
    stop_at(training, "measured_tau", 0)
    stop_at(Batches, "__call__", 3)
    stop_at(training, "save_draft", 0)
    assert (tmp_path / "out" / "checkpoint.pt").exists()
    training.train(stopped, RECIPE)
    for name in ("model.safetensors", "metrics.jsonl", "answers.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_the_target_answers_itself(config, target):
    settings = config(self_generate=True, steps=1, tau_prompts=0)
    training.train(settings, RECIPE)
    model = load(target)
    header, *lines = (json.loads(line) for line in (Path(settings.out) / "answers.jsonl").read_text().splitlines())
    assert header["run"]["max_new_tokens"] == 12
    entries = [json.loads(line) for line in Path(settings.data).read_text().splitlines()]
    asked = [entry for entry in entries if entry["split"] == "train"]
    for entry, ((text, ended),) in zip(asked, lines, strict=True):
        inputs = model.prepare(Path(settings.data).parent / entry["image"], entry["question"])
        tokens = model.generate(**inputs, max_new_tokens=12).tokens
        assert text == model.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert ended == (tokens[-1] == 2)


def test_another_runs_folder_is_refused_with_what_differs(command, config, target, data, tmp_path, monkeypatch, capsys):
    def killed(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(training, "save_draft", killed)
        with pytest.raises(Killed):
            training.train(config(), RECIPE)
    capsys.readouterr()
    line = ("train", "--target", target, "--data", data, "--out", tmp_path / "out", "--batch", 4)
    options = ("--micro-batch", 2, "--epochs", 2, "--intermediate-size", 96, "--learning-rate", 1e-3)
    status, out, err = command(*line, *options, "--checkpoint-every", 5)
    assert (status, out) == (2, "")
    assert err == (
        f"error: checkpoint: expected this run's own in {tmp_path / 'out' / 'checkpoint.pt'}, got one with "
        "config.feature_noise 0.1 instead of 0.0, draft.intermediate_size 64 instead of 96\n"
    )
    other = small_data(tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"data.examples '\w+' instead of '\w+'$"):
        training.train(config(data=str(other)), RECIPE)
    training.train(config(), RECIPE)
    with pytest.raises(ValueError, match=r"out: expected a folder without a finished draft, got .*out, which holds"):
        training.train(config(), RECIPE)


def test_another_runs_answers_are_refused(config, tmp_path):
    training.train(config(self_generate=True, steps=1, tau_prompts=0), RECIPE)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(
        ValueError, match=r"answers: expected .*answers.jsonl, got .*run.max_new_tokens 12 instead of 9"
    ):
        training.train(config(self_generate=True, steps=1, tau_prompts=0, max_new_tokens=9), RECIPE)


def test_without_matplotlib_there_are_no_plots_but_a_note(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    training.train(config(tau_prompts=0), RECIPE)
    assert not list((tmp_path / "out").glob("*.png"))
    notes = capsys.readouterr().err
    assert notes.count("plots: expected matplotlib, which pip install 'specvlm[plots]' brings, got none") == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--data {data}/none.jsonl", "data: expected a .jsonl, .json or .tar file or a folder, got"),
        ("--batch 13", "micro_batch: expected a divisor of the batch of 13, got 2"),
        ("--batch 14", "batch: expected at most the 12 examples that there are to learn from, got 14"),
        ("--epochs 0", "epochs: expected an integer >= 1, got 0"),
        ("--learning-rate nan", "learning_rate: expected a finite number >= 0, got nan"),
        ("--schedule linear", "schedule: expected cosine or constant, got 'linear'"),
        ("--held-out 1", "held_out: expected a number in [0, 1), got 1.0"),
        ("--draft no/such/draft", "draft: expected 'ngram'"),
        (
            "--draft ngram",
            "draft: expected a EagleDraft or Eagle3Draft or VLMDraft or BlockDraft, which learn, got NGramDraft",
        ),
        ("--draft vlm --intermediate-size 8", "intermediate_size: expected none but for a fresh head, got 8"),
        ("--draft vlm --feature-noise 0.1", "feature_noise: expected 0, for a small model reads no features, got 0.1"),
        ("--draft block --compressor text_only", "compressor: expected none but for an EAGLE head, got text_only"),
        ("--draft vlm --vocabulary x", "vocabulary: expected none but for a head, got x"),
        ("--vocabulary no.json", "vocabulary: expected a JSON object with a list of ids in no.json"),
        ("--compressor nosuch", "compressor: expected a kind of text_only, decoupled, vispec"),
        ("--compressor {{x", "compressor: expected a kind or a JSON object, got '{x'"),
        ("--question <image>", "1 <image> for 0 pictures"),
        ("--device nosuchdevice", "device: expected"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(command, target, data, tmp_path, options, problem):
    (data.parent / "captions.jsonl").write_text('{"caption": "a"}\n')
    line = f"train --target {target} --data {data} --out {tmp_path / 'out'} --micro-batch 2 --batch 4 --steps 1"
    given = options.format(data=data.parent)
    if "--question" in options:
        given += f" --data {data.parent / 'captions.jsonl'}"
    status, out, err = command(*line.split(), *given.split())
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert problem in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out" / "config.json").exists()


def test_metrics_that_were_broken_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert list(read_metrics(path)) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_tau_of_a_chain():
    assert tau_estimate(0.0, 5) == 1
    assert tau_estimate(1.0, 5) == 6
    assert tau_estimate(0.5, 3) == 1.875
