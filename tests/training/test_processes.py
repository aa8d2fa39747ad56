"""Trainings in processes of their own: killed at any moment, or several that share the work."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.datasets import small_data, small_target

pytestmark = pytest.mark.slow

PYTHON = (sys.executable, "-m")
TRAIN = ("specvlm", "train")
#: A compressor whose gate draws in training.
ELASTIC = json.dumps({"kind": "select", "options": [["pool", 4], ["prune", 2], ["none", 1]]})


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options of a training on a small target; the checkpoints are far enough apart to lose steps."""
    target = small_target(tmp_path_factory.mktemp("target"))
    data = small_data(tmp_path_factory.mktemp("data"), count=28)
    sizes = ("--batch", "8", "--micro-batch", "2", "--intermediate-size", "64", "--max-new-tokens", "12")
    options = ("--learning-rate", "1e-3", "--feature-noise", "0.1", "--unrolled", "2", "--checkpoint-every", "7")
    return ("--target", str(target), "--data", str(data), *sizes, *options)


def started(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_weights(line, tmp_path):
    line = (*line, "--self-generate", "--steps", "60", "--tau-prompts", "2")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended(started(*PYTHON, *TRAIN, *line, "--out", str(whole)))

    def kill_when(moment: Callable[[], bool]) -> None:
        process = started(*PYTHON, *TRAIN, *line, "--out", str(killed))
        while not moment():
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL

    kill_when(lambda: lines_in(killed / "answers.jsonl.part") > 5)
    for steps in (3, 16, 30):
        kill_when(lambda steps=steps: lines_in(killed / "metrics.jsonl") >= steps)
    before = (killed / "checkpoint.pt").stat().st_mtime_ns
    kill_when(lambda: (killed / "checkpoint.pt").stat().st_mtime_ns != before)  # as soon as it is renamed
    ended(started(*PYTHON, *TRAIN, *line, "--out", str(killed)))
    for name in ("answers.jsonl", "metrics.jsonl", "model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.parametrize(
    "options",
    [("--draft", "eagle"), ("--draft", "eagle3"), ("--compressor", ELASTIC, "--rows-weight", "0.1")],
    ids=["eagle", "eagle3", "elastic"],
)
def test_two_processes_train_the_same_draft_as_one(line, tmp_path, options):
    line = (*line, *options, "--steps", "8", "--self-generate")
    ended(started(*PYTHON, *TRAIN, *line, "--out", str(tmp_path / "one")))
    torchrun = ("torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m")
    out = ended(started(*PYTHON, *torchrun, *TRAIN, *line, "--device", "cpu", "--out", str(tmp_path / "two")))
    assert out.count("8 steps") == 1
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    apart = max(float((one[name].float() - two[name].float()).abs().max()) for name in one)
    assert apart < 1e-5
    logs = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("one", "two")]
    assert [at["step"] for at in logs[1]] == list(range(1, 9))
    for mine, theirs in zip(*logs, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        assert theirs["agreement"] == pytest.approx(mine["agreement"], abs=1e-6)


def test_processes_that_cannot_share_a_batch(line, tmp_path):
    torchrun = ("torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m")
    process = started(
        *PYTHON, *torchrun, *TRAIN, *line, "--batch", "2", "--device", "cpu", "--out", str(tmp_path / "out")
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode
    assert "error: batch: expected a multiple of 2 examples in each of 2 processes, got 2" in err
