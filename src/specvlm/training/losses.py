"""What a draft head learns from: the target's distribution and its features."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from specvlm.checks import check_int
from specvlm.config import Recipe
from specvlm.targets.base import Choice
from specvlm_kernels import soft_cross_entropy, total_variation

#: How many of the teacher's tokens are ranked. Source: ViSpec.
RANKED: Final = 10


@dataclass(frozen=True, slots=True)
class Losses:
    """Means over the rows that count.

    Attributes:
        parts: by name: "cross_entropy" of the draft's distribution under the teacher's, in nats; "feature", Smooth L1
            between the draft's output and the teacher's, mean over the width; "l1" between the probabilities, from 0
            to 2; "ranking", ListMLE over the teacher's likeliest.
        agreement: share of rows where both hold the same token likeliest; no gradient.
    """

    parts: Mapping[str, Tensor]
    agreement: Tensor

    def weighed(self, recipe: Recipe) -> Tensor:
        """The sum of all parts by their weights in `recipe`."""
        return torch.stack([getattr(recipe, f"{name}_weight") * part for name, part in self.parts.items()]).sum()

    def told(self) -> dict[str, Tensor]:
        """The parts without gradients."""
        return {name: part.detach() for name, part in self.parts.items()}


def logit_losses(
    logits: Tensor,
    teacher_logits: Tensor,
    recipe: Recipe,
    *,
    vocabulary: Tensor | None = None,
    weights: Tensor | None = None,
) -> Losses:
    """The draft's distribution against the teacher's.

    Args:
        logits: [R, r]; without any row the losses are 0.
        teacher_logits: [R, V].
        recipe: which parts weigh anything; the cross-entropy is always told.
        vocabulary: [r] int64 the teacher's tokens that the draft's are, which the teacher's distribution is confined
            to; None: r = V.
        weights: [R] of the rows in the means; None: all alike, as they are in the agreement.
    """
    best = logits.argmax(-1) if vocabulary is None else vocabulary[logits.argmax(-1)]
    agreement = (best == teacher_logits.argmax(-1)).sum() / max(len(logits), 1)
    confined = teacher_logits if vocabulary is None else teacher_logits[:, vocabulary]
    of_rows = {"cross_entropy": soft_cross_entropy(logits, confined)}
    if recipe.l1_weight:
        of_rows["l1"] = total_variation(logits, confined)
    if recipe.ranking_weight:
        of_rows["ranking"] = ranking_loss(logits, confined, min(RANKED, logits.shape[-1]))
    share = torch.ones_like(of_rows["cross_entropy"]) if weights is None else weights
    total = share.sum() if len(share) else 1
    return Losses({name: (share * loss).sum() / total for name, loss in of_rows.items()}, agreement)


def feature_loss(features: Tensor, teacher_features: Tensor) -> Tensor:
    """Smooth L1 (d^2 / 2 below 1, |d| - 1/2 above), whose gradient is d clamped to [-1, 1]: mean over rows and width.

    Args:
        features, teacher_features: [R, H]; without any row the loss is 0.
    """
    distance = torch.nn.functional.smooth_l1_loss(
        _at_least_float(features), _at_least_float(teacher_features.detach()), reduction="sum"
    )
    return distance / (max(len(features), 1) * features.shape[-1])


def choice_losses(choice: Choice) -> Losses:
    """What a compressor's gate costs: how unevenly its options are used, and how many rows it lets through.

    "balance" is KL(mean of the gate's probabilities over the batch || uniform) in nats, from 0 to log O; "rows" the
    share of a picture's rows that is left, as the gate expects it.
    """
    mean = choice.probabilities.mean(dim=0)  # [O]
    balance = math.log(len(mean)) + torch.xlogy(mean, mean).sum()
    rows = (choice.probabilities * choice.rows).sum(dim=1).mean()
    return Losses({"balance": balance, "rows": rows}, rows.new_zeros(()))


def ranking_loss(logits: Tensor, teacher_logits: Tensor, k: int) -> Tensor:
    """ListMLE (Xia et al., 2008) over the teacher's k likeliest tokens: how unlikely the draft holds their order.

    With z_1, ..., z_k the draft's logits of them, the teacher's likeliest first, it is

        sum_i (log sum_{j >= i} exp(z_j) - z_i),

    -log of the probability that the draft draws them in this order, when it draws from them without putting back. What
    it says of other tokens does not matter. ViSpec (2025) ranks 10.

    Args:
        logits, teacher_logits: [R, V].
        k: how many, from 1 to V; 1 leaves nothing to rank. Of those that the teacher holds at -inf none counts.

    Returns:
        [R] in nats, in max(dtype of logits, fp32), with a gradient for `logits` alone. +inf, without a gradient, where
        the draft holds one of the tokens that count at -inf.

    Raises:
        TypeError, ValueError: another k, or shapes that differ.
    """
    if teacher_logits.shape != logits.shape:
        raise ValueError(f"teacher_logits: expected shape {list(logits.shape)}, got {list(teacher_logits.shape)}")
    check_int("k", k, low=1, high=logits.shape[-1])
    best = teacher_logits.detach().topk(k)
    z = _at_least_float(logits.gather(-1, best.indices))  # [R, k]
    counts = best.values > -torch.inf
    lacks = counts & (z == -torch.inf)
    z = z.masked_fill(lacks | ~counts, 0)
    # Token j stands where the i-th is drawn if it comes no earlier; one that does not count is drawn from itself alone.
    places = torch.arange(k, device=z.device)
    stands = (places > places[:, None]) & counts[:, None, :] | (places == places[:, None])  # [R, i, j]
    sums = z[:, None, :].masked_fill(~stands, -torch.inf).logsumexp(-1)
    return (sums - z).sum(-1).masked_fill(lacks.any(-1), torch.inf)


def _at_least_float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
