"""Online-logit distillation: the frozen target runs on the fly, nothing of its is stored."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from specvlm.targets.hf import HFTarget
from specvlm.training.objectives import Batch, DistillConfig, Objective, objective_of


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training stands after a step.

    Attributes:
        step: how many are done, of `steps`.
        loss, agreement: of the step's batch, as in `Lesson`.
        parts: what the loss is made of, by name.
        tau: tokens a round, measured by decoding when the last checkpoint was due; None: not yet.
        seconds_left: at the pace so far.
    """

    step: int
    steps: int
    loss: float
    parts: Mapping[str, float]
    agreement: float
    tau: float | None
    seconds_left: float


def distill(
    target: HFTarget,
    draft: Any,
    batch_of: Callable[[int], Batch],
    config: DistillConfig,
    *,
    checkpoint: Path | None = None,
    measure_tau: Callable[[], float] | None = None,
) -> Iterator[Progress]:
    """Trains a draft in place, a step an item; a small model but for its vision tower.

    Args:
        target: frozen; `draft` is bound to it.
        batch_of: the batch of a step, the same whenever it is asked for, so that a killed run resumes to the same
            weights.
        checkpoint: a file that the run is saved to as it goes, whole or not at all, and resumed from if it is there.
        measure_tau: decodes with the draft as it is; called whenever a checkpoint is due.

    Raises:
        ValueError: the draft is of a kind that does not learn, the config does not fit it, or the checkpoint is broken
            or another run's: of another configuration, draft or target.
    """
    objective = objective_of(target, draft, config)
    run = _Run(objective, config, _identity(target, draft, config))
    with _frozen(target.model), _frozen(objective.still):
        yield from run.steps(batch_of, checkpoint, measure_tau)


class _Run:
    """A training under way: what learns, its optimiser, and what makes it this run."""

    def __init__(self, objective: Objective, config: DistillConfig, identity: dict[str, Any]) -> None:
        self._objective, self._config, self._identity = objective, config, identity

    def steps(
        self, batch_of: Callable[[int], Batch], checkpoint: Path | None, measure_tau: Callable[[], float] | None
    ) -> Iterator[Progress]:
        config, student = self._config, self._objective.student.train()
        learning = [parameter for parameter in student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            learning, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        first = self._resume(checkpoint, optimizer)
        started, tau = time.perf_counter(), None
        for step in range(first, config.steps):
            lesson = self._objective.lesson(batch_of(step), step)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _schedule(step, config)
            optimizer.zero_grad(set_to_none=True)
            lesson.loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, config.clip)
            optimizer.step()
            done = step + 1
            if done % config.checkpoint_every == 0 or done == config.steps:
                if checkpoint is not None:
                    self._save(checkpoint, optimizer, done)
                if measure_tau is not None:
                    student.eval()
                    tau = measure_tau()
                    student.train()
            pace = (time.perf_counter() - started) / (done - first)
            yield Progress(
                step=done,
                steps=config.steps,
                loss=float(lesson.loss.detach()),
                parts={name: float(part) for name, part in lesson.parts.items()},
                agreement=float(lesson.agreement),
                tau=tau,
                seconds_left=pace * (config.steps - done),
            )
        student.eval()

    def _save(self, path: Path, optimizer: torch.optim.Optimizer, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".part")
        state = {
            "run": self._identity,
            "step": step,
            "weights": self._learned(),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(state, fresh)
        os.replace(fresh, path)

    def _resume(self, path: Path | None, optimizer: torch.optim.Optimizer) -> int:
        """The step to go on from."""
        if path is None or not path.exists():
            return 0
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            run = state["run"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, UnpicklingError) as error:
            raise ValueError(f"checkpoint: expected a whole one in {path}, got {error}") from error
        mine = self._identity
        if differs := [name for name in mine if run.get(name) != mine[name]]:
            got = ", ".join(f"another {name} ({run.get(name)})" for name in differs)
            raise ValueError(f"checkpoint: expected this run's own in {path}, got {got}")
        with torch.no_grad():
            for name, weight in self._learned().items():
                weight.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"]

    def _learned(self) -> dict[str, Tensor]:
        """What training changes, by name."""
        student = self._objective.student
        return {name: weight for name, weight in student.named_parameters() if weight.requires_grad}


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


def _schedule(step: int, config: DistillConfig) -> float:
    """The learning rate's factor: a linear warm-up, then a cosine from 1 to a tenth."""
    if step < config.warm_up:
        return (step + 1) / config.warm_up
    way = (step - config.warm_up) / max(1, config.steps - config.warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * way))


def _identity(target: HFTarget, draft: Any, config: DistillConfig) -> dict[str, Any]:
    """What makes a run this one: its settings, the draft's sizes, and the target, told by sums over its output head."""
    rows = torch.arange(min(64, target.spec.vocab_size), device=target.spec.device)
    told = target.head_rows(rows).detach().double()
    return {
        "config": asdict(config),
        "draft": draft.sizes,
        "target": [float(told.sum()), float(told.norm())],
    }
