"""A head's steps on its own outputs, as it takes them in decoding, for every row of an answer at once.

At level 0 row i is the pair of feature i with token i + 1, and sees the pairs up to itself. At level j it is the pair
of row i - 1's output at level j - 1 with token i + 1: the node j below a root whose pair is row i - j. It sees what
that node sees in a tree: the true pairs up to row i - j, and its ancestors, which are row i - j + m of each level m.

Source: EAGLE-3 (Li et al., 2025), training-time test.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from specvlm.drafts.growing import rows_of
from specvlm.drafts.pairs import PairHead, Pairs
from specvlm.targets.base import Choice
from specvlm.targets.hf_attention import AttentionStep


@dataclass(frozen=True, slots=True)
class Read:
    """What a head reads of a batch, and what it is to say.

    Attributes:
        pairs: of the target's own features.
        guide: what its compressor keeps of the pictures beside them.
        choice: what its compressor chose; None: it had no options.
        counts: [B, P] bool: the pair's token and the one to guess are in one answer.
        wanted: [B, P, H] the target's post-final-norm feature at the pair's token.
    """

    pairs: Pairs
    guide: Tensor | None
    choice: Choice | None
    counts: Tensor
    wanted: Tensor


@dataclass(frozen=True, slots=True)
class Level:
    """A head's outputs after so many steps on its own outputs, on rows that count.

    Attributes:
        hidden: [N, H].
        row, place: [N] int64: which pair each is of.
    """

    hidden: Tensor
    row: Tensor
    place: Tensor


def levels(head: PairHead, read: Read, count: int) -> Iterator[Level]:
    """The head's outputs level by level, on every row of whose chain all pairs count.

    Args:
        count: of levels, at least 1; each has a row less in every answer than the one before.
    """
    pairs, device = read.pairs, read.counts.device
    empty = torch.zeros(len(read.counts), dtype=torch.int32, device=device)
    cache = DynamicCache() if count > 1 else None
    hidden = head(pairs, cache, AttentionStep(empty, None))
    totals = read.counts.sum(dim=1)
    width = int(totals.max())
    places = read.counts.int().sort(dim=1, descending=True, stable=True).indices[:, :width]  # [B, R], those first
    counts = torch.arange(width, device=device) < totals[:, None]
    hidden = rows_of(hidden, places)
    embeds, positions = rows_of(pairs.embeds, places), pairs.positions.gather(1, places)
    for level in range(count):
        if level:
            # A row's chain is whole if the row before has one and stands right before it.
            counts = counts & _after(counts, 0) & (places == _after(places, -2) + 1)
            above = head.compressor.guided(_after(hidden, 0), read.guide)
            step = AttentionStep(empty, None, visible=_visible(places, read.counts.shape[1], level))
            hidden = head(Pairs(embeds, above, positions), cache, step)
        row, column = counts.nonzero(as_tuple=True)
        yield Level(hidden[row, column], row, places[row, column])


def _after(values: Tensor, first: int) -> Tensor:
    """Values [B, R, ...] of the row before; `first` for the first."""
    moved = values.roll(1, dims=1)
    moved[:, :1] = first
    return moved


def _visible(places: Tensor, pairs: int, level: int) -> Tensor:
    """[B, R, P + level * R] bool: which pairs, and which rows of the levels from 1 on, each row sees."""
    width, device = places.shape[1], places.device
    true = torch.arange(pairs, device=device) <= places[..., None] - level  # [B, R, P]
    rows = torch.arange(width, device=device)
    behind = torch.arange(level - 1, -1, -1, device=device)  # of the ancestor on each level
    own = rows[None, None, :] == (rows[:, None, None] - behind[:, None])  # [R, level, R]
    return torch.cat([true, own.flatten(1).expand(len(places), -1, -1)], dim=-1)
