"""Teaching a draft by a frozen target."""

from specvlm.training.block import BlockDistillConfig, BlockObjective
from specvlm.training.distill import Progress, distill
from specvlm.training.losses import Losses, feature_loss, logit_losses
from specvlm.training.objectives import Batch, DistillConfig, Lesson, Objective, objective_of

__all__ = [
    "Batch",
    "BlockDistillConfig",
    "BlockObjective",
    "DistillConfig",
    "Lesson",
    "Losses",
    "Objective",
    "Progress",
    "distill",
    "feature_loss",
    "logit_losses",
    "objective_of",
]
