"""README's examples run, and its figures are those of the files that it names."""

import json
import re
from pathlib import Path

from specvlm import load
from specvlm.vocabulary import write_vocabulary

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_examples_run(tmp_path, monkeypatch):
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) == 4
    spec = load("demo").target.spec
    write_vocabulary(tmp_path / "frequent.json", [token for token in range(500) if token not in spec.media_ids])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names: dict[str, object] = {}
    for example in examples:
        exec(example, names)
    assert names["answer"].tokens == names["model"].generate(**names["inputs"], draft=None).tokens
    assert names["out"].shape == (1, 4, 8, 64)


def test_the_speeds_are_the_measured_ones():
    lines = (ROOT / "bench/results/compare.jsonl").read_text().splitlines()
    measured = {(row["draft"], row["temperature"]): row for row in map(json.loads, lines)}
    shown = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in README.splitlines() if "two CPU" in line
    ]
    assert len(shown) == 8
    for _, _, draft, temperature, *figures in shown:
        row = measured[None if draft == "none (AR)" else draft, float(temperature)]
        plain = measured[None, float(temperature)]["decode"]["median"]
        decode, end = row["decode"]["median"], row["end_to_end"]["median"]
        assert figures == [f"{decode:.0f}", f"{end:.0f}", f"{row['tau']:.2f}", f"{decode / plain:.2f}"]
        assert row["identical"]
