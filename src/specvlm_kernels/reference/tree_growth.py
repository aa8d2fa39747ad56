"""A tree's growth in plain torch."""

from functools import lru_cache

import torch


def select_beam(
    tokens: torch.Tensor, scores: torch.Tensor, ancestors: torch.Tensor, width: int, first_slot: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plain torch twin of `specvlm_kernels.select_beam`."""
    best, order = scores.sort(dim=1, descending=True, stable=True)  # stable: ties to the first
    index, (_, rows, words) = order[:, :width].contiguous(), ancestors.shape
    above = index // (tokens.shape[1] // rows)
    seen = ancestors.gather(1, above[..., None].expand(-1, -1, words))
    own = _own_bits(first_slot, width, words, tokens.device)
    return tokens.gather(1, index), above, index, best[:, :width].contiguous(), seen | own


def rerank_tree(
    root: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    scores: torch.Tensor,
    depths: torch.Tensor,
    nodes: int,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plain torch twin of `specvlm_kernels.rerank_tree`."""
    batch, device = len(tokens), tokens.device
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, : nodes - 1]
    kept = order.sort(dim=1).values  # in the order of depth: parents precede their children
    found = kept.shape[1] + 1
    place = torch.zeros_like(parents).scatter_(1, kept, torch.arange(1, found, device=device).expand(batch, -1))
    above = parents.gather(1, kept)
    node_scores = scores.gather(1, kept)
    is_node, where = node_scores > -torch.inf, slice(1, found)
    out_tokens = root[:, None].repeat(1, size)
    out_parents, out_depths = (torch.full((batch, size), fill, dtype=torch.int32, device=device) for fill in (-1, 0))
    out_scores = torch.full((batch, size), -torch.inf, device=device)
    out_scores[:, 0], out_scores[:, where] = 0, node_scores
    out_tokens[:, where] = torch.where(is_node, tokens.gather(1, kept), root[:, None])
    out_parents[:, where] = torch.where(is_node, place.gather(1, above.clamp(min=0)).where(above >= 0, 0), -1).int()
    out_depths[:, where] = torch.where(is_node, depths[kept], 0)
    return out_tokens, out_parents, out_depths, out_scores


@lru_cache(maxsize=4096)
def _own_bits(first_slot: int, count: int, words: int, device: torch.device) -> torch.Tensor:
    """[count, words] int64: row i has the bit of slot first_slot + i, bit 63 being the sign."""
    slots = torch.arange(first_slot, first_slot + count, device=device)[:, None]
    return torch.where(slots // 64 == torch.arange(words, device=device), 1 << slots % 64, 0)
