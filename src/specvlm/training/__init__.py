"""Teaching a draft by a frozen target."""

from specvlm.training.distill import Batch, DistillConfig, Progress, distill
from specvlm.training.losses import Losses, distillation_losses, logit_losses

__all__ = ["Batch", "DistillConfig", "Losses", "Progress", "distill", "distillation_losses", "logit_losses"]
