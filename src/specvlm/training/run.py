"""`specvlm train` from its settings to a draft in a folder."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch

from specvlm.config import Recipe, TrainConfig
from specvlm.console import counting_bar, screen
from specvlm.decoder import SpecVLM
from specvlm.drafts import Draft, VLMDraft
from specvlm.loading import load
from specvlm.memory import free_bytes
from specvlm.policies import default_plan
from specvlm.targets.hf import HFTarget
from specvlm.training.data import Batches, PictureCache, Survey, fingerprint, split, survey
from specvlm.training.distill import Progress, distill, target_identity
from specvlm.training.encoding import Encoder
from specvlm.training.generating import generate_answers, with_answers
from specvlm.training.objectives import DistillConfig
from specvlm.training.ranks import Ranks, start_ranks
from specvlm.training.records import QUESTION, Example, read_examples
from specvlm.training.students import new_draft, save_draft
from specvlm.training.watching import Metrics, draw_plots, tau_estimate

CHECKPOINT, METRICS, ANSWERS = "checkpoint.pt", "metrics.jsonl", "answers.jsonl"
_SETTINGS: Final = (
    "draft",
    "batch",
    "micro_batch",
    "held_out",
    "question",
    "self_generate",
    "refuse_long",
    "vocabulary",
)


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of a training.

    Attributes:
        out: the draft's folder.
        steps, epochs: of the optimiser, and what they come to.
        examples: learned from.
        truncated, left_out: examples cut at the context, and such with nothing to learn from.
        left_over: examples, others each time, that an epoch has no whole step for.
        loss, agreement: of the last step; None: there was none left to do.
        tau: as it was measured last.
    """

    out: str
    steps: int
    epochs: float
    examples: int
    truncated: int
    left_out: int
    left_over: int
    loss: float | None
    agreement: float | None
    tau: float | None


