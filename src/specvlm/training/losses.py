"""What a draft head learns from: the target's distribution and its features."""

from dataclasses import dataclass

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


def logit_losses(logits: Tensor, teacher_logits: Tensor, vocabulary: Tensor | None = None) -> Losses:
    """The draft's distribution against the teacher's; the feature loss is 0.

    Per row: CE = -sum_v softmax(teacher)_v log softmax(draft)_v, whose gradient is softmax(draft) - softmax(teacher).

    Args:
        logits: [R, r]; without any row the losses are 0.
        teacher_logits: [R, V].
        vocabulary: [r] int64 the teacher's tokens that the draft's are, which the teacher's distribution is confined
            to; None: r = V.
    """
    teacher_logits = teacher_logits.detach()
    best = logits.argmax(-1) if vocabulary is None else vocabulary[logits.argmax(-1)]
    agreement = (best == teacher_logits.argmax(-1)).sum() / max(len(logits), 1)
    if vocabulary is not None:
        teacher_logits = teacher_logits[:, vocabulary]
    log_q = torch.log_softmax(_at_least_float(logits), dim=-1)
    p = torch.softmax(_at_least_float(teacher_logits), dim=-1)
    return Losses(-(p * log_q).sum() / max(len(logits), 1), log_q.new_zeros(()), agreement)


def feature_loss(features: Tensor, teacher_features: Tensor) -> Tensor:
    """Smooth L1 (d^2 / 2 below 1, |d| - 1/2 above), whose gradient is d clamped to [-1, 1]: mean over rows and width.

    Args:
        features, teacher_features: [R, H]; without any row the loss is 0.
    """
    distance = torch.nn.functional.smooth_l1_loss(
        _at_least_float(features), _at_least_float(teacher_features.detach()), reduction="sum"
    )
    return distance / (max(len(features), 1) * features.shape[-1])


def _at_least_float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
