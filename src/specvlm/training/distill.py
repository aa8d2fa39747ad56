"""Online-logit distillation: the frozen target runs on the fly, nothing of its is stored.

Source: SpecVLM (2025), section 3.3: 0.1 cross-entropy with the target's distribution plus 1.0 Smooth L1 with its
features, on the answer's tokens. A draft with features of its own, a small model, learns the distribution alone.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from specvlm.checks import check_int, check_number
from specvlm.drafts.eagle import EagleDraft
from specvlm.drafts.vlm import VLMDraft
from specvlm.targets.hf import HFTarget
from specvlm.targets.hf_attention import AttentionStep
from specvlm.training.losses import Losses, distillation_losses, logit_losses


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
class Progress:
    """Where a training stands after a step.

    Attributes:
        step: how many are done, of `steps`.
        loss, cross_entropy, feature, agreement: of the step's batch.
        tau: tokens a round, measured by decoding when the last checkpoint was due; None: not yet.
        seconds_left: at the pace so far.
    """

    step: int
    steps: int
    loss: float
    cross_entropy: float
    feature: float
    agreement: float
    tau: float | None
    seconds_left: float


def distill(
    target: HFTarget,
    draft: EagleDraft | VLMDraft,
    batch_of: Callable[[int], Batch],
    config: DistillConfig,
    *,
    checkpoint: Path | None = None,
    measure_tau: Callable[[], float] | None = None,
) -> Iterator[Progress]:
    """Trains an EAGLE head, or a small model but for its vision tower, in place, a step an item.

    Args:
        target: frozen; `draft` is bound to it.
        batch_of: the batch of a step, the same whenever it is asked for, so that a killed run resumes to the same
            weights.
        checkpoint: a file that the run is saved to as it goes, whole or not at all, and resumed from if it is there.
        measure_tau: decodes with the draft as it is; called whenever a checkpoint is due.

    Raises:
        ValueError: the checkpoint is broken or another run's: of another configuration, draft or target; the head has a
            reduced vocabulary, for which there is no loss yet; or features that a small model does not read are to have
            noise.
    """
    if isinstance(draft, EagleDraft) and draft.head.config.draft_vocab_size is not None:
        raise ValueError(f"draft_vocab_size: expected none in training, got {draft.head.config.draft_vocab_size}")
    if isinstance(draft, VLMDraft) and config.feature_noise:
        raise ValueError(f"feature_noise: expected 0, for a small model reads no features, got {config.feature_noise}")
    with _frozen(target.model), _frozen(_tower(draft)):
        yield from _train(target, draft, batch_of, config, checkpoint, measure_tau)


def _train(
    target: HFTarget,
    draft: EagleDraft | VLMDraft,
    batch_of: Callable[[int], Batch],
    config: DistillConfig,
    checkpoint: Path | None,
    measure_tau: Callable[[], float] | None,
) -> Iterator[Progress]:
    student = _student(draft).train()
    learning = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learning, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    first = _resume(checkpoint, draft, optimizer, config)
    started, tau = time.perf_counter(), None
    for step in range(first, config.steps):
        if isinstance(draft, EagleDraft):
            losses = _head_losses(target, draft, batch_of(step), _noise(config, step))
        else:
            losses = _model_losses(target, draft, batch_of(step))
        loss = config.cross_entropy_weight * losses.cross_entropy + config.feature_weight * losses.feature
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, config.clip)
        optimizer.step()
        done = step + 1
        if done % config.checkpoint_every == 0 or done == config.steps:
            if checkpoint is not None:
                _save(checkpoint, draft, optimizer, config, done)
            if measure_tau is not None:
                student.eval()
                tau = measure_tau()
                student.train()
        pace = (time.perf_counter() - started) / (done - first)
        yield Progress(
            step=done,
            steps=config.steps,
            loss=float(loss.detach()),
            cross_entropy=float(losses.cross_entropy.detach()),
            feature=float(losses.feature.detach()),
            agreement=float(losses.agreement),
            tau=tau,
            seconds_left=pace * (config.steps - done),
        )
    student.eval()


def _student(draft: EagleDraft | VLMDraft) -> nn.Module:
    return draft.head if isinstance(draft, EagleDraft) else draft.model


def _tower(draft: EagleDraft | VLMDraft) -> nn.Module:
    """What of a draft does not learn."""
    if isinstance(draft, VLMDraft) and draft.sees:
        return draft.model.model.vision_tower
    return nn.Module()


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradient for the model's weights meanwhile, though they stand in the draft's graph."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _head_losses(target: HFTarget, draft: EagleDraft, batch: Batch, noise: Callable[[Tensor], Tensor]) -> Losses:
    """Row i pairs feature i with token i + 1; it is to say what the target says of token i + 2."""
    taught = target.teach(batch.inputs)
    embeds, features = taught.embeds, taught.features
    batch_size, length = batch.inputs["input_ids"].shape
    positions = torch.arange(length - 2, device=features.device).expand(batch_size, -1)
    step = AttentionStep(torch.zeros(batch_size, dtype=torch.int32, device=features.device), None)
    hidden = draft.head(embeds[:, 1:-1], noise(features[:, :-2]), positions, None, step)
    with torch.no_grad():
        teacher_logits = target.head(features[:, 1:-1])
    answers = batch.answers.to(features.device)
    counts = answers[:, 1:-1] & answers[:, 2:]  # the pair's token is in the answer, and so is the one it is to guess
    return distillation_losses(draft.logits(hidden), hidden, teacher_logits, features[:, 1:-1], counts)


def _model_losses(target: HFTarget, draft: VLMDraft, batch: Batch) -> Losses:
    """Row i, which reads token i, is to say what the target says of token i + 1."""
    taught = target.teach(batch.inputs)
    embeds, left_out = draft.read(taught)
    positions = torch.arange(embeds.shape[1], device=embeds.device).expand(len(embeds), -1)
    hidden = draft.forward(embeds, positions, None, AttentionStep(torch.zeros_like(left_out), None))
    answers = batch.answers.to(embeds.device)
    # As in decoding, the answer's first token is given.
    row, place = (answers[:, :-1] & answers[:, 1:]).nonzero(as_tuple=True)
    with torch.no_grad():
        teacher_logits = target.head(taught.features[row, place])
    return logit_losses(draft.logits(hidden[row, place - left_out[row]]), teacher_logits)


def _noise(config: DistillConfig, step: int) -> Callable[[Tensor], Tensor]:
    """Adds the step's own uniform noise to features."""

    def add(features: Tensor) -> Tensor:
        if not config.feature_noise:
            return features
        generator = torch.Generator(features.device).manual_seed(config.seed * 1_000_003 + step)
        uniform = torch.rand(features.shape, generator=generator, device=features.device, dtype=features.dtype)
        return features + (2 * uniform - 1) * config.feature_noise

    return add


