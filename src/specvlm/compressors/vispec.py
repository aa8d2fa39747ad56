"""ViSpec's vision adaptor: a picture as a few tokens, and as a vector that goes with every feature behind it.

Learned queries attend once to a picture's embeddings x (no norm, no positions, no residual):

    o_j = o_proj(softmax(q_j . k_proj(x) / sqrt(head_dim)) v_proj(x))

All outputs but the last take the place of the picture's last rows and enter the draft's layer as they are. The last
one, g, goes with the features: h' = img_fc([h, g]), with g = 0 before the first picture and the latest picture's after.

Source: ViSpec (2025).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from specvlm.checks import check_int
from specvlm.compressors.base import Compressor, CompressorConfig, keep_rows, picture_runs, runs_by_length
from specvlm.targets.base import Prompt


@dataclass(frozen=True, slots=True)
class ViSpecConfig(CompressorConfig):
    """The adaptor's sizes.

    Attributes:
        queries: how many; one less is what a picture's rows become.
        heads: of the queries' attention.

    Raises:
        ValueError: no query for g and a row each, or no head.
    """

    kind = "vispec"

    queries: int = 2
    heads: int = 32

    def __post_init__(self) -> None:
        check_int("queries", self.queries, low=2)
        check_int("heads", self.heads, low=1)

    def build(self, hidden_size: int) -> "ViSpecAdaptor":
        if hidden_size % self.heads:
            raise ValueError(f"heads: expected a divisor of the hidden_size {hidden_size}, got {self.heads}")
        return ViSpecAdaptor(self, hidden_size)


class ViSpecAdaptor(Compressor):
    """The adaptor's weights, under the names of ViSpec's published checkpoints.

    Args:
        config: its sizes.
        hidden_size: the head's.
    """

    direct = True

    def __init__(self, config: ViSpecConfig, hidden_size: int) -> None:
        super().__init__()
        self.imadpt = _Queries(config, hidden_size)
        self.img_fc = nn.Linear(2 * hidden_size, hidden_size)
        with torch.no_grad():  # at first g counts for nothing
            self.img_fc.weight.copy_(torch.eye(hidden_size, 2 * hidden_size))
            self.img_fc.bias.zero_()

    def forward(self, prompt: Prompt) -> Prompt:
        """The text and, for every picture, its last rows with outputs in their stead; features go with g.

        Raises:
            ValueError: a picture of fewer rows than the outputs.
        """
        batch, length, width = prompt.embeds.shape
        runs = picture_runs(prompt.image_mask)
        outputs = self._outputs(prompt.embeds, runs)
        kept, embeds = ~prompt.image_mask, prompt.embeds.clone()
        guides = prompt.features.new_zeros(batch, length, width)
        for row, first, end in runs:  # in their order: the latest picture's g stands
            made = outputs[row, first]
            rows = slice(end - len(made) + 1, end)
            if rows.start < first:
                raise ValueError(f"queries: expected at most {end - first + 1} for the picture's rows, got {len(made)}")
            kept[row, rows] = True
            embeds[row, rows] = made[:-1].to(embeds.dtype)
            guides[row, end - 1 :] = made[-1].to(guides.dtype)
        features = self.img_fc(torch.cat([prompt.features, guides], dim=-1))
        return replace(keep_rows(replace(prompt, embeds=embeds, features=features), kept), guide=guides[:, -1])

    def guided(self, features: Tensor, guide: Tensor | None) -> Tensor:
        """Features [B, N, H] joined with the latest picture's g [B, H]."""
        if guide is None:
            raise ValueError("guide: expected a compressed prompt's, got none")
        return self.img_fc(torch.cat([features, guide[:, None].expand_as(features)], dim=-1))

    def _outputs(self, embeds: Tensor, runs: list[tuple[int, int, int]]) -> dict[tuple[int, int], Tensor]:
        """Each picture's outputs [queries, H], by prompt and first row; pictures of one length go together."""
        found: dict[tuple[int, int], Tensor] = {}
        for length, places in runs_by_length(runs).items():
            made = self.imadpt(torch.stack([embeds[row, first : first + length] for row, first in places]))
            found |= dict(zip(places, made, strict=True))
        return found


class _Queries(nn.Module):
    """One cross-attention of learned queries."""

    def __init__(self, config: ViSpecConfig, hidden_size: int) -> None:
        super().__init__()
        head_dim = hidden_size // config.heads
        self.q = nn.Parameter(torch.randn(config.queries, config.heads, head_dim) * head_dim**-0.5)
        self.k_proj, self.v_proj, self.o_proj = (nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [P, queries, H] for pictures [P, T, H]."""
        pictures, rows, _ = x.shape
        queries, heads, head_dim = self.q.shape
        k, v = (proj(x).view(pictures, rows, heads, head_dim).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        q = self.q.transpose(0, 1).expand(pictures, -1, -1, -1)
        out = nn.functional.scaled_dot_product_attention(q, k, v)  # [P, heads, queries, head_dim]
        return self.o_proj(out.transpose(1, 2).reshape(pictures, queries, heads * head_dim))
