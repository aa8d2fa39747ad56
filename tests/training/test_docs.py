"""docs/training.md: its commands can be given, and what heads read of pictures by them can be built."""

import re
import shlex
from pathlib import Path

import pytest

from specvlm import load
from specvlm.cli import main
from specvlm.compressors import BY_KIND
from specvlm.compressors.primitives import PRIMITIVES
from specvlm.training import run as training
from specvlm.training.students import new_draft

TEXT = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
COMMANDS = re.findall(r"^(?:torchrun .* -m )?(specvlm train .*)$", TEXT, re.M)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_can_be_given(line, monkeypatch):
    asked = []
    monkeypatch.setattr(training, "train", lambda *given: asked.append(given))
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(line)[1:])
    assert not ended.value.code
    ((config, _),) = asked
    if config.target == "demo":
        new_draft(config, load("demo").target, seed=0)


def test_there_are_commands_and_they_name_everything():
    assert len(COMMANDS) == 4
    assert all(f"`{name}`" in TEXT for name in (*BY_KIND, *PRIMITIVES))
