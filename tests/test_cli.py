"""The command line: what it prints, what it exits with, and what it says to bad input."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest

from specvlm import GenerateConfig, SpecVLM, load
from specvlm.cli import main
from specvlm.config import Recipe, TrainConfig
from specvlm.doctor import Diagnosis, Finding
from specvlm.equality import Comparison, Divergence
from specvlm.vocabulary import read_vocabulary
from tests.fakes import VOCAB, picture, tiny_llava, tiny_processor

QUESTION = "what is it"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target on disk, and a picture beside it."""
    folder = tmp_path_factory.mktemp("target")
    tiny_llava().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    picture().save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def model(folder) -> SpecVLM:
    return load(folder, draft="ngram")


@pytest.fixture
def run(capsys):
    """Runs a command line in this process: exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return ended.value.code or 0, *capsys.readouterr()

    return run


def asking(folder: Path, *options: object) -> tuple[object, ...]:
    return ("--target", folder, "--draft", "ngram", "--image", folder / "picture.png", "--prompt", QUESTION, *options)


def test_without_a_command_it_says_which_there_are(run):
    status, out, err = run()
    assert (status, err) == (0, "")
    assert all(f"\n  {command} " in out for command in ("demo", "generate", "check", "train", "vocab", "doctor"))


def test_version(run):
    assert run("--version") == (0, f"specvlm {version('specvlm')}\n", "")


@pytest.mark.parametrize(
    ("command", "configs"),
    [("generate", [GenerateConfig]), ("check", [GenerateConfig]), ("train", [TrainConfig, Recipe])],
)
def test_the_options_of_a_command_are_the_fields_of_its_configs(run, command, configs):
    out = " ".join(run(command, "--help")[1].replace("-\n", "-").split())
    for option in (option for config in configs for option in fields(config)):
        assert "--" + option.name.replace("_", "-") in out
        assert option.metadata["help"] in out


def test_generate_streams_the_answer_and_tells_the_rest_on_stderr(run, folder, model):
    status, out, err = run("generate", *asking(folder, "--max-new-tokens", 40))
    assert status == 0
    assert out == model.ask(folder / "picture.png", QUESTION, max_new_tokens=40) + "\n"
    assert "40 tokens in" in err
    assert "\x1b" not in out + err


def test_generate_for_machines(run, folder, model):
    status, out, err = run("generate", *asking(folder, "--max-new-tokens", 30, "--json"))
    expected = model.generate(**model.prepare(folder / "picture.png", QUESTION), max_new_tokens=30)
    found = json.loads(out)
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert found["tokens"] == expected.tokens
    assert found["text"] == model.processor.tokenizer.decode(expected.tokens, skip_special_tokens=True).strip()
    assert found["stats"]["tokens"] == 30
    assert found["stats"]["tau"] == expected.stats.tau


def test_sampling_options_reach_the_decoder(run, folder, model):
    options = {"max_new_tokens": 60, "temperature": 1.2, "top_k": 40, "top_p": 0.9, "seed": 5}
    inputs = model.prepare(folder / "picture.png", QUESTION)
    whole = model.generate(**inputs, **options).tokens
    flags = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), value)]
    assert json.loads(run("generate", *asking(folder, *flags, "--json"))[1])["tokens"] == whole
    stops = [text for token in whole[20:] if (text := model.processor.tokenizer.decode([token])).isalpha()][:2]
    flags += [part for stop in stops for part in ("--stop-strings", stop)]
    stopped = json.loads(run("generate", *asking(folder, *flags, "--json"))[1])["tokens"]
    assert stopped == model.generate(**inputs, **options, stop_strings=stops).tokens
    assert len(stopped) < len(whole)


def test_pictures_may_be_several_or_none(run, folder, model):
    two = ("--image", folder / "picture.png", "--image", folder / "picture.png")
    none = ("--target", folder, "--prompt", QUESTION, "--max-new-tokens", 5, "--json")
    counts = [json.loads(run("generate", *none, *images)[1])["tokens"] for images in ((), two[:2], two)]
    assert len({tuple(tokens) for tokens in counts}) == 3


def test_check_of_equal_answers(run, folder):
    status, out, err = run("check", *asking(folder, "--max-new-tokens", 20))
    assert (status, err) == (0, "")
    assert out.startswith("prompt 0: equal, 20 tokens, tau ")
    assert out.endswith("\n1 of 1 equal\n")


def test_check_reads_a_file_of_prompts(run, folder):
    lines = [{"prompt": QUESTION, "image": "picture.png"}, {"prompt": "a circle", "image": ["picture.png"] * 2}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--target", folder, "--draft", "ngram", "--max-new-tokens", 8, "--temperature", 1)
    status, out, _ = run("check", *options, "--prompts", folder / "prompts.jsonl", "--json")
    found = json.loads(out)
    assert (status, found["equal"]) == (0, True)
    assert [(one["tokens"], one["divergence"]) for one in found["prompts"]] == [(8, None)] * 2


@pytest.mark.parametrize(
    ("divergence", "said"),
    [
        (
            Divergence(3, 70, 71, 0.0123),
            "differs at token 3: 70 'B' by AR, 71 'C' with the draft, 0.0123 apart in logits",
        ),
        (Divergence(3, 70, None, None), "differs at token 3: 70 'B' by AR, the end with the draft"),
    ],
)
def test_check_of_answers_that_differ(run, folder, model, monkeypatch, divergence, said):
    words = [model.processor.tokenizer.decode([token]) for token in (70, 71)]
    said = said.replace("'B'", repr(words[0])).replace("'C'", repr(words[1]))
    monkeypatch.setattr("specvlm.equality.compare", lambda *arguments: Comparison(9, 1.0, divergence))
    assert run("check", *asking(folder)) == (1, f"prompt 0: {said}\n0 of 1 equal\n", "")
    status, out, _ = run("check", *asking(folder, "--json"))
    assert (status, json.loads(out)["equal"]) == (1, False)


def test_vocab(run, folder, model, tmp_path):
    (tmp_path / "a.txt").write_text("what is it\nwhat is it\n")
    (tmp_path / "b.jsonl").write_text('{"caption": "it is"}\n')
    line = ("vocab", "--target", folder, "--text", tmp_path / "a.txt", "--text", tmp_path / "b.jsonl")
    ids = [token for text in ("what is it",) * 2 + ("it is",) for token in model.processor.tokenizer.encode(text)]
    status, out, err = run(*line, "--keep", VOCAB - 1, "--out", tmp_path / "v.json")
    assert (status, err) == (0, "")
    assert out == f"319 of 320 ids: 100.00% of {len(ids)} tokens in 3 documents\n"
    assert len(read_vocabulary(tmp_path / "v.json", model.target.spec)) == VOCAB - 1
    status, out, err = run(*line, "--keep", 3, "--out", tmp_path / "v.json", "--json")
    found = read_vocabulary(tmp_path / "v.json", model.target.spec)
    assert found == sorted(sorted(set(ids), key=lambda token: (-ids.count(token), token))[:3])
    assert (status, err) == (0, "")
    assert json.loads(out) == {
        "out": str(tmp_path / "v.json"),
        "ids": 3,
        "vocab_size": VOCAB,
        "documents": 3,
        "tokens": len(ids),
        "share": sum(token in found for token in ids) / len(ids),
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.jsonl", "v.json"]


def test_a_vocabulary_that_fails_leaves_the_old_one(run, folder, tmp_path):
    (tmp_path / "v.json").write_text("old")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 300 + "{}\n")
    line = ("vocab", "--target", folder, "--text", tmp_path / "a.jsonl", "--keep", 3, "--out", tmp_path / "v.json")
    assert run(*line)[0] == 2
    assert (tmp_path / "v.json").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_doctor(run, monkeypatch):
    findings = [Finding("draw", 0.0, None), Finding("accept", None, "E: x"), Finding("write_kv", None, "E: x")]
    sick = Diagnosis({"torch": "2", "triton": None}, None, "interpreted", findings)
    well = Diagnosis({"torch": "2"}, "a GPU", "compiled", findings[:1])
    for diagnosis, expected in ((sick, 1), (well, 0)):
        monkeypatch.setattr("specvlm.doctor.diagnose", lambda diagnosis=diagnosis: diagnosis)
        status, out, err = run("doctor")
        assert (status, err) == (expected, "")
        assert ("accept, write_kv: E: x\n" in out) == bool(expected)
        assert all(text in out for text in ("torch", diagnosis.how, "0.0e+00", "agrees"))
        status, out, err = run("doctor", "--json")
        found = json.loads(out)
        assert (status, err, found["healthy"]) == (expected, "", not expected)
        assert found["findings"][0] == {"op": "draw", "error": 0.0, "problem": None}


@pytest.fixture(scope="module")
def broken(folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bad files: no picture, no prompts, and a target whose weights end too soon."""
    broken = tmp_path_factory.mktemp("broken")
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    (broken / "text.png").write_text("no picture")
    (broken / "empty.jsonl").write_text("")
    (broken / "text.txt").write_text("a red circle")
    (broken / "bad.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    return broken


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("nosuchcommand", "No such command 'nosuchcommand'."),
        ("generate {ask} --nosuchoption 3", "No such option: --nosuchoption"),
        ("generate --target {good} --image {good}/picture.png", "Missing option '--prompt'."),
        ("generate {ask} --top-k many", "Invalid value for '--top-k'"),
        ("generate {ask} --temperature=-1", "temperature: expected a finite number >= 0, got -1.0"),
        ("generate {ask} --temperature nan", "temperature: expected a finite number >= 0, got nan"),
        ("generate {ask} --top-p 0", "top_p: expected a number in (0, 1], got 0.0"),
        ("generate {ask} --top-p 1.01", "top_p: expected a number in (0, 1], got 1.01"),
        ("generate {ask} --top-k=-1", "top_k: expected an integer from 0 to 2147483647, got -1"),
        ("generate {ask} --max-new-tokens 0", "max_new_tokens: expected an integer >= 1, got 0"),
        ("generate {ask} --max-new-tokens 9999", "max_new_tokens: expected at most 4"),
        ("generate {ask} --dtype int4", "dtype: expected float32, float16, bfloat16, got 'int4'"),
        ("generate {ask} --device nosuchdevice", "device: expected"),
        ("generate {ask} --draft no/such/draft", "draft: expected 'ngram'"),
        ("generate --target /no/such/model --prompt x", "target: expected a model folder or hub id"),
        ("generate --target {bad} --prompt x", "target: expected whole safetensors files in"),
        ("generate --target {good} --image {bad}/text.png --prompt x", "image: expected a whole picture file"),
        ("generate --target {good} --image {bad}/none.png --prompt x", "image: expected a whole picture file"),
        ("generate --target {good} --prompt <image>", "question: expected one that"),
        ("generate {ask}<image>", "question: expected one that"),
        ("check --target {good} --prompt x", "draft: expected one to check, got none"),
        ("check --target {good} --draft ngram", "prompt: expected --prompt or --prompts, got neither"),
        ("check {ask} --draft ngram --prompts {bad}/bad.jsonl", "prompt: expected --prompt or --prompts, got both"),
        ("check --target {good} --prompts {bad}/bad.jsonl --image x", "image: expected pictures in the file"),
        ("check --target {good} --prompts {bad}/bad.jsonl", "prompts: expected a JSON object with a prompt in line 2"),
        ("check --target {good} --prompts {bad}/empty.jsonl", "prompts: expected at least one line"),
        (
            "check --target {good} --prompts {bad}/none.jsonl",
            "prompts: expected a file that can be read, got [Errno 2]",
        ),
        ("vocab --target {good} --keep 9 --out {out}", "Missing option '--text'."),
        ("vocab {count} --keep many --out {out}", "Invalid value for '--keep'"),
        ("vocab {count} --keep 0 --out {out}", "keep: expected an integer from 1 to 319, got 0"),
        ("vocab {count} --keep 320 --out {out}", "keep: expected an integer from 1 to 319, got 320"),
        ("vocab {count} --keep 9 --out {bad}", "out: expected a file in a folder that is there, got"),
        ("vocab {count} --keep 9 --out {bad}/none/v.json", "out: expected a file in a folder that is there, got"),
        ("vocab {count} --text {bad}/none.txt --keep 9 --out {out}", "[Errno 2] No such file or directory"),
        ("vocab {count} --text {bad}/text.png --keep 9 --out {out}", "text: expected a .txt or .jsonl file, got"),
        ("vocab {count} --text {bad}/bad.jsonl --keep 9 --out {out}", "text: expected a JSON object with a text or"),
        ("vocab --target {good} --text {bad}/empty.jsonl --keep 9 --out {out}", "text: expected at least one token"),
        ("vocab --target {bad}/none --text {bad}/text.txt --keep 9 --out {out}", "target: expected a model folder"),
        ("demo --picture {bad}/none/x.png", "picture: expected where a picture file can be written, got"),
        ("demo --picture {bad}/x.docx", "unknown file extension: .docx"),
        ("demo --picture {bad}", "picture: expected where a picture file can be written, got"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(run, folder, broken, line, problem):
    ask = f"--target {folder} --image {folder}/picture.png --prompt x"
    count, written = f"--target {folder} --text {broken}/text.txt", broken / "v.json"
    status, out, err = run(*line.format(ask=ask, good=folder, bad=broken, count=count, out=written).split())
    assert not written.exists()
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert problem in err
    assert err.count("\n") == 1


def test_a_prompt_beyond_the_context(run, folder):
    status, _, err = run("generate", "--target", folder, "--image", folder / "picture.png", "--prompt", "z " * 300)
    assert (status, err[:57]) == (2, "error: input_ids: expected at most the context of 512 tok")


@pytest.mark.parametrize("start", [["-m", "specvlm"], ["-c", "import specvlm.cli; specvlm.cli.main()"]])
def test_a_process_of_its_own_shows_no_traceback(start):
    line = [sys.executable, *start, "generate", "--target", "/no/such/model", "--prompt", "x"]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: target: expected")
    assert done.stderr.count("\n") == 1


class TestDemo:
    def test_rows_for_machines(self, run, tmp_path):
        status, out, err = run("demo", "--json", "--picture", tmp_path / "scene.png")
        found = json.loads(out.splitlines()[-1])
        assert (status, err) == (0, "")
        assert (tmp_path / "scene.png").is_file()
        rows = {(row["draft"], row["temperature"]): row for row in found["rows"]}
        assert {draft for draft, _ in rows} == {None, "ngram", "eagle", "vlm"}
        assert len(rows) == 2 * len({draft for draft, _ in rows})
        for (draft, _), row in rows.items():
            assert row["identical"] is True
            assert row["tau"] == 1 if draft is None else row["tau"] >= 1
            assert row["tokens_per_second"] > row["end_to_end_tokens_per_second"] > 0
        assert found["right"] is True

    @pytest.mark.parametrize(
        ("seconds", "said"), [(0, "\none repeat over 2 "), (1e9, "\nmedians of 3 repeats over 2 ")]
    )
    def test_for_people(self, run, tmp_path, monkeypatch, seconds, said):
        monkeypatch.setattr("specvlm.demo.run.SECONDS", seconds)
        status, out, err = run("demo", "--picture", tmp_path / "scene.png")
        assert (status, err) == (0, "")
        assert "\x1b" not in out
        assert said in out
        assert f"picture   {tmp_path / 'scene.png'}\n" in out
        assert all(
            word in out
            for word in (
                "scene",
                "question",
                "answer",
                "none (AR)",
                "ngram",
                "eagle",
                "identical",
                "true of the scene, and complete",
            )
        )
