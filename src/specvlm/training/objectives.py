"""What each kind of draft learns from a frozen target, a batch at a time.

Source: SpecVLM (2025), section 3.3: 0.1 cross-entropy with the target's distribution plus 1.0 Smooth L1 with its
features, on the answer's tokens. A draft with features of its own, a small model, learns the distribution alone.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from specvlm.checks import check_int, check_number
from specvlm.drafts.base import Draft
from specvlm.drafts.eagle import EagleDraft
from specvlm.drafts.vlm import VLMDraft
from specvlm.targets.hf import HFTarget
from specvlm.targets.hf_attention import AttentionStep
from specvlm.training.losses import distillation_losses, logit_losses


@dataclass(frozen=True, slots=True)
class DistillConfig:
    """How a draft is trained.

    Attributes:
        steps: optimiser steps.
        learning_rate: of AdamW, after `warm_up` steps; it falls to a tenth along a cosine.
        betas, weight_decay: AdamW's.
        cross_entropy_weight, feature_weight: the loss's.
        feature_noise: half the width of the uniform noise added to the features a head reads, so that it learns
            to read its own; a small model reads none.
        clip: the largest norm of a gradient.
        checkpoint_every: steps between checkpoints.
        seed: of the noise; with the data's own seed it fixes the result.
    """

    steps: int
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    cross_entropy_weight: float = 0.1
    feature_weight: float = 1.0
    feature_noise: float = 0.0
    warm_up: int = 0
    clip: float = 1.0
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("steps", self.steps, low=1)
        check_int("warm_up", self.warm_up, low=0)
        check_int("checkpoint_every", self.checkpoint_every, low=1)
        for name in (
            "learning_rate",
            "cross_entropy_weight",
            "feature_weight",
            "feature_noise",
            "weight_decay",
            "clip",
        ):
            check_number(name, getattr(self, name))
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}: expected a finite number >= 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Batch:
    """Whole sequences of prompt and answer, padded at their ends.

    Attributes:
        inputs: input_ids [B, T], and the pictures, as the target's `teach` takes them.
        answers: [B, T] bool, true on the answers' tokens.
    """

    inputs: dict[str, Tensor]
    answers: Tensor


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a batch taught.

    Attributes:
        loss: to be made smaller.
        parts: what it is made of, by name, before any weight; no gradient.
        agreement: share of the tokens where draft and target hold the same one likeliest; no gradient.
    """

    loss: Tensor
    parts: Mapping[str, Tensor]
    agreement: Tensor


class Objective(Protocol):
    """What one draft is to learn of one target; both are bound to each other and stay where they are.

    Attributes:
        student: the draft's module, whose parameters learn.
        still: what of the student does not.
    """

    student: nn.Module
    still: nn.Module

    def lesson(self, batch: Batch, step: int) -> Lesson:
        """Target and draft on a batch; what is random in it follows from the step."""
        ...


class HeadObjective:
    """An EAGLE head's: the target's distribution one token on, and its feature there.

    Raises:
        ValueError: the head has a reduced vocabulary, for which there is no loss yet.
    """

    student: nn.Module
    still: nn.Module

    def __init__(self, target: HFTarget, draft: EagleDraft, config: DistillConfig) -> None:
        if draft.head.config.draft_vocab_size is not None:
            raise ValueError(f"draft_vocab_size: expected none in training, got {draft.head.config.draft_vocab_size}")
        self.student, self.still = draft.head, nn.Module()
        self._target, self._draft, self._config = target, draft, config

    def lesson(self, batch: Batch, step: int) -> Lesson:
        """The pair of row j's feature and row j + 1's token is to say what the target says behind that token."""
        taught, features = self._target.teach(batch.inputs)
        answers = batch.answers.to(features.device)
        seen, pairs = self._draft.head.read(replace(taught, features=self._noise(taught.features, step)))
        prompt = AttentionStep(torch.zeros_like(seen.lengths), None)
        hidden = self._draft.head(pairs, None, prompt)
        at = seen.positions[:, 1:].long()  # of the pairs' tokens
        teacher_features = features.gather(1, at[..., None].expand(-1, -1, features.shape[2]))
        with torch.no_grad():
            teacher_logits = self._target.head(teacher_features)
        # A pair counts where its token is in the answer, and so is the one to guess.
        counts = (answers & nn.functional.pad(answers[:, 1:], (0, 1))).gather(1, at)
        losses = distillation_losses(self._draft.logits(hidden), hidden, teacher_logits, teacher_features, counts)
        config = self._config
        weighed = config.cross_entropy_weight * losses.cross_entropy + config.feature_weight * losses.feature
        parts = {"cross_entropy": losses.cross_entropy.detach(), "feature": losses.feature.detach()}
        return Lesson(weighed, parts, losses.agreement)

    def _noise(self, features: Tensor, step: int) -> Tensor:
        """The features with the step's own uniform noise."""
        config = self._config
        if not config.feature_noise:
            return features
        generator = torch.Generator(features.device).manual_seed(config.seed * 1_000_003 + step)
        uniform = torch.rand(features.shape, generator=generator, device=features.device, dtype=features.dtype)
        return features + (2 * uniform - 1) * config.feature_noise


class ModelObjective:
    """A small model's, whose vision tower stays as it is: the target's distribution.

    Raises:
        ValueError: features are to have noise, which it does not read.
    """

    student: nn.Module
    still: nn.Module

    def __init__(self, target: HFTarget, draft: VLMDraft, config: DistillConfig) -> None:
        if config.feature_noise:
            raise ValueError(
                f"feature_noise: expected 0, for a small model reads no features, got {config.feature_noise}"
            )
        self.student = draft.model
        self.still = draft.model.model.vision_tower if draft.sees else nn.Module()
        self._target, self._draft, self._config = target, draft, config

    def lesson(self, batch: Batch, step: int) -> Lesson:
        """Row i, which reads token i, is to say what the target says of token i + 1."""
        draft = self._draft
        taught, features = self._target.teach(batch.inputs)
        embeds, left_out = draft.read(taught)
        positions = torch.arange(embeds.shape[1], device=embeds.device).expand(len(embeds), -1)
        hidden = draft.forward(embeds, positions, None, AttentionStep(torch.zeros_like(left_out), None))
        answers = batch.answers.to(embeds.device)
        # As in decoding, the answer's first token is given.
        row, place = (answers[:, :-1] & answers[:, 1:]).nonzero(as_tuple=True)
        with torch.no_grad():
            teacher_logits = self._target.head(features[row, place])
        losses = logit_losses(draft.logits(hidden[row, place - left_out[row]]), teacher_logits)
        weighed = self._config.cross_entropy_weight * losses.cross_entropy
        return Lesson(weighed, {"cross_entropy": losses.cross_entropy.detach()}, losses.agreement)


#: What a draft learns by, by its class.
OBJECTIVES: dict[type, Callable[[HFTarget, Any, DistillConfig], Objective]] = {
    EagleDraft: HeadObjective,
    VLMDraft: ModelObjective,
}


def objective_of(target: HFTarget, draft: Draft, config: DistillConfig) -> Objective:
    """What `draft`, which is bound to `target`, learns by.

    Raises:
        ValueError: drafts of its kind do not learn, or `config` does not fit it.
    """
    if type(draft) not in OBJECTIVES:
        known = " or ".join(kind.__name__ for kind in OBJECTIVES)
        raise ValueError(f"draft: expected a {known}, which learn, got {type(draft).__name__}")
    return OBJECTIVES[type(draft)](target, draft, config)
