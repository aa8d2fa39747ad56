"""Seeded draws at every node of a tree and the walk down it, in plain torch."""

from dataclasses import dataclass

import torch

from .noise import race_noise

#: A token's probability mass is counted in integer units of this part of the most likely token's.
MASS_UNIT = 2.0**-40


@dataclass(frozen=True, slots=True)
class Accepted:
    """The path that a target's own draws follow down a draft tree.

    Attributes:
        path: [B, N] int32, the accepted nodes from the root's child down, root excluded, padded with -1.
        length: [B] int32, how many nodes `path` holds.
        next_token: [B] int64, the draw after the last accepted node: the bonus token.
    """

    path: torch.Tensor
    length: torch.Tensor
    next_token: torch.Tensor


def draw(
    logits: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 0.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.draw`."""
    z = perturbed(logits, positions, temperature, top_k, top_p, seed)
    return z.argmax(dim=-1)


def accept(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 0.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    seed: torch.Tensor | None = None,
) -> Accepted:
    """Plain torch twin of `specvlm_kernels.accept`."""
    drawn = draw(logits, positions, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    nodes = tokens.shape[1]
    paths, next_tokens = [], []
    for draws, proposed, above in zip(drawn.tolist(), tokens.tolist(), parents.tolist(), strict=True):
        path: list[int] = []
        node = 0
        for i in range(1, nodes):  # parents[i] < i, so one pass in order finds the whole path
            if above[i] == node and proposed[i] == draws[node]:
                path.append(i)
                node = i
        paths.append(path)
        next_tokens.append(draws[node])
    return accepted(paths, next_tokens, nodes, logits.device)


def accepted(paths: list[list[int]], next_tokens: list[int], nodes: int, device: torch.device) -> Accepted:
    """Walks as tensors."""
    padded = [path + [-1] * (nodes - len(path)) for path in paths]
    return Accepted(
        torch.tensor(padded, dtype=torch.int32, device=device).view(-1, nodes),
        torch.tensor([len(path) for path in paths], dtype=torch.int32, device=device),
        torch.tensor(next_tokens, dtype=torch.int64, device=device),
    )


def law(
    logits: torch.Tensor, temperature: float | torch.Tensor, top_k: int | torch.Tensor, top_p: float | torch.Tensor
) -> torch.Tensor:
    """How probable every token's draw is, [B, N, V] in max(logits' dtype, fp32).

    The softmax of what the filters leave; where the temperature is 0, and in a row without a value above -inf, all of
    it is the token's that `draw` would draw.
    """
    w = at_least_float(logits)
    t = per_row(temperature, torch.float32, w)
    certain = torch.zeros_like(w).scatter_(-1, w.argmax(dim=-1, keepdim=True), 1)
    shares = softmax(_filtered(w / torch.where(t > 0, t, 1), top_k, top_p))
    return torch.where((t > 0) & (shares.sum(dim=-1, keepdim=True) > 0), shares, certain)


def softmax(w: torch.Tensor) -> torch.Tensor:
    """Over the last axis. Infinite values share all of it; a row of -inf alone is zero."""
    best = w.amax(dim=-1, keepdim=True)
    weight = torch.where(w == best, (best > -torch.inf).to(w.dtype), torch.exp(w - best))
    return weight / weight.sum(dim=-1, keepdim=True).clamp(min=1)


def perturbed(
    logits: torch.Tensor,
    positions: torch.Tensor,
    temperature: float | torch.Tensor,
    top_k: int | torch.Tensor,
    top_p: float | torch.Tensor,
    seed: torch.Tensor | None,
    vocabulary: torch.Tensor | None = None,
) -> torch.Tensor:
    """w + g: logits after temperature, top-k and top-p, plus noise; -inf where NaN or filtered out.

    Args:
        vocabulary: [V] int64, the tokens that the logits are of, and the noise is; None: 0 to V - 1.

    Returns:
        [B, N, V] in max(logits' dtype, fp32).
    """
    w = at_least_float(logits)
    number = None if isinstance(temperature, torch.Tensor) else torch.tensor(temperature, dtype=torch.float32).item()
    if seed is None or number == 0:
        return w
    if vocabulary is None:
        noise = race_noise(positions.long() + 1, seed, w.shape[-1])
    else:
        noise = race_noise(positions.long() + 1, seed, int(vocabulary.max()) + 1)[..., vocabulary]
    if number is not None:
        return _filtered(w / number, top_k, top_p) + noise
    t = per_row(temperature, torch.float32, w)
    return _filtered(w / torch.where(t > 0, t, 1), top_k, top_p) + torch.where(t > 0, noise, 0)


def _filtered(w: torch.Tensor, top_k: int | torch.Tensor, top_p: float | torch.Tensor) -> torch.Tensor:
    """Top-k, then top-p: -inf for all but the tokens with less than the limit strictly above them.

    What lies above is counted in tokens for top-k; for top-p in probability, of the tokens that top-k left.
    """
    if not isinstance(top_k, torch.Tensor) and top_k == 0 and not isinstance(top_p, torch.Tensor) and top_p == 1:
        return w
    ordered = w.sort(dim=-1, descending=True).values
    k = per_row(top_k, torch.int64, w)
    last = torch.where(k > 0, k, w.shape[-1]).clamp(max=w.shape[-1]) - 1
    border = ordered.gather(-1, last.expand(*w.shape[:-1], 1))

    p = per_row(top_p, torch.float32, w).double()
    weight = torch.where(ordered == ordered[..., :1], 1, torch.exp(ordered - ordered[..., :1]))
    mass = torch.where(ordered >= border, (weight / MASS_UNIT).long(), 0)  # integers: no order of summing matters
    running = mass.cumsum(dim=-1)
    stays = ((running - mass).double() < p * running[..., -1:].double()) & (ordered >= border)
    nucleus = ordered.gather(-1, stays.sum(dim=-1, keepdim=True).clamp(min=1) - 1)
    border = torch.where(p < 1, nucleus, border)
    return torch.where(w >= border, w, -torch.inf)


def at_least_float(logits: torch.Tensor) -> torch.Tensor:
    """Logits in max(their dtype, fp32), NaN as -inf."""
    w = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return w.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def per_row(setting: float | torch.Tensor, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """A number or a [B] tensor as [B or 1, 1, 1]."""
    return torch.as_tensor(setting, dtype=dtype, device=like.device).view(-1, 1, 1)
