"""The recorded trainings: the tables are those of the figures, and no line has what the benchmark does not write."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.machine import machine
from bench.training import VARIANTS, by_epoch, plots, table

RESULTS = Path(__file__).parents[2] / "bench" / "results"
NAMES = ("training", "training-captions")


def recorded(name: str, kind: str) -> list[dict[str, Any]]:
    """The lines of a kind, temperatures as numbers again."""
    lines = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
    return [
        {
            name: {float(t): value for t, value in told.items()} if name in ("tau", "tokens/s", "x AR") else told
            for name, told in line.items()
        }
        for line in lines
        if line["kind"] == kind
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_tables_are_those_of_the_figures(name, tmp_path):
    runs, rows, text = recorded(name, "training"), recorded(name, "row"), (RESULTS / f"{name}.md").read_text()
    assert [row["variant"] for row in rows] == list(VARIANTS)
    assert f"\n\n{table(rows)}\n\n" in text
    assert f"\n\n{by_epoch(runs)}\n\n" in text
    plots(runs, rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size


@pytest.mark.parametrize("name", NAMES)
def test_a_trainings_line_has_nothing_that_the_benchmark_does_not_write(name):
    known = {*machine(), "corpus", "examples an epoch", "epochs", "workers", "kind", "variant", "seed"}
    assert all(run.keys() <= known for run in recorded(name, "training"))
