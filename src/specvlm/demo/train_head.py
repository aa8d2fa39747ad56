"""Trains an EAGLE head on the demo's model: ``python -m specvlm.demo.train_head --out DIR``.

Online-logit distillation on scenes of the training side, drawn as they are needed; a step's batch follows from its
number, so a run that was killed resumes to the same weights. What the head is like and how it learns are options, the
same as `specvlm train` has; by default they are the shipped head's.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Annotated, cast

import torch
import typer

from specvlm.config import HeadConfig, Recipe
from specvlm.console import counting_bar
from specvlm.decoder import SpecVLM
from specvlm.demo import MODEL_DIR
from specvlm.demo.data import Encoder, picture_batch
from specvlm.demo.grammar import TYPES, ask
from specvlm.demo.run import tasks
from specvlm.demo.scenes import Scene, split_scene
from specvlm.demo.train import LOG_NAME, keep_freed_memory
from specvlm.drafts import Draft
from specvlm.loading import load
from specvlm.options import run, with_options
from specvlm.targets.hf import HFTarget
from specvlm.training import Batch, DistillConfig, Progress, distill
from specvlm.training.students import eagle_head

BATCH = 12
INTERMEDIATE_SIZE = 704
HEAD = HeadConfig(intermediate_size=INTERMEDIATE_SIZE)
RECIPE = Recipe(learning_rate=2e-3, feature_noise=0.1, warm_up=50, checkpoint_every=100)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def batch_of(step: int, encoder: Encoder, size: int = BATCH) -> Batch:
    """Questions of random types about scenes of their own, with their answers; padded at their ends."""
    rng = Random(f"head {step}")
    scenes: list[Scene] = []
    rows: list[tuple[list[int], list[int]]] = []
    while len(rows) < size:
        scene = split_scene(rng, for_evaluation=False)
        if (found := ask(scene, rng.choice(TYPES), rng)) is not None:
            question, answer = encoder(*found)
            scenes.append(scene)
            rows.append(([*encoder.prefix, *question], answer))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((size, longest), encoder.pad)
    answers = torch.zeros(size, longest, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        answers[row, len(prompt) : end] = True
    return Batch({"input_ids": input_ids, "pixel_values": picture_batch(scenes).pixels}, answers)


def measured_tau(model: SpecVLM, draft: Draft) -> float:
    """Tokens a round over a few held-out descriptions, greedy."""
    stats = [
        model.generate(**model.prepare(task.picture, task.question), max_new_tokens=96, draft=draft).stats
        for task in tasks(count=3, seed=1)
    ]
    return sum(s.tau * s.rounds for s in stats) / sum(s.rounds for s in stats)


def watch(run: Iterable[Progress], config: DistillConfig, log: Path) -> None:
    """Takes a training to its end: a progress bar on the screen, and a line a checkpoint in `log`."""
    began = time.monotonic()
    with counting_bar("training", config.steps) as show, log.open("a") as lines:
        for at in run:
            tau = "" if at.tau is None else f"  tau {at.tau:.2f}"
            show(at.step, f"loss {at.loss:.4f}  agrees {at.agreement:.0%}{tau}")
            if at.step % config.checkpoint_every == 0 or at.step == at.steps:
                numbers = {"loss": at.loss, **at.parts, "agreement": at.agreement}
                rounded = {name: round(value, 4) for name, value in numbers.items()}
                seconds = round(time.monotonic() - began, 1)  # of this run
                told = {"step": at.step, "seconds": seconds, **rounded, "tau": round(at.tau or 0.0, 3)}
                lines.write(json.dumps(told) + "\n")
                lines.flush()


def train(out: Path, head: HeadConfig, config: DistillConfig) -> None:
    """Trains a head and writes it to `out`, with its log; the checkpoint lies beside `out` until it is done.

    Raises:
        ValueError, TypeError: a head that cannot be, or a checkpoint of another training.
    """
    model = load(MODEL_DIR)
    target = cast(HFTarget, model.target)
    torch.manual_seed(config.seed)
    draft = eagle_head(head, target)
    draft.bind(target)
    encoder = Encoder(model.processor.tokenizer)
    checkpoint = out.with_name(f"{out.name}.checkpoint.pt")
    log = out.with_name(f"{out.name}.log.jsonl")
    steps = distill(
        target,
        draft,
        lambda step: batch_of(step, encoder),
        config,
        checkpoint=checkpoint,
        measure_tau=lambda: measured_tau(model, draft),
    )
    watch(steps, config, log)
    draft.head.bfloat16()
    draft.save_pretrained(out)
    log.replace(out / LOG_NAME)
    checkpoint.unlink()


@app.command()
@with_options
def train_head(
    out: Annotated[Path, typer.Option(help="Folder of the head to write.")],
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.")] = 3000,
    head: HeadConfig = HEAD,
    recipe: Recipe = RECIPE,
) -> None:
    """Train an EAGLE head on the model that ships, by what that model says about scenes; a stopped run goes on."""
    train(out, head, DistillConfig(**asdict(recipe), steps=steps))


def main() -> None:
    """The command line."""
    torch.set_num_threads(2)
    keep_freed_memory()
    run(app, "python -m specvlm.demo.train_head")


if __name__ == "__main__":
    main()
