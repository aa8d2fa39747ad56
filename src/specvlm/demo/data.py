"""Training batches, rendered and worded as they are needed; every step's batch follows from its number."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from specvlm.demo.build import IMAGE_TOKENS, MEAN, PATCHES, STD
from specvlm.demo.grammar import TYPES, ask
from specvlm.demo.scenes import BACKGROUNDS, CELLS, COLOURS, GRID, SHAPES, SIZES, Scene, render, split_scene
from specvlm.demo.wording import FACT_WORDS

ROW_LENGTH = 256
IGNORED = -100
LABELS = {"shape": SHAPES, "colour": tuple(COLOURS), "size": SIZES, "background": tuple(BACKGROUNDS)}
# How often each type is among the candidates for a row: the easy ones need less practice.
_SHARES = {"describe": 1, "count": 3, "where": 1, "colour": 1, "compare": 3, "yes_no": 4}
_CANDIDATES = [kind for kind in TYPES for _ in range(_SHARES[kind])]


@dataclass(frozen=True, slots=True)
class Pictures:
    """pixels [B,3,72,72] float; cells: for each attribute [B,36] int64, what each patch's cell holds (0: nothing)."""

    pixels: Tensor
    cells: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Rows:
    """A row is one picture's prefix and several questions that each see the prefix and themselves.

    ids, positions, labels [B,T] int64 (labels are the next token inside answers, else -100); mask [B,1,T,T] bool.
    """

    pictures: Pictures
    ids: Tensor
    positions: Tensor
    labels: Tensor
    mask: Tensor


class Encoder:
    """Tokenises questions the way the processor's chat template lays them out."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.prefix = tokenizer.encode("USER: " + "<image>" * IMAGE_TOKENS + "\n")
        self.image_start = self.prefix.index(tokenizer.convert_tokens_to_ids("<image>"))
        self.eos, self.pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        spoken = [self._ids(f" {form}") for word in FACT_WORDS for form in (word, word.capitalize())]
        self.facts = sorted({ids[0] for ids in spoken if len(ids) == 1})

    def __call__(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """The ids of a question, up to and with "ASSISTANT:", and those of its answer with `</s>`."""
        return self._ids(f"{question} ASSISTANT:"), [*self._ids(f" {answer}"), self.eos]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def texts(count: int, seed: int) -> Iterator[str]:
    """Questions and answers about scenes of the training side, as the tokenizer meets them."""
    rng = Random(f"texts {seed}")
    for _ in range(count):
        for question, answer in _dialogue(split_scene(rng, for_evaluation=False), TYPES, rng):
            yield f"USER: \n{question} ASSISTANT: {answer}"


def pictures(count: int, seed: str) -> Pictures:
    """Random training pictures with what their cells hold."""
    rng = Random(seed)
    return picture_batch([split_scene(rng, for_evaluation=False) for _ in range(count)])


def rows(count: int, seed: str, encoder: Encoder) -> Rows:
    """Random training rows: questions of shuffled types about each picture, as many as find room."""
    rng = Random(seed)
    scenes = [split_scene(rng, for_evaluation=False) for _ in range(count)]
    packed = [_pack(scene, rng, encoder) for scene in scenes]
    ids, positions, labels, mask = (torch.from_numpy(np.stack(part)) for part in zip(*packed, strict=True))
    return Rows(picture_batch(scenes), ids, positions, labels, mask[:, None])


def _dialogue(scene: Scene, kinds: tuple[str, ...], rng: Random) -> Iterator[tuple[str, str]]:
    return (found for kind in kinds if (found := ask(scene, kind, rng)) is not None)


def _pack(scene: Scene, rng: Random, encoder: Encoder) -> tuple[np.ndarray, ...]:
    ids = np.full(ROW_LENGTH, encoder.pad)
    positions = np.zeros(ROW_LENGTH, np.int64)
    labels = np.full(ROW_LENGTH, IGNORED)
    segments = np.full(ROW_LENGTH, -1)
    end = shared = len(encoder.prefix)
    ids[:end], positions[:end], segments[:end] = encoder.prefix, np.arange(end), 0
    for number, kind in enumerate(rng.sample(_CANDIDATES, len(_CANDIDATES)), start=1):
        if (found := ask(scene, kind, rng)) is None:
            continue
        question, answer = encoder(*found)
        start, split = end, end + len(question)
        if split + len(answer) > ROW_LENGTH:
            continue
        end = split + len(answer)
        ids[start:split], ids[split:end] = question, answer
        positions[start:end] = np.arange(shared, shared + end - start)
        labels[split - 1 : end - 1] = answer
        segments[start:end] = number
    same = (segments[:, None] == segments[None, :]) | (segments == 0)[None, :]
    return ids, positions, labels, np.tril(same)


def picture_batch(scenes: list[Scene]) -> Pictures:
    """The scenes' pictures with what their cells hold."""
    pixels = np.stack([np.asarray(render(scene)) for scene in scenes]).astype(np.float32)
    cells = {name: torch.from_numpy(_by_patch(np.array([_held(scene, name) for scene in scenes]))) for name in LABELS}
    return Pictures(torch.from_numpy((pixels / 255 - MEAN) / STD).permute(0, 3, 1, 2).contiguous(), cells)


def _held(scene: Scene, name: str) -> list[int]:
    """The label of every cell: 1 + the index of its object's attribute, 0 where it is empty; or the background's."""
    values = LABELS[name]
    if name == "background":
        return [values.index(scene.background)] * CELLS
    held = [0] * CELLS
    for item in scene.objects:
        held[item.cell] = 1 + values.index(getattr(item, name))
    return held


def _by_patch(held: np.ndarray) -> np.ndarray:
    share = PATCHES // GRID
    grid = held.reshape(-1, GRID, GRID)
    return grid.repeat(share, axis=1).repeat(share, axis=2).reshape(len(held), -1)
