"""What a draft head asks of a compressor: fewer rows of a prompt, each at its real position."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from specvlm.targets.base import Prompt


class Compressor(nn.Module):
    """Decides what of a prompt's pictures a draft reads; this one leaves the prompt as it is.

    A draft alone has one, so it changes how soon tokens come and never which.
    """

    #: Rows of pictures enter the draft's layer as they are, without the feature before them.
    direct: ClassVar[bool] = False

    def forward(self, prompt: Prompt) -> Prompt:
        """The rows that the draft reads.

        Args:
            prompt: its features [B, T, H] are those that the head's pairs are made of.

        Returns:
            the prompt with R <= T rows in their order, at their real positions; `lengths` says how many of a prompt's
            own count, and what stands behind them is garbage.
        """
        return prompt

    def guided(self, features: Tensor, guide: Tensor | None) -> Tensor:
        """Features [B, N, H] behind the prompt, or outputs in their stead, with what is kept of the pictures beside.

        Args:
            guide: the compressed prompt's.
        """
        return features


@dataclass(frozen=True, slots=True)
class CompressorConfig(ABC):
    """A compressor's settings, as a head's config holds them; its fields check themselves."""

    #: Its name on disk.
    kind: ClassVar[str]

    @abstractmethod
    def build(self, hidden_size: int) -> Compressor:
        """The compressor with fresh weights, for a head of that width.

        Raises:
            ValueError: they do not fit each other.
        """

    def settings(self) -> dict[str, Any]:
        """The fields by name, with the kind."""
        return {"kind": self.kind} | {field.name: getattr(self, field.name) for field in fields(self)}


def keep_rows(prompt: Prompt, kept: Tensor) -> Prompt:
    """The prompt's rows of `kept` [B, T] bool, in their order; a shorter prompt has garbage behind its own.

    The garbage is what was left out, so that none of it stands at a kept row's position.
    """
    lengths = kept.sum(dim=1, dtype=torch.int32)
    rows = (~kept).int().sort(dim=1, stable=True).indices[:, : int(lengths.max())]

    def taken(x: Tensor) -> Tensor:
        return x.gather(1, rows if x.ndim == 2 else rows[..., None].expand(-1, -1, x.shape[2]))

    return replace(
        prompt,
        input_ids=taken(prompt.input_ids),
        positions=taken(prompt.positions),
        embeds=taken(prompt.embeds),
        image_mask=taken(prompt.image_mask),
        features=taken(prompt.features),
        lengths=lengths,
    )


def picture_runs(image_mask: Tensor) -> list[tuple[int, int, int]]:
    """The runs of image tokens of a mask [B, T]: which prompt, first row, the row behind the last. On the host."""
    edges = nn.functional.pad(image_mask.int(), (1, 1)).diff(dim=1)  # [B, T + 1]: 1 where one begins, -1 behind its end
    begins, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    return [(prompt, first, end) for (prompt, first), (_, end) in zip(begins, ends, strict=True)]


def runs_by_length(runs: Iterable[tuple[int, int, int]]) -> dict[int, list[tuple[int, int]]]:
    """Runs that can go through a compressor together: prompt and first row, by length."""
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for prompt, first, end in runs:
        found[end - first].append((prompt, first))
    return found