def train(config: TrainConfig, recipe: Recipe) -> Trained | None:
    """Trains a draft and puts it into `config.out`, with metrics.jsonl and plots; a run that was stopped goes on.

    Processes that torchrun started share the work; the first one writes and prints, the others return None.

    Raises:
        ValueError: what is wrong with the settings or the data, before any training; or a loss that is no number.
        OSError: a file that cannot be read or written.
    """
    out = Path(config.out)
    if (out / "config.json").exists() and not (out / CHECKPOINT).exists():
        raise ValueError(f"out: expected a folder without a finished draft, got {out}, which holds one")
    ranks, device = start_ranks(config.device)
    if config.batch % (config.micro_batch * ranks.size):
        raise ValueError(
            f"batch: expected a multiple of {config.micro_batch} examples in each of {ranks.size} processes, "
            f"got {config.batch}"
        )
    model = load(config.target, dtype=config.dtype, device=device)
    work = _prepare(config, recipe, ranks, model)
    target, each = cast(HFTarget, model.target), work.batches.steps_per_epoch
    steps = config.steps or config.epochs * each

    def tau() -> float:
        return measured_tau(model, work.draft, work.encoder, work.prompts, config.max_new_tokens)

    run = distill(
        target,
        work.draft,
        work.batches,
        DistillConfig(**asdict(recipe), steps=steps, accumulate=config.batch // config.micro_batch),
        checkpoint=out / CHECKPOINT,
        about=work.about,
        measure_tau=tau if work.prompts else None,
        tau_every=each,
    )
    if not ranks.leads:
        for _ in run:
            pass
        return None
    last = _watch(run, steps, each, out, default_plan(target.spec.device).depth)
    save_draft(work.draft, model.processor, out)
    (out / CHECKPOINT).unlink(missing_ok=True)
    found, over = work.found, work.batches.left_over
    numbers = (None, None, None) if last is None else (last.loss, last.agreement, last.tau)
    return Trained(str(out), steps, steps / each, len(found.examples), found.truncated, found.left_out, over, *numbers)


@dataclass(frozen=True, slots=True)
class _Work:
    """What a training needs besides its target.

    Attributes:
        draft: what learns.
        found, batches: from what.
        prompts: what tau is measured on.
        about: what of the data makes this run the one it is.
    """

    draft: Draft
    encoder: Encoder
    found: Survey
    batches: Batches
    prompts: list[Example]
    about: dict[str, Any]


def _prepare(config: TrainConfig, recipe: Recipe, ranks: Ranks, model: SpecVLM) -> _Work:
    """Reads the data, has the target answer if it is to, and makes the draft."""
    target, out = cast(HFTarget, model.target), Path(config.out)
    encoder = Encoder(model.processor, target)
    pictures = None if config.pictures is None else Path(config.pictures)
    examples = read_examples(Path(config.data), pictures=pictures, question=config.question or QUESTION)
    parts = split(examples, config.held_out)
    draft = new_draft(config, target, recipe.seed)
    out.mkdir(parents=True, exist_ok=True)
    training = parts.training
    if config.self_generate:
        if ranks.leads:
            about = {"examples": fingerprint(training), "target": target_identity(target)}
            limit = config.max_new_tokens
            with counting_bar("answering", len(training)) as show:
                path = out / ANSWERS
                generate_answers(model, encoder, training, path, max_new_tokens=limit, about=about, show=show)
        ranks.told("answers are there")
        training = with_answers(training, out / ANSWERS)
    with counting_bar("reading", len(training), shown=ranks.leads) as show:
        found = survey(training, encoder, refuse_long=config.refuse_long, show=show)
    sees = isinstance(draft, VLMDraft) and draft.sees  # itself, for which the target's rows are of no use
    cache = None if sees else PictureCache(target, encoder, free_bytes(torch.device("cpu")) // (4 * ranks.size))
    per_step = config.batch // config.micro_batch
    batches = Batches(found, encoder, size=config.micro_batch, per_step=per_step, seed=recipe.seed, cache=cache)
    if ranks.leads:
        _tell(found, batches, encoder.context, config.batch)
    about = {"examples": fingerprint(examples)} | {name: getattr(config, name) for name in _SETTINGS}
    return _Work(draft, encoder, found, batches, parts.held_out[: config.tau_prompts], about)


def _tell(found: Survey, batches: Batches, context: int, batch: int) -> None:
    """What of the data is not learned from, if anything is not."""
    notes = screen(stderr=True)
    if found.truncated or found.left_out:
        notes.print(f"{found.truncated} examples cut at the context of {context} tokens, {found.left_out} left out")
    if batches.left_over:
        notes.print(
            f"an epoch is {batches.steps_per_epoch} steps of {batch} examples; {batches.left_over} of the "
            f"{len(found.examples)}, others each time, are left over"
        )


def _watch(run: Iterable[Progress], steps: int, steps_per_epoch: int, out: Path, depth: int) -> Progress | None:
    """Takes a training to its end: a bar on the screen, a line an epoch, metrics.jsonl and the plots."""
    last: Progress | None = None
    with Metrics(out / METRICS, steps_per_epoch) as metrics, counting_bar("training", steps) as show:
        for last in run:
            measured = last.step % steps_per_epoch == 0 or last.step == steps
            metrics.add(last, measured=measured)
            show(last.step, _told(last, depth))
            if measured:
                _report(last, steps_per_epoch, out)
    return last


def measured_tau(
    model: SpecVLM, draft: Draft, encoder: Encoder, prompts: Sequence[Example], max_new_tokens: int
) -> float:
    """Tokens a round over the answers to the first question of each, greedy; 0 where all are of one token."""
    emitted = rounds = 0.0
    for prompt in prompts:
        inputs = encoder.question(prompt, 0)
        room = min(max_new_tokens, encoder.context - inputs["input_ids"].shape[1])
        if room > 1:
            stats = model.generate(**inputs, max_new_tokens=room, draft=draft).stats
            emitted += stats.tau * stats.rounds
            rounds += stats.rounds
    return emitted / rounds if rounds else 0.0


def _told(at: Progress, depth: int) -> str:
    tau = f"tau {at.tau:.2f}" if at.tau is not None else f"tau about {tau_estimate(at.agreement, depth):.1f}"
    return f"loss {at.loss:.4f}  agrees {at.agreement:.0%}  {tau}"


def _report(at: Progress, steps_per_epoch: int, out: Path) -> None:
    """A line an epoch, and the plots anew."""
    notes = screen(stderr=True)
    tau = "" if at.tau is None else f", tau {at.tau:.2f}"
    notes.print(f"epoch {at.step / steps_per_epoch:.2f}: loss {at.loss:.4f}, agrees {at.agreement:.1%}{tau}")
    try:
        draw_plots(out / METRICS, out)
    except ValueError as error:
        if at.step == at.steps:
            notes.print(str(error))
