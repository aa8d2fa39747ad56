"""The distances of a draft's distributions from their teacher's, in plain torch; autograd gives the gradients."""

import torch


def soft_cross_entropy(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.soft_cross_entropy`."""
    log_q = at_least_float(logits).log_softmax(-1)
    p = at_least_float(teacher_logits.detach()).softmax(-1)
    return -torch.where(p == 0, 0, p * log_q).sum(-1)  # 0 * -inf is NaN


def total_variation(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Plain torch twin of `specvlm_kernels.total_variation`."""
    q = at_least_float(logits).softmax(-1)
    p = at_least_float(teacher_logits.detach()).softmax(-1)
    return (q - p).abs().sum(-1)


def at_least_float(x: torch.Tensor) -> torch.Tensor:
    """x in max(its dtype, fp32)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
