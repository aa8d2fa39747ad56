"""Conversations as a target reads them: its chat template's text, its tokens, its picture rows, where answers are."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from specvlm.targets.base import Target
from specvlm.training.records import Example, Stored, Turn

#: Two pictures of different shapes: a target whose rows for both are as many has as many for all.
_PROBES = ((64, 64), (150, 50))


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation's tokens.

    Attributes:
        ids: [T] int64, a picture's token repeated for each of its rows.
        answers: [T] bool: what the target says, its EOS included.
        picture_ends: where each picture's tokens end.
    """

    ids: Tensor
    answers: Tensor
    picture_ends: tuple[int, ...]

    @property
    def lessons(self) -> int:
        """How many tokens there are to be guessed: those of an answer behind another of its tokens."""
        return int((self.answers[:-1] & self.answers[1:]).sum())

    def within(self, context: int) -> "Encoded":
        """What can be learned from within the first `context` tokens: all up to the last of an answer's.

        What stands behind that, a question whose picture would be cut, say, teaches nothing.
        """
        said = self.answers[:context].nonzero()
        length = int(said[-1]) + 1 if len(said) else 0
        ends = tuple(end for end in self.picture_ends if end <= length)
        return Encoded(self.ids[:length], self.answers[:length], ends)


class Encoder:
    """Encodes examples for a target, through its processor and chat template.

    Args:
        processor: the target's, with a chat template and a fast tokenizer.
        target: tells the context, and the ids of EOS and of pictures.

    Raises:
        ValueError: the processor lacks one of these.
    """

    def __init__(self, processor: Any, target: Target) -> None:
        if getattr(processor, "chat_template", None) is None:
            raise ValueError("processor: expected one with a chat template, got none")
        if not processor.tokenizer.is_fast:
            raise ValueError(f"processor: expected a fast tokenizer, got {type(processor.tokenizer).__name__}")
        self._processor, self._tokenizer = processor, processor.tokenizer
        self._image = target.model.config.image_token_id
        self._mark = self._tokenizer.convert_ids_to_tokens(self._image)
        self.context = target.spec.context
        end = self._tokenizer.eos_token
        ends = [self._tokenizer.convert_ids_to_tokens(token) for token in sorted(target.spec.eos_ids)]
        self._ends = [token for token in ([] if end is None else [end]) + ends if token]
        self.pad = self._tokenizer.pad_token_id or 0
        #: How many tokens stand for a picture of (width, height); and for any, if the size does not matter.
        self.rows = lru_cache(maxsize=4096)(self._rows)
        counts = {self._rows(size) for size in _PROBES}
        self._fixed = counts.pop() if len(counts) == 1 else None

    def sequence(self, example: Example, rows: Sequence[int]) -> Encoded:
        """The whole conversation.

        Args:
            rows: of each of its pictures.
        """
        return self._encode(*self._text(example, len(example.turns), ends_open=False), rows)

    def rows_of(self, stored: Stored) -> int:
        """How many tokens stand for a picture, of which no more is read than needs be."""
        return self._fixed or self.rows(stored.picture_size())

    def question(self, example: Example, turn: int) -> dict[str, Any]:
        """What `SpecVLM.generate` takes for the answer of a turn: all that was said before, and its question."""
        text, spans = self._text(example, turn + 1, ends_open=True)
        shown = sum(one.pictures for one in example.turns[: turn + 1])
        pictures = [stored.picture() for stored in example.pictures[:shown]]
        ids = self._encode(text, spans, [self.rows(picture.size) for picture in pictures]).ids[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | self.pixels(pictures)

    def pixels(self, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """The pictures as the target's `teach` takes them; nothing for none."""
        if not pictures:
            return {}
        made = self._processor.image_processor(images=list(pictures), return_tensors="pt")
        return {name: made[name] for name in ("pixel_values", "image_sizes") if name in made}

    def _rows(self, size: tuple[int, int]) -> int:
        blank = Image.new("RGB", size)
        ids = self._processor(images=[blank], text=self._mark, return_tensors="pt")["input_ids"]
        return int((ids == self._image).sum())

    def _encode(self, text: str, spans: Sequence[tuple[int, int]], rows: Sequence[int]) -> Encoded:
        bos = self._tokenizer.bos_token
        once = bos is None or not text.startswith(bos)  # some templates write it themselves
        found = self._tokenizer(text, add_special_tokens=once, return_offsets_mapping=True, verbose=False)
        ids = torch.tensor(found["input_ids"])
        starts, ends = torch.tensor(found["offset_mapping"]).unbind(dim=1)
        answers = torch.zeros(len(ids), dtype=torch.bool)
        for start, end in spans:
            answers |= (starts < end) & (ends > start) & (ends > starts)
        pictures = ids == self._image
        if int(pictures.sum()) != len(rows):
            raise ValueError(
                f"data: expected {len(rows)} {self._mark}, one a picture, in what the chat template makes, got "
                f"{int(pictures.sum())}"
            )
        repeats = torch.ones_like(ids)
        repeats[pictures] = torch.tensor(rows, dtype=torch.int64)
        picture_ends = repeats.cumsum(dim=0)[pictures].tolist()
        return Encoded(ids.repeat_interleave(repeats), answers.repeat_interleave(repeats), tuple(picture_ends))

    def _text(self, example: Example, turns: int, *, ends_open: bool) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's first turns as text, and where in it the answers are; the last may be left to be said.

        Answers that came to their end have an EOS token, which not every template writes.
        """
        messages: list[dict[str, Any]] = []
        text, said = "", ""  # what is made, and as much of the template's own text
        spans: list[tuple[int, int]] = []
        for number, turn in enumerate(example.turns[:turns], 1):
            messages.append(_asked(turn))
            prompt = self._template(messages, said, add_generation_prompt=True)
            new = prompt[len(said) :]
            if end := next((end for end in self._ends if text.endswith(end) and new.startswith(end)), ""):
                new = new[len(end) :]
            text += new
            if ends_open and number == turns:
                break
            answer = (turn.answer or "").strip()
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            whole = self._template(messages, prompt)
            lead, found, tail = whole[len(prompt) :].partition(answer)
            if not found:
                raise ValueError(f"processor: expected a chat template that repeats an answer, got {whole[-80:]!r}")
            spoken = lead + answer
            said = prompt + spoken
            end = next((end for end in self._ends if tail.startswith(end)), self._ends[0] if self._ends else "")
            spoken += end if turn.ended else ""
            spans.append((len(text), len(text) + len(spoken)))
            text += spoken
        return text, spans

    def _template(self, messages: list[dict[str, Any]], before: str, **options: Any) -> str:
        """The template's text, which has to go on from `before`."""
        text = self._processor.apply_chat_template(messages, **options)
        if not text.startswith(before):
            raise ValueError(
                "processor: expected a chat template whose conversations go on from their prompts, got "
                f"{text[:80]!r} behind {before[-80:]!r}"
            )
        return text


def _asked(turn: Turn) -> dict[str, Any]:
    content: list[dict[str, str]] = [{"type": "image"} for _ in range(turn.pictures)]
    return {"role": "user", "content": [*content, {"type": "text", "text": turn.question}]}
