"""Answers that the target says itself, by our own decoder: what it will say is what a draft has to know."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from specvlm.decoder import SpecVLM
from specvlm.training.checkpoint import refuse_others
from specvlm.training.encoding import Encoder
from specvlm.training.records import Example, Turn


def generate_answers(
    model: SpecVLM,
    encoder: Encoder,
    examples: Sequence[Example],
    path: Path,
    *,
    max_new_tokens: int,
    about: Mapping[str, Any],
    show: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes the target's answers to all questions to `path`, greedy, each turn behind its own answers before it.

    A run that was stopped goes on behind its last whole line, in a file beside, which becomes `path` when all is said.

    Args:
        about: what the answers follow from; answers of another run are refused.
        show: is told how many examples are done.

    Raises:
        ValueError: `path`, or what is beside it, is another run's: the fields that differ are named.
    """
    header = {"run": {"max_new_tokens": max_new_tokens, **about}}
    if path.exists():
        refuse_others("answers", path, next(_lines(path), {}), header)
        show(len(examples))
        return
    part = path.with_name(f"{path.name}.part")
    done = max(0, sum(1 for _ in _whole_lines(part, header)) - 1)
    with part.open("a") as file:
        if not file.tell():
            file.write(json.dumps(header) + "\n")
        for number in range(done, len(examples)):
            show(number)
            said = _answers(model, encoder, examples[number], max_new_tokens)
            file.write(json.dumps([[turn.answer, turn.ended] for turn in said]) + "\n")
            file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    show(len(examples))


def with_answers(examples: Sequence[Example], path: Path) -> list[Example]:
    """The examples with the answers in `path`, up to the turn that the target had nothing to say to."""
    lines = _lines(path)
    next(lines)
    found = []
    for one, said in zip(examples, lines, strict=True):
        turns = tuple(
            replace(turn, answer=answer, ended=ended) for turn, (answer, ended) in zip(one.turns, said, strict=False)
        )
        found.append(replace(one, turns=turns))
    return [one for one in found if one.turns]


def _answers(model: SpecVLM, encoder: Encoder, example: Example, max_new_tokens: int) -> list[Turn]:
    """The turns that have an answer within the context, as far as they go."""
    said: list[Turn] = []
    for number, turn in enumerate(example.turns):
        asked = replace(example, turns=(*said, *example.turns[number:]))
        inputs = encoder.question(asked, number)
        room = min(max_new_tokens, encoder.context - inputs["input_ids"].shape[1])
        if room < 1:
            break
        tokens = model.generate(**inputs, max_new_tokens=room, draft="ngram").tokens
        text = model.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        if not text:
            break
        said.append(replace(turn, answer=text, ended=tokens[-1] in model.target.spec.eos_ids))
    return said


def _lines(path: Path) -> Iterator[Any]:
    with path.open() as file:
        for line in file:
            yield json.loads(line)


def _whole_lines(part: Path, header: Mapping[str, Any]) -> Iterator[bytes]:
    """The lines of a file that was broken off, which is cut behind them; its first is to be `header`."""
    if not part.exists():
        return
    lines = part.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    os.truncate(part, sum(len(line) for line in lines))
    if lines:
        refuse_others("answers", part, json.loads(lines[0]), header)
    yield from lines
