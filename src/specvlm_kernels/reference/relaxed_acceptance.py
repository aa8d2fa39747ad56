"""Acceptance that lets through what the target would not have drawn, in plain torch."""

import torch

from .acceptance import Accepted, accepted, draw, law


def accept_typical(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    positions: torch.Tensor,
    *,
    epsilon: float = 0.09,
    delta: float = 0.3,
    temperature: float | torch.Tensor = 0.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    seed: torch.Tensor | None = None,
) -> Accepted:
    """Plain torch twin of `specvlm_kernels.accept_typical`."""
    drawn = draw(logits, positions, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    p = law(logits, temperature, top_k, top_p)
    least = (-torch.xlogy(p, p).sum(dim=-1)).neg().exp().mul(delta).clamp(max=epsilon)
    batch, nodes, vocabulary = logits.shape
    above, rows = parents.clamp(min=0).long(), torch.arange(batch, device=logits.device)[:, None]
    probability = p[rows, above, tokens.clamp(0, vocabulary - 1)]
    passes = (probability > least[rows, above]) & (tokens >= 0) & (tokens < vocabulary)
    log_p = torch.where(passes, probability.log(), -torch.inf)
    paths, next_tokens = [], []
    for draws, scores, tree in zip(drawn.tolist(), log_p.tolist(), parents.tolist(), strict=True):
        found: dict[int, tuple[list[int], float]] = {
            0: ([], 0.0)
        }  # accepted nodes: their paths, how probable these are
        for i in range(1, nodes):
            if tree[i] in found and scores[i] > -torch.inf:
                path, score = found[tree[i]]
                found[i] = ([*path, i], score + scores[i])
        path, _ = max(found.values(), key=lambda walk: (len(walk[0]), walk[1]))  # the first of equals
        paths.append(path)
        next_tokens.append(draws[path[-1] if path else 0])
    return accepted(paths, next_tokens, nodes, logits.device)


def accept_within(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    positions: torch.Tensor,
    radius: int,
    *,
    ordinal: tuple[int, int] | None = None,
    temperature: float | torch.Tensor = 0.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    seed: torch.Tensor | None = None,
) -> Accepted:
    """Plain torch twin of `specvlm_kernels.accept_within`."""
    drawn = draw(logits, positions, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    first, end = ordinal or (0, logits.shape[-1])
    nodes = tokens.shape[1]
    paths, next_tokens = [], []
    for draws, proposed, above in zip(drawn.tolist(), tokens.tolist(), parents.tolist(), strict=True):
        path: list[int] = []
        node = 0
        while True:
            wanted = draws[node]
            near = [
                (abs(proposed[i] - wanted), i)
                for i in range(node + 1, nodes)
                if above[i] == node
                and (proposed[i] == wanted or (first <= proposed[i] < end and first <= wanted < end))
                and abs(proposed[i] - wanted) <= radius
            ]
            if not near:
                break
            _, node = min(near)
            path.append(node)
        paths.append(path)
        next_tokens.append(wanted)
    return accepted(paths, next_tokens, nodes, logits.device)
