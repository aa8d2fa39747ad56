"""What draft heads learn from and are measured with: the demo's scenes, or photos with human captions."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from specvlm import SpecVLM, load
from specvlm.demo.data import Encoder as SceneEncoder
from specvlm.demo.evaluate import held_out_questions, show
from specvlm.demo.train_head import BATCH, batch_of
from specvlm.targets.base import Prompt
from specvlm.targets.hf import HFTarget
from specvlm.training import Batch
from specvlm.training.data import Batches, split, survey
from specvlm.training.encoding import Encoder
from specvlm.training.records import read_examples

#: How many photos stand for one of the scenes' question types.
_TYPES = 6


class Corpus(Protocol):
    """A target, with what a draft of it learns from and is measured with. Processes hand it to each other."""

    #: Part of the names of its results.
    name: str

    def model(self) -> SpecVLM:
        """The target, which remembers what it taught."""
        ...

    def batches(self, model: SpecVLM, count: int) -> list[Batch]:
        """The first `count` batches of 12 examples."""
        ...

    def prompts(self, model: SpecVLM, count: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
        """Held-out questions, `count` a type: the type, and what `generate` takes."""
        ...


class RememberingTarget(HFTarget):
    """The target, which looks at every batch once: it is frozen, and the examples are the same in every epoch."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self._seen: dict[int, tuple[Prompt, Tensor]] = {}

    def teach(self, inputs: Mapping[str, Any], taps: tuple[int, ...] | None = None) -> tuple[Prompt, Tensor]:
        """See `HFTarget.teach`; `inputs` stay the caller's."""
        if id(inputs) not in self._seen:
            self._seen[id(inputs)] = super().teach(inputs, taps)
        return self._seen[id(inputs)]


def _remembering(model: SpecVLM) -> SpecVLM:
    target = RememberingTarget(model.target.model, model.processor.tokenizer)
    return SpecVLM.from_target(target, processor=model.processor)


@dataclass(frozen=True, slots=True)
class Scenes:
    """The shipped model and the scenes that it knows."""

    name: str = "scenes"

    def model(self) -> SpecVLM:
        """See `Corpus.model`."""
        return _remembering(load("demo"))

    def batches(self, model: SpecVLM, count: int) -> list[Batch]:
        """See `Corpus.batches`."""
        encoder = SceneEncoder(model.processor.tokenizer)
        return [batch_of(number, encoder) for number in range(count)]

    def prompts(self, model: SpecVLM, count: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
        """See `Corpus.prompts`."""
        asked = held_out_questions(count, seed)
        return [
            (one.kind, model.prepare(picture, one.text))
            for one, picture in zip(asked, show(asked, "true"), strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Captions:
    """A model that `bench.captions` trained, and the photos that it knows.

    Attributes:
        target: its folder.
        data: the photos, as `specvlm train` takes them.
    """

    target: Path
    data: Path
    name: str = "captions"

    def model(self) -> SpecVLM:
        """See `Corpus.model`."""
        return _remembering(load(self.target, dtype="float32", device="cpu"))

    def batches(self, model: SpecVLM, count: int) -> list[Batch]:
        """See `Corpus.batches`."""
        encoder = Encoder(model.processor, model.target)
        found = survey(split(read_examples(self.data), 0.05).training, encoder)
        made = Batches(found, encoder, size=BATCH, per_step=1, seed=0)
        return [made(number) for number in range(count)]

    def prompts(self, model: SpecVLM, count: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
        """See `Corpus.prompts`."""
        encoder = Encoder(model.processor, model.target)
        photos = split(read_examples(self.data), 0.05).held_out
        order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(seed)).tolist()
        return [("describe", encoder.question(photos[place], 0)) for place in order[: count * _TYPES]]
