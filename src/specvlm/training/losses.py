"""What a draft head learns from: the target's distribution and its features."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Losses:
    """Means over the rows that count.

    Attributes:
        cross_entropy: of the draft's distribution under the teacher's, in nats.
        feature: Smooth L1 between the draft's output and the teacher's feature, mean over the width.
        agreement: share of rows where both hold the same token likeliest; no gradient.
    """

    cross_entropy: Tensor
    feature: Tensor
    agreement: Tensor


def distillation_losses(
    logits: Tensor, features: Tensor, teacher_logits: Tensor, teacher_features: Tensor, mask: Tensor
) -> Losses:
    """SpecVLM's online-logit distillation, on the rows of `mask`.

    Per row: CE = -sum_v softmax(teacher)_v log softmax(draft)_v, whose gradient is softmax(draft) - softmax(teacher);
    and Smooth L1 (d^2 / 2 below 1, |d| - 1/2 above), whose gradient is d clamped to [-1, 1], over the width.

    Args:
        logits, teacher_logits: [..., V].
        features, teacher_features: [..., H].
        mask: [...] bool; rows outside do not count. Without any row the losses are 0.
    """
    features, teacher_features = features[mask], teacher_features[mask].detach()
    distance = torch.nn.functional.smooth_l1_loss(
        _at_least_float(features), _at_least_float(teacher_features), reduction="sum"
    )
    of_logits = logit_losses(logits[mask], teacher_logits[mask])
    return replace(of_logits, feature=distance / (max(len(features), 1) * features.shape[-1]))


def logit_losses(logits: Tensor, teacher_logits: Tensor) -> Losses:
    """The cross-entropy alone, for a draft with features of its own; the feature loss is 0.

    Args:
        logits, teacher_logits: [R, V]; without any row the losses are 0.
    """
    teacher_logits = teacher_logits.detach()
    rows = max(len(logits), 1)
    log_q = torch.log_softmax(_at_least_float(logits), dim=-1)
    p = torch.softmax(_at_least_float(teacher_logits), dim=-1)
    return Losses(
        cross_entropy=-(p * log_q).sum() / rows,
        feature=log_q.new_zeros(()),
        agreement=(logits.argmax(-1) == teacher_logits.argmax(-1)).sum() / rows,
    )


def _at_least_float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
