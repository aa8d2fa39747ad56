"""Batches of examples: of like length, in an order that follows from seed and epoch, pictures read when needed."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import torch
from torch import Tensor

from specvlm.targets.hf import HFTarget
from specvlm.training.encoding import Encoder
from specvlm.training.objectives import Batch
from specvlm.training.records import Example, Stored

#: Batches whose examples are sorted by length together.
_SORTED: Final = 32
_NAMED: Final = 10


@dataclass(frozen=True, slots=True)
class Split:
    """Examples to learn from, and others to measure with."""

    training: list[Example]
    held_out: list[Example]


def split(examples: Sequence[Example], share: float) -> Split:
    """Holds out what the data say is to be held out, and of the rest a `share`, chosen by a hash, if they say nothing.

    Examples of the same pictures stay together; the order stays, but for the held out, which are in that of the hash.

    Raises:
        ValueError: nothing is left to learn from.
    """
    undecided = sorted({_digest(one) for one in examples if one.held_out is None})
    chosen = set(undecided[: max(1, round(share * len(undecided)))]) if share else set()
    if any(one.held_out for one in examples):
        chosen.clear()
    out = [one.held_out or (one.held_out is None and _digest(one) in chosen) for one in examples]
    training = [one for one, kept in zip(examples, out, strict=True) if not kept]
    if not training:
        raise ValueError(f"data: expected more than what is held out, got {len(examples)} examples, all held out")
    held_out = [one for one, kept in zip(examples, out, strict=True) if kept]
    return Split(training, sorted(held_out, key=_digest))


def fingerprint(examples: Sequence[Example]) -> str:
    """Another one for other examples, or for the same in another order."""
    told = hashlib.sha256()
    for one in examples:
        told.update(repr((one.id, [stored.name for stored in one.pictures], one.turns)).encode())
    return told.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Survey:
    """What there is to learn from.

    Attributes:
        examples: those with an answer within the context.
        lengths: their tokens, as far as the context goes.
        truncated: how many are cut there.
        left_out: how many others have nothing to learn from.
    """

    examples: list[Example]
    lengths: list[int]
    truncated: int
    left_out: int


def survey(
    examples: Sequence[Example],
    encoder: Encoder,
    *,
    refuse_long: bool = False,
    show: Callable[[int], None] = lambda done: None,
) -> Survey:
    """Encodes every example once, without reading its pictures further than to their sizes.

    Args:
        refuse_long: refuse examples that are longer than the context.
        show: is told how many are done.

    Raises:
        ValueError: examples without an answer or, if they are refused, longer than the context: the first 10 are named;
            or nothing is left.
    """
    if unanswered := [one.id for one in examples if any(turn.answer is None for turn in one.turns)]:
        raise ValueError(
            f"data: expected an answer to every question, got {len(unanswered)} examples without: "
            f"{_first(unanswered)}; self_generate has the target answer"
        )
    kept: list[Example] = []
    lengths: list[int] = []
    longer: list[str] = []
    truncated = 0
    for number, one in enumerate(examples, 1):
        found = encoder.sequence(one, [encoder.rows_of(stored) for stored in one.pictures])
        usable = found.within(encoder.context)
        if usable.lessons:
            kept.append(one)
            lengths.append(len(usable.ids))
        if len(found.ids) > encoder.context:
            longer.append(f"{one.id} ({len(found.ids)} tokens)")
            truncated += bool(usable.lessons)
        show(number)
    if longer and refuse_long:
        raise ValueError(
            f"data: expected examples within the context of {encoder.context} tokens, got {len(longer)} that are "
            f"longer: {_first(longer)}"
        )
    if not kept:
        raise ValueError(f"data: expected an answer of two tokens or more, got none in {len(examples)} examples")
    return Survey(kept, lengths, truncated, len(examples) - len(kept))


class PictureCache:
    """The target's rows of pictures, kept in host memory as long as there is room; the longest unused go first.

    Pictures are looked at one by one, so that what is kept is the same whatever else was in a batch.

    Args:
        budget: bytes to keep.
    """

    def __init__(self, target: HFTarget, encoder: Encoder, budget: int) -> None:
        self._target, self._encoder, self._budget = target, encoder, budget
        self._kept: OrderedDict[tuple[Path, int], Tensor] = OrderedDict()
        self._bytes = 0

    def __call__(self, stored: Stored) -> Tensor:
        """Rows [rows, H] of a picture, on the CPU."""
        key = stored.path, stored.offset
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        rows = self._target.picture_rows(self._encoder.pixels([stored.picture()])).cpu()
        self._kept[key] = rows
        self._bytes += rows.nbytes
        while self._bytes > self._budget:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.nbytes
        return rows


class Batches:
    """The batches of a training by their numbers, from 0 on: the same whenever one is asked for.

    An epoch is as many whole steps as there are examples for; what is left over is drawn anew in every one. Batches of
    an epoch stand in random order; the examples of one are of like length.

    Args:
        found: what to learn from.
        size: examples in a batch.
        per_step: batches in a step of the optimiser.
        seed: another order for another seed.
        cache: has the target's rows of pictures; None: the target looks at every picture of every batch.

    Raises:
        ValueError: there are fewer examples than a step takes.
    """

    def __init__(
        self,
        found: Survey,
        encoder: Encoder,
        *,
        size: int,
        per_step: int,
        seed: int,
        cache: PictureCache | None = None,
    ) -> None:
        self._found, self._encoder, self._cache = found, encoder, cache
        self._size, self._seed = size, seed
        #: Steps of the optimiser in an epoch.
        self.steps_per_epoch = len(found.examples) // (size * per_step)
        if not self.steps_per_epoch:
            raise ValueError(
                f"batch: expected at most the {len(found.examples)} examples that there are to learn from, got "
                f"{size * per_step}"
            )
        #: Examples that an epoch has no whole step for.
        self.left_over = len(found.examples) % (size * per_step)
        self._per_epoch = self.steps_per_epoch * per_step
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __call__(self, number: int) -> Batch:
        """The batch of that number, padded at its ends.

        Raises:
            ValueError: a picture of it is not a whole one.
        """
        examples = [self._found.examples[place] for place in self.places(number)]
        encoder = self._encoder
        rows = [
            encoder.sequence(one, [encoder.rows_of(stored) for stored in one.pictures]).within(encoder.context)
            for one in examples
        ]
        longest = max(len(row.ids) for row in rows)
        input_ids = torch.full((len(rows), longest), encoder.pad)
        answers = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            input_ids[i, : len(row.ids)] = row.ids
            answers[i, : len(row.ids)] = row.answers
        shown = [
            stored for one, row in zip(examples, rows, strict=True) for stored in one.pictures[: len(row.picture_ends)]
        ]
        return Batch({"input_ids": input_ids} | self._pictures(shown), answers, tuple(one.id for one in examples))

    def places(self, number: int) -> list[int]:
        """Which examples are in the batch of that number."""
        epoch, place = divmod(number, self._per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._order(epoch)
        return self._epoch[1][place]

    def _pictures(self, shown: Sequence[Stored]) -> dict[str, Tensor]:
        """Pictures as the target's `teach` takes them."""
        if self._cache is None or not shown:
            return self._encoder.pixels([stored.picture() for stored in shown])
        return {"picture_rows": torch.cat([self._cache(stored) for stored in shown])}

    def _order(self, epoch: int) -> list[list[int]]:
        rng = Random(f"{self._seed} {epoch}")
        places = rng.sample(range(len(self._found.examples)), self._per_epoch * self._size)
        together = _SORTED * self._size
        batches: list[list[int]] = []
        for start in range(0, len(places), together):
            alike = sorted(places[start : start + together], key=self._found.lengths.__getitem__)
            batches += [alike[i : i + self._size] for i in range(0, len(alike), self._size)]
        rng.shuffle(batches)
        return batches


def _digest(example: Example) -> str:
    shown = [stored.name for stored in example.pictures] or [example.id]
    return hashlib.sha256("\n".join(shown).encode()).hexdigest()


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