def _schedule(step: int, config: DistillConfig) -> float:
    """The learning rate's factor: a linear warm-up, then a cosine from 1 to a tenth."""
    if step < config.warm_up:
        return (step + 1) / config.warm_up
    way = (step - config.warm_up) / max(1, config.steps - config.warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * way))


def _identity(draft: EagleDraft | VLMDraft, config: DistillConfig) -> dict[str, Any]:
    """What makes a run this one: its settings, the draft's sizes, and the target, told by sums over its output head."""
    rows = torch.arange(min(64, draft.target.spec.vocab_size), device=draft.target.spec.device)
    told = draft.target.head_rows(rows).detach().double()
    return {
        "config": asdict(config),
        "draft": draft.sizes,
        "target": [float(told.sum()), float(told.norm())],
    }


def _save(
    path: Path, draft: EagleDraft | VLMDraft, optimizer: torch.optim.Optimizer, config: DistillConfig, step: int
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".part")
    state = {
        "run": _identity(draft, config),
        "step": step,
        "weights": _learned(draft),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, fresh)
    os.replace(fresh, path)


def _resume(
    path: Path | None, draft: EagleDraft | VLMDraft, optimizer: torch.optim.Optimizer, config: DistillConfig
) -> int:
    """The step to go on from."""
    if path is None or not path.exists():
        return 0
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        run = state["run"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, UnpicklingError) as error:
        raise ValueError(f"checkpoint: expected a whole one in {path}, got {error}") from error
    mine = _identity(draft, config)
    if differs := [name for name in mine if run.get(name) != mine[name]]:
        got = ", ".join(f"another {name} ({run.get(name)})" for name in differs)
        raise ValueError(f"checkpoint: expected this run's own in {path}, got {got}")
    with torch.no_grad():
        for name, weight in _learned(draft).items():
            weight.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _learned(draft: EagleDraft | VLMDraft) -> dict[str, Tensor]:
    """What training changes, by name."""
    return {name: weight for name, weight in _student(draft).named_parameters() if weight.requires_grad}
