"""SpecVLM's elastic compressor: a gate that reads the question decides how a picture is compressed, and how far.

The gate sees the target's features: their mean over the question's text, and the one at its end. It chooses among
options, each a primitive and its amount, so that the same mechanism picks a primitive at one ratio, as in the paper, or
a ratio too. In training the choice is drawn (Gumbel-softmax, straight through); in use it is the likeliest.

Source: SpecVLM (2025), section 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from specvlm.compressors.base import Compressor, CompressorConfig, keep_rows, picture_runs, runs_by_length
from specvlm.compressors.primitives import PRIMITIVES, Primitive, check_option, spaced
from specvlm.targets.base import Choice, Prompt

_GATE_WIDTH = 128


@dataclass(frozen=True, slots=True)
class ElasticConfig(CompressorConfig):
    """The options, a primitive's name and its amount each.

    Attributes:
        options: for example ("pool", 5), ("convolve", 3), ("prune", 20), ("resample", 2), ("all", 1), ("none", 1).

    Raises:
        ValueError, TypeError: no option, one twice, or one that there is not.
    """

    options: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.options, list | tuple) or not self.options:
            raise ValueError(f"options: expected a primitive and its amount each, got {self.options!r}")
        for option in self.options:
            if not isinstance(option, list | tuple) or len(option) != 2:
                raise ValueError(f"options: expected a primitive and its amount each, got {option!r}")
            check_option(*option)
        object.__setattr__(self, "options", tuple((name, amount) for name, amount in self.options))
        if len(set(self.options)) < len(self.options):
            raise ValueError(f"options: expected every one once, got {self.options}")

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "options": [list(option) for option in self.options]}


@dataclass(frozen=True, slots=True)
class SelectConfig(ElasticConfig):
    """The gate's best option alone."""

    kind = "select"

    def build(self, hidden_size: int) -> "Select":
        return Select(self, hidden_size)


@dataclass(frozen=True, slots=True)
class WeightConfig(ElasticConfig):
    """All options' outputs, of which each makes as many, summed by the gate's weights."""

    kind = "weight"

    def build(self, hidden_size: int) -> "Weight":
        return Weight(self, hidden_size)


@dataclass(frozen=True, slots=True)
class ConcatConfig(ElasticConfig):
    """All options' outputs, one behind the other; there is no gate."""

    kind = "concat"

    def build(self, hidden_size: int) -> "Concat":
        return Concat(self, hidden_size)


class Elastic(Compressor):
    """What the three have in common: the primitives, and how their outputs take the place of a picture's rows.

    Args:
        config: the options.
        hidden_size: the head's.
    """

    direct = True

    def __init__(self, config: ElasticConfig, hidden_size: int) -> None:
        super().__init__()
        self.names = tuple(name if name in ("all", "none") else f"{name} {amount}" for name, amount in config.options)
        self.primitives = nn.ModuleList([PRIMITIVES[name](amount, hidden_size) for name, amount in config.options])

    @property
    def ways(self) -> list[Primitive]:
        """The options' primitives."""
        return [cast(Primitive, primitive) for primitive in self.primitives]

    def compressed(self, prompt: Prompt, made: "_Made") -> Prompt:
        """The prompt with outputs in its pictures' places."""
        kept, embeds = ~prompt.image_mask, prompt.embeds.clone()
        for row, at, outputs in made:
            kept[row, at] = True
            embeds[row, at] = outputs.to(embeds.dtype)
        return keep_rows(replace(prompt, embeds=embeds), kept)


#: A picture's outputs [R, H] each: which prompt, and the rows [R] they stand in for.
_Made = list[tuple[int, Tensor, Tensor]]


class Select(Elastic):
    """One option for all of a prompt's pictures; with one option, that primitive."""

    def __init__(self, config: ElasticConfig, hidden_size: int) -> None:
        super().__init__(config, hidden_size)
        self.gate = _Gate(hidden_size, len(self.names)) if len(self.names) > 1 else None

    def forward(self, prompt: Prompt) -> Prompt:
        question, _ = _question(prompt)
        runs = picture_runs(prompt.image_mask)
        batch = len(question)
        if self.gate is None:
            picked, strength, choice = [0] * batch, prompt.embeds.new_ones(batch), None
        else:
            logits = self.gate(prompt)
            drawn = logits - torch.log(-torch.log(_uniform(logits))) if self.training else logits
            best = drawn.argmax(dim=-1)
            soft = drawn.softmax(dim=-1).gather(1, best[:, None])[:, 0]
            picked, strength = best.tolist(), 1 + soft - soft.detach()
            choice = Choice(self.names, logits.softmax(dim=-1), best, self._rows(runs, prompt.embeds))
        made: _Made = []
        for option in set(picked):
            mine = (run for run in runs if picked[run[0]] == option)
            for length, places in runs_by_length(mine).items():
                rows, features, asked = _gathered(prompt, question, places, length)
                outputs, at = self.ways[option](rows, features, asked)
                for (row, first), output, local in zip(places, outputs, at, strict=True):
                    made.append((row, first + local, output * strength[row]))
        return replace(self.compressed(prompt, made), choice=choice)

    def _rows(self, runs: Sequence[tuple[int, int, int]], like: Tensor) -> Tensor:
        lengths = [end - first for _, first, end in runs]
        shares = [_share(primitive, lengths) for primitive in self.ways]
        return like.new_tensor(shares)


