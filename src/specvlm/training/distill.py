"""Online-logit distillation: the frozen target runs on the fly, nothing of its is stored.

A step of the optimiser takes `accumulate` batches. Processes that torchrun started share them: each adds up its own
gradients, all of them are added up once a step and divided by all the step's rows. So every row weighs the same,
whoever has it, and as many processes as one likes train the same draft.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specvlm.targets.hf import HFTarget
from specvlm.training import checkpoint as checkpoints
from specvlm.training.objectives import Batch, DistillConfig, Objective, objective_of
from specvlm.training.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training stands after a step.

    Attributes:
        step: how many are done, of `steps`.
        loss, agreement: over the step's rows, as in `Lesson`.
        parts: what the loss is made of, by name.
        learning_rate: of the step.
        tau: tokens a round, as it was measured last; None: not yet.
        seconds_left: at the pace so far.
    """

    step: int
    steps: int
    loss: float
    parts: Mapping[str, float]
    agreement: float
    learning_rate: float
    tau: float | None
    seconds_left: float


def distill(
    target: HFTarget,
    draft: Any,
    batch_of: Callable[[int], Batch],
    config: DistillConfig,
    *,
    checkpoint: Path | None = None,
    about: Mapping[str, Any] | None = None,
    measure_tau: Callable[[], float] | None = None,
    tau_every: int | None = None,
) -> Iterator[Progress]:
    """Trains a draft in place, a step an item; a small model but for its vision tower.

    Args:
        target: frozen; `draft` is bound to it.
        batch_of: the batch of a number, the same whenever it is asked for, so that a killed run resumes to the same
            weights; step s takes `accumulate` of them from number s * accumulate on.
        checkpoint: a file that the run is saved to as it goes, whole or not at all, and resumed from if it is there.
        about: what else makes this run the one it is: its data, say.
        measure_tau: decodes with the draft as it is; called by the first process alone.
        tau_every: steps between measurements; None: a measurement whenever a checkpoint is due.

    Raises:
        ValueError: the draft is of a kind that does not learn or is not bound to the target, the config does not fit
            it, the checkpoint is broken or another run's, or a loss is no finite number: its batches are named, and the
            last checkpoint stays.
        OSError: a checkpoint cannot be written; the one before it stays.
    """
    objective = objective_of(target, draft, config)
    identity = _identity(target, draft, config) | {"data": dict(about or {})}
    with _frozen(target.model), _frozen(objective.still):
        run = _Run(objective, config, identity)
        yield from run.steps(batch_of, checkpoint, measure_tau, tau_every or config.checkpoint_every)


