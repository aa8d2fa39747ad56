"""Measuring drafts: every condition has its row, and an answer that differs shows."""

import time

import pytest

from specvlm import SpecVLM
from specvlm.drafts import NGramDraft, VLMDraft
from specvlm.measuring import Row, measure
from specvlm.trace import Trace, TracedDraft, TracedTarget
from specvlm.tree import Growth
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
    assert all(row.draft_share == 0 and 0 < row.growth_share < row.host_share for row in rows), "none has a model"
    assert [row.tau for row in rows if row.draft is None] == [1, 1]


def test_growing_a_tree_is_the_hosts_time(model, monkeypatch):
    forwards, growing, slowness = [], [], 0.003

    def slow(call, calls):
        def slower(*args):
            calls.append(None)
            time.sleep(slowness)
            return call(*args)

        return slower

    draft = VLMDraft(tiny_llava())
    monkeypatch.setattr(draft, "logits", slow(draft.logits, forwards))
    monkeypatch.setattr(draft, "forward", slow(draft.forward, forwards))
    monkeypatch.setattr(Growth, "expand", slow(Growth.expand, growing))
    prompt = prompt_for(model.target.model)
    trace = Trace()
    traced = SpecVLM.from_target(TracedTarget(model.target, trace), TracedDraft(draft, trace))
    answer = traced.generate(**prompt, max_new_tokens=12)
    asked = len(forwards) - 1  # the first reads the prompt, which is before the first round
    assert asked > 2 * answer.stats.rounds
    assert trace.draft >= asked * slowness
    assert trace.growth >= len(growing) * slowness
    assert trace.draft + trace.growth == pytest.approx(trace.propose)
    assert trace.propose + trace.verify < answer.stats.decode_seconds


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
