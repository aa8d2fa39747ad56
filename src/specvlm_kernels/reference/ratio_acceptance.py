"""The ratio test of drafts that sample independently, in plain torch."""

from collections.abc import Sequence

import torch

from .acceptance import Accepted, accepted, at_least_float, law, softmax
from .noise import RATIO_STREAM, philox_integers, race, uniforms


def accept_ratio(
    logits: torch.Tensor,
    draft_logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 0.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    seed: torch.Tensor | None = None,
    replacement: bool = False,
) -> Accepted:
    """Plain torch twin of `specvlm_kernels.accept_ratio`."""
    batch, nodes, vocabulary = logits.shape
    p, q = law(logits, temperature, top_k, top_p), softmax(at_least_float(draft_logits))
    coins = torch.full((batch, nodes), 0.5)
    if seed is not None:
        places = positions.gather(1, parents.clamp(min=0).long()) + 1
        coins = uniforms(tokens.clamp(0, vocabulary - 1), places, seed, stream=RATIO_STREAM)
    walks = [
        _walk(p[b], q[b], tokens[b].tolist(), parents[b].tolist(), coins[b].tolist(), replacement) for b in range(batch)
    ]
    if not walks:
        return accepted([], [], nodes, logits.device)
    rows = torch.tensor([[path[-1] if path else 0] for path, _ in walks], device=logits.device)
    z = torch.stack([left for _, left in walks]).log()
    if seed is not None:
        z = z + race(philox_integers(positions.gather(1, rows) + 1, seed, vocabulary, stream=RATIO_STREAM))[:, 0]
    return accepted([path for path, _ in walks], z.argmax(dim=-1).tolist(), nodes, logits.device)


def _walk(
    p: torch.Tensor,
    q: torch.Tensor,
    tokens: Sequence[int],
    parents: Sequence[int],
    coins: Sequence[float],
    replacement: bool,
) -> tuple[list[int], torch.Tensor]:
    """The path, and what is left [V] of the target's law at its end."""
    path: list[int] = []
    node, left, drawn_from = 0, p[0], q[0]
    for i in range(1, len(tokens)):  # parents[i] < i: an accepted node's children are still to come
        token = tokens[i]
        if parents[i] != node or not 0 <= token < p.shape[1]:
            continue
        if coins[i] * drawn_from[token] * left.sum() < left[token] * drawn_from.sum():
            path.append(i)
            node, left, drawn_from = i, p[i], q[i]
            continue
        left = (left / _total(left) - drawn_from / _total(drawn_from)).clamp(min=0)
        if not replacement:
            drawn_from = drawn_from.clone()
            drawn_from[token] = 0
    return path, left if left.any() else p[node]


def _total(shares: torch.Tensor) -> torch.Tensor:
    """Their sum; 1 where there is none."""
    total = shares.sum()
    return torch.where(total > 0, total, 1)
