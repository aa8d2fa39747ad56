"""The documented comparison of heads, small: a head against itself."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from bench import compare
from specvlm.demo import HEAD_DIR
from specvlm.demo.grammar import TYPES

DOCS = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.mark.slow
def test_a_head_against_the_shipped_one(tmp_path, monkeypatch, capsys):
    line = re.search(r"&& python -m bench.compare (.*)$", DOCS.read_text(), re.M)
    given = [str(HEAD_DIR) if word == "build/head" else word for word in shlex.split(line[1])]
    small = ["--prompts", "1", "--repeats", "1", "--tokens", "16", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["compare", *given, *small])
    compare.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["prompts"] == len(TYPES)
    taus = {(row["draft"], row["temperature"]): row["tau"] for row in found["rows"]}
    assert len(taus) == 6
    for temperature in (0.0, 1.0):
        assert taus[str(HEAD_DIR), temperature] == taus["the shipped head", temperature] > taus[None, temperature] == 1
    assert all(row["identical"] for row in found["rows"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads.jsonl", "heads.md", "heads.png"]
