"""The draft's best children under the target's noise, in plain torch."""

import torch

from .acceptance import perturbed


def draft_topk(
    logits: torch.Tensor,
    k: int,
    positions: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 0.0,
    seed: torch.Tensor | None = None,
    exclude: torch.Tensor | None = None,
    vocabulary: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch twin of `specvlm_kernels.draft_topk`."""
    if exclude is not None:
        if vocabulary is None:
            logits = logits.index_fill(-1, exclude, -torch.inf)
        else:
            logits = logits.masked_fill(torch.isin(vocabulary, exclude), -torch.inf)
    z = perturbed(logits, positions, temperature, 0, 1.0, seed, vocabulary)
    values, tokens = z.sort(dim=-1, descending=True, stable=True)  # stable: ties to the lowest id
    centred = (values - values[..., :1]).nan_to_num(nan=0, neginf=-torch.inf)  # the best may be infinite
    if isinstance(temperature, torch.Tensor):
        centred = centred * temperature.clamp(min=1).view(-1, 1, 1)
    elif temperature > 1:
        centred = centred * temperature
    values, tokens = values[..., :k], tokens[..., :k]
    scores = centred[..., :k] - centred.exp().sum(dim=-1, keepdim=True).log()
    tokens = tokens if vocabulary is None else vocabulary[tokens]
    empty = values == -torch.inf
    return tokens.masked_fill(empty, 0), scores.masked_fill(empty, -torch.inf).float()