class Weight(Elastic):
    """Every option at once, at one ratio.

    Raises:
        ValueError: options that do not make equally many rows of a picture.
    """

    def __init__(self, config: ElasticConfig, hidden_size: int) -> None:
        super().__init__(config, hidden_size)
        self.gate = _Gate(hidden_size, len(self.names))

    def forward(self, prompt: Prompt) -> Prompt:
        question, _ = _question(prompt)
        weights = self.gate(prompt).softmax(dim=-1)
        made: _Made = []
        for length, places in runs_by_length(picture_runs(prompt.image_mask)).items():
            counts = {name: p.count(length) for name, p in zip(self.names, self.ways, strict=True)}
            if len(set(counts.values())) > 1:
                raise ValueError(f"options: expected equally many rows of a picture's {length}, got {counts}")
            rows, features, asked = _gathered(prompt, question, places, length)
            outputs = torch.stack([primitive(rows, features, asked)[0] for primitive in self.ways], dim=1)
            mine = weights[[row for row, _ in places]]
            summed = (outputs * mine[..., None, None]).sum(dim=1)
            for (row, first), output, local in zip(places, summed, spaced(rows, summed.shape[1]), strict=True):
                made.append((row, first + local, output))
        return self.compressed(prompt, made)


class Concat(Elastic):
    """Every option's outputs.

    Raises:
        ValueError: together they are more than a picture's rows.
    """

    def forward(self, prompt: Prompt) -> Prompt:
        question, _ = _question(prompt)
        made: _Made = []
        for length, places in runs_by_length(picture_runs(prompt.image_mask)).items():
            rows, features, asked = _gathered(prompt, question, places, length)
            outputs = torch.cat([primitive(rows, features, asked)[0] for primitive in self.ways], dim=1)
            if outputs.shape[1] > length:
                raise ValueError(f"options: expected at most a picture's {length} rows, got {outputs.shape[1]}")
            for (row, first), output, local in zip(places, outputs, spaced(rows, outputs.shape[1]), strict=True):
                made.append((row, first + local, output))
        return self.compressed(prompt, made)


class _Gate(nn.Module):
    """Logits [B, O] of the options, by what is asked."""

    def __init__(self, hidden_size: int, options: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * hidden_size, _GATE_WIDTH)
        self.out = nn.Linear(_GATE_WIDTH, options)

    def forward(self, prompt: Prompt) -> Tensor:
        read = torch.cat(_question(prompt), dim=-1)
        return self.out(nn.functional.silu(self.hidden(read)))


def _question(prompt: Prompt) -> tuple[Tensor, Tensor]:
    """The target's feature [B, H] at the end of what is asked, and the mean of those of its text."""
    asked = prompt.lengths if prompt.asked is None else prompt.asked
    places = torch.arange(prompt.image_mask.shape[1], device=asked.device)
    text = ~prompt.image_mask & (places < asked[:, None])
    last = (asked.long() - 1)[:, None, None].expand(-1, -1, prompt.features.shape[2])
    mean = (prompt.features * text[..., None]).sum(dim=1) / text.sum(dim=1, keepdim=True).clamp(min=1)
    return prompt.features.gather(1, last)[:, 0], mean


def _gathered(
    prompt: Prompt, question: Tensor, places: Sequence[tuple[int, int]], length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures of one length: their embeddings and features [P, T, H], and their questions [P, H]."""
    rows, features = (
        torch.stack([x[row, first : first + length] for row, first in places]) for x in (prompt.embeds, prompt.features)
    )
    return rows, features, question[[row for row, _ in places]]


def _share(primitive: Primitive, lengths: Sequence[int]) -> float:
    return sum(primitive.count(length) for length in lengths) / max(1, sum(lengths))


def _uniform(like: Tensor) -> Tensor:
    """Uniform numbers inside (0, 1)."""
    return torch.rand_like(like).clamp(min=torch.finfo(like.dtype).tiny, max=1 - torch.finfo(like.dtype).eps)
