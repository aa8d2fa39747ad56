"""Online-logit distillation: the frozen target runs on the fly, nothing of its is stored.

Source: SpecVLM (2025), section 3.3: 0.1 cross-entropy with the target's distribution plus 1.0 Smooth L1 with its
features, on the answer's tokens.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from specvlm.checks import check_int, check_number
from specvlm.drafts.eagle import EagleDraft
from specvlm.targets.hf import HFTarget
from specvlm.targets.hf_attention import AttentionStep
from specvlm.training.losses import Losses, distillation_losses


@dataclass(frozen=True, slots=True)
class DistillConfig:
    """How a head is trained.

    Attributes:
        steps: optimiser steps.
        learning_rate: of AdamW, after `warm_up` steps; it falls to a tenth along a cosine.
        betas, weight_decay: AdamW's.
        cross_entropy_weight, feature_weight: the loss's.
        feature_noise: half the width of the uniform noise added to the features the head reads, so that it learns
            to read its own.
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
    draft: EagleDraft,
    batch_of: Callable[[int], Batch],
    config: DistillConfig,
    *,
    checkpoint: Path | None = None,
    measure_tau: Callable[[], float] | None = None,
) -> Iterator[Progress]:
    """Trains the draft's head in place, a step an item.

    Args:
        target: frozen; `draft` is bound to it.
        batch_of: the batch of a step, the same whenever it is asked for, so that a killed run resumes to the same
            weights.
        checkpoint: a file that the run is saved to as it goes, whole or not at all, and resumed from if it is there.
        measure_tau: decodes with the draft as it is; called whenever a checkpoint is due.

    Raises:
        ValueError: the checkpoint is of another configuration.
    """
    with _frozen(target.model):
        yield from _train(target, draft, batch_of, config, checkpoint, measure_tau)


def _train(
    target: HFTarget,
    draft: EagleDraft,
    batch_of: Callable[[int], Batch],
    config: DistillConfig,
    checkpoint: Path | None,
    measure_tau: Callable[[], float] | None,
) -> Iterator[Progress]:
    head = draft.head.train()
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    first = _resume(checkpoint, draft, optimizer, config)
    started, tau = time.perf_counter(), None
    for step in range(first, config.steps):
        losses = _losses(target, draft, batch_of(step), _noise(config, step))
        loss = config.cross_entropy_weight * losses.cross_entropy + config.feature_weight * losses.feature
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), config.clip)
        optimizer.step()
        done = step + 1
        if done % config.checkpoint_every == 0 or done == config.steps:
            if checkpoint is not None:
                _save(checkpoint, draft, optimizer, config, done)
            if measure_tau is not None:
                head.eval()
                tau = measure_tau()
                head.train()
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
    head.eval()


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradient for the model's weights meanwhile: its output head stands in the draft's graph."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _losses(target: HFTarget, draft: EagleDraft, batch: Batch, noise: Callable[[Tensor], Tensor]) -> Losses:
    """Row i pairs feature i with token i + 1; it is to say what the target says of token i + 2."""
    embeds, features = target.teach(batch.inputs)
    batch_size, length = batch.inputs["input_ids"].shape
    positions = torch.arange(length - 2, device=features.device).expand(batch_size, -1)
    step = AttentionStep(torch.zeros(batch_size, dtype=torch.int32, device=features.device), None)
    hidden = draft.head(embeds[:, 1:-1], noise(features[:, :-2]), positions, None, step)
    with torch.no_grad():
        teacher_logits = target.head(features[:, 1:-1])
    answers = batch.answers.to(features.device)
    counts = answers[:, 1:-1] & answers[:, 2:]  # the pair's token is in the answer, and so is the one it is to guess
    return distillation_losses(draft.logits(hidden), hidden, teacher_logits, features[:, 1:-1], counts)


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


def _save(path: Path, draft: EagleDraft, optimizer: torch.optim.Optimizer, config: DistillConfig, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".part")
    state = {
        "config": asdict(config),
        "step": step,
        "head": draft.head.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, fresh)
    os.replace(fresh, path)


def _resume(path: Path | None, draft: EagleDraft, optimizer: torch.optim.Optimizer, config: DistillConfig) -> int:
    """The step to go on from."""
    if path is None or not path.exists():
        return 0
    state = torch.load(path, weights_only=True, map_location="cpu")
    if state["config"] != asdict(config):
        raise ValueError(f"checkpoint: expected the run's own configuration in {path}, got {state['config']}")
    draft.head.load_state_dict(state["head"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
