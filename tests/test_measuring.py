"""Measuring drafts: every condition has its row, and an answer that differs shows."""

import pytest

from specvlm import SpecVLM
from specvlm.drafts import NGramDraft
from specvlm.measuring import Row, measure
from tests.fakes import ScriptedDraft, prompt_for, tiny_llava


@pytest.fixture(scope="module")
def model() -> SpecVLM:
    return SpecVLM(tiny_llava())


def measured(model: SpecVLM, drafts: dict, prompts: int = 2) -> list[Row]:
    asked = [prompt_for(model.target.model, seed=seed) for seed in range(prompts)]
    *_, rows = measure(model, asked, drafts, temperatures=(0.0, 1.0), repeats=2, max_new_tokens=24)
    return rows


def test_rows(model):
    lies = ScriptedDraft([5] * 200, depth=2)
    rows = measured(model, {None: None, "ngram": NGramDraft(), "lies": lies})
    assert [(row.draft, row.temperature) for row in rows] == [
        (name, temperature) for temperature in (0.0, 1.0) for name in (None, "ngram", "lies")
    ]
    assert all(row.identical for row in rows)
    assert all(row.decode.low <= row.decode.median <= row.decode.high for row in rows)
    assert all(row.end_to_end.median < row.decode.median for row in rows)
    assert all(0 < row.verify_share < 1 and 0 < row.host_share < 1 and row.host_ms > 0 for row in rows)
    assert [row.tau for row in rows if row.draft is None] == [1, 1]


def test_an_answer_that_differs_shows(model, monkeypatch):
    plain = SpecVLM.generate

    def faulty(self, **options):
        answer = plain(self, **options)
        if answer.stats.from_draft and options["seed"] == 1:
            answer.tokens[-1] += 1
        return answer

    monkeypatch.setattr(SpecVLM, "generate", faulty)
    knows = ScriptedDraft(model.generate(**prompt_for(model.target.model), max_new_tokens=40).tokens, depth=3)
    rows = measured(model, {None: None, "knows": knows}, prompts=1)
    assert [row.identical for row in rows if row.temperature == 0] == [True, False]