class _Run:
    """A training under way: what learns, its optimiser, and what makes it this run."""

    def __init__(self, objective: Objective, config: DistillConfig, identity: dict[str, Any]) -> None:
        self._objective, self._config, self._identity = objective, config, identity
        self._ranks = Ranks.now()
        if config.accumulate % self._ranks.size:
            raise ValueError(
                f"accumulate: expected a multiple of the {self._ranks.size} processes, got {config.accumulate}"
            )
        self._student = objective.student.train()
        self._weights = _Weights(self._student)
        self._optimizer = torch.optim.AdamW(
            self._weights.moved.values(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )

    def steps(
        self,
        batch_of: Callable[[int], Batch],
        checkpoint: Path | None,
        measure_tau: Callable[[], float] | None,
        tau_every: int,
    ) -> Iterator[Progress]:
        config = self._config
        first = 0 if checkpoint is None else self._resume(checkpoint)
        started, tau = time.perf_counter(), None
        for step in range(first, config.steps):
            rate = config.learning_rate * _schedule(step, config)
            told = self._step(step, batch_of, rate, checkpoint)
            done = step + 1
            last = done == config.steps
            if measure_tau is not None and self._ranks.leads and (done % tau_every == 0 or last):
                self._student.eval()
                tau = measure_tau()
                self._student.train()
            pace = (time.perf_counter() - started) / (done - first)
            loss, agreement = told.pop("loss"), told.pop("agreement")
            yield Progress(done, config.steps, loss, told, agreement, rate, tau, pace * (config.steps - done))
            # After the item, so that what is written of it is never lost: it is written anew by a run that resumes.
            if checkpoint is not None and self._ranks.leads and (done % config.checkpoint_every == 0 or last):
                self._save(checkpoint, done)
        self._student.eval()

    def _step(
        self, step: int, batch_of: Callable[[int], Batch], rate: float, checkpoint: Path | None
    ) -> dict[str, float]:
        """One step of the optimiser; means over its rows, by name."""
        config, weights = self._config, self._weights
        weights.clear()
        sums: dict[str, Tensor] = {}
        rows, seen = 0, list[tuple[tuple[str, ...], Tensor]]()
        for number in range(
            step * config.accumulate + self._ranks.rank, (step + 1) * config.accumulate, self._ranks.size
        ):
            batch = batch_of(number)
            with _seeded(config.seed, number, weights.device):
                lesson = self._objective.lesson(batch, number)
                (lesson.loss * batch.rows).backward()
            weights.gather()
            for name, value in {"loss": lesson.loss.detach(), "agreement": lesson.agreement, **lesson.parts}.items():
                sums[name] = sums.get(name, 0) + value.detach().double() * batch.rows
            rows += batch.rows
            seen.append((batch.ids or (f"batch {number}",), lesson.loss.detach()))
        totals = torch.stack([torch.tensor(rows, dtype=torch.float64, device=weights.device), *sums.values()])
        self._ranks.add_up([totals])
        self._ranks.add_up(weights.gradients())
        count, *summed = totals.tolist()
        for gradient in weights.gradients():
            gradient.div_(max(count, 1.0))
        norm = float(torch.nn.utils.clip_grad_norm_(weights.moved.values(), config.clip))
        found = {name: total / max(count, 1.0) for name, total in zip(sums, summed, strict=True)}
        if not (math.isfinite(found["loss"]) and math.isfinite(norm)):
            self._refuse(step, found["loss"], seen, checkpoint)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        weights.publish()
        return found

    def _refuse(
        self, step: int, loss: float, seen: list[tuple[tuple[str, ...], Tensor]], checkpoint: Path | None
    ) -> None:
        bad = [ids for ids, value in seen if not math.isfinite(value)] or [ids for ids, _ in seen]
        named = ", ".join(sorted({one for said in self._ranks.told(bad) for ids in said for one in ids}))
        what = f"a loss of {loss}" if not math.isfinite(loss) else "a gradient that is none"
        kept = "nothing is saved yet" if checkpoint is None or not checkpoint.exists() else f"{checkpoint} stays"
        raise ValueError(f"loss: expected a finite number, got {what} in step {step + 1}, of {named}; {kept}")

    def _save(self, path: Path, step: int) -> None:
        # Nothing random outlasts a batch, whose number it follows from: the step is the random state.
        state = {"step": step, "weights": self._weights.moved, "optimizer": self._optimizer.state_dict()}
        checkpoints.save(path, self._identity, state)

    def _resume(self, path: Path) -> int:
        """The step to go on from."""
        state = checkpoints.resume(path, self._identity)
        if state is None:
            return 0
        with torch.no_grad():
            for name, weight in self._weights.moved.items():
                weight.copy_(state["weights"][name])
        self._weights.publish()
        self._optimizer.load_state_dict(state["optimizer"])
        return state["step"]


class _Weights:
    """What of a student learns, and what the optimiser moves: itself, or a copy in fp32 where it computes in less.

    An update is often smaller than a bf16 number's last bit.
    """

    def __init__(self, student: nn.Module) -> None:
        self._own = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
        #: By name.
        self.moved = {
            name: nn.Parameter(weight.detach().float()) if weight.dtype in (torch.bfloat16, torch.float16) else weight
            for name, weight in self._own.items()
        }
        self.device = next(iter(self._own.values())).device

    def clear(self) -> None:
        """Forgets the gradients."""
        for weight in self.moved.values():
            weight.grad = None

    def gather(self) -> None:
        """Adds a batch's gradients to those that are moved."""
        for name, weight in self._own.items():
            moved = self.moved[name]
            if moved is not weight and weight.grad is not None:
                moved.grad = weight.grad.float() if moved.grad is None else moved.grad + weight.grad
                weight.grad = None

    def gradients(self) -> list[Tensor]:
        """Of everything that is moved; zeros where a batch had none."""
        for weight in self.moved.values():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        return [weight.grad for weight in self.moved.values() if weight.grad is not None]

    @torch.no_grad()
    def publish(self) -> None:
        """Gives the student what was moved."""
        for name, weight in self._own.items():
            if self.moved[name] is not weight:
                weight.copy_(self.moved[name])


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


@contextlib.contextmanager
def _seeded(seed: int, number: int, device: torch.device) -> Iterator[None]:
    """What torch draws meanwhile follows from the seed and the batch's number, whichever process it is."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed * 1_000_003 + number)
        yield


def _schedule(step: int, config: DistillConfig) -> float:
    """The learning rate's factor: a linear warm-up, then 1, or a cosine from 1 to a tenth."""
    if step < config.warm_up:
        return (step + 1) / config.warm_up
    if config.schedule == "constant":
        return 1.0
    way = (step - config.warm_up) / max(1, config.steps - config.warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * way))


def _identity(target: HFTarget, draft: Any, config: DistillConfig) -> dict[str, Any]:
    """What makes a run this one."""
    return {
        "config": asdict(config),
        "draft": {"kind": type(draft).__name__, **draft.sizes},
        "target": target_identity(target),
    }


def target_identity(target: HFTarget) -> dict[str, Any]:
    """What tells a target from others: its sizes, and sums over its output head."""
    spec = target.spec
    rows = torch.arange(min(64, spec.vocab_size), device=spec.device)
    head = target.head_rows(rows)[0].detach().double()
    names = ("hidden_size", "vocab_size", "num_layers", "num_heads", "context")
    sizes = {name: getattr(spec, name) for name in names}
    return sizes | {"dtype": str(spec.dtype), "head": [float(head.sum()), float(head.norm())]}
