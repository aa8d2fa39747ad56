"""Trains a small LLaVA on photos and human captions: ``python -m bench.captions --data FILE --out DIR``.

What real language makes of speculation is to be seen on it; see `bench.training`. All captions of a photo are one
answer. Vision tower, projector and language model learn together, from nothing, on one GPU or on CPU cores. A killed
run goes on from its last checkpoint; the finished model appears in DIR at once, with its log.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import logging as transformers_logging

from specvlm.console import counting_bar
from specvlm.demo.build import build_model, build_processor, train_tokenizer
from specvlm.demo.train import keep_freed_memory, muon_and_adamw, publish
from specvlm.files import whole
from specvlm.targets.hf import HFTarget
from specvlm.training import Batch
from specvlm.training.data import Batches, split, survey
from specvlm.training.encoding import Encoder
from specvlm.training.records import read_examples

PICTURE_SIZE = 96
HELD_OUT_BATCHES = 8
CHECKPOINT_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the trained weights, besides the machine's rounding."""

    steps: int
    width: int
    layers: int
    vocabulary: int = 2048
    batch: int = 16
    lr: float = 2e-3
    warm_up: int = 50
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step: a rise, then a cosine to zero."""
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.lr * min((step + 1) / self.warm_up, 0.5 + 0.5 * math.cos(math.pi * max(0.0, done)))


def loss_of(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens."""
    inputs = {name: value.to(device) for name, value in batch.inputs.items()}
    answers = batch.answers.to(device)[:, 1:]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1][answers]
        logits = model.lm_head(hidden)
    return cross_entropy(logits.float(), inputs["input_ids"][:, 1:][answers])


def train(data: Path, out: Path, recipe: Recipe, device: torch.device) -> None:
    """Trains by `recipe`, or goes on, and puts the model, its processor and its log into `out`.

    Raises:
        ValueError: what is wrong with the data, or a checkpoint of another recipe.
    """
    parts = split(read_examples(data), 0.05)
    work = out.with_name(f"{out.name}.training")
    work.mkdir(parents=True, exist_ok=True)
    said = (f"USER: \n{turn.question} ASSISTANT: {turn.answer}" for one in parts.training for turn in one.turns)
    tokenizer = train_tokenizer(said, recipe.vocabulary)
    processor = build_processor(tokenizer, PICTURE_SIZE)
    torch.manual_seed(recipe.seed)
    model = build_model(tokenizer, picture_size=PICTURE_SIZE, width=recipe.width, layers=recipe.layers).to(device)
    encoder = Encoder(processor, HFTarget(model, tokenizer))
    batches = Batches(survey(parts.training, encoder), encoder, size=recipe.batch, per_step=1, seed=recipe.seed)
    others = Batches(survey(parts.held_out, encoder), encoder, size=recipe.batch, per_step=1, seed=0)
    optimizers = muon_and_adamw(model.named_parameters(), recipe.lr)

    step, log, checkpoint = 0, "", work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        if state["recipe"] != repr(recipe):
            raise ValueError(f"checkpoint: expected one of {recipe!r}, got {state['recipe']} in {checkpoint}")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, log = state["step"], state["log"]

    saved_at, began = time.monotonic(), time.monotonic()
    with counting_bar("training", recipe.steps) as show:
        while step < recipe.steps:
            loss = loss_of(model.train(), batches(step), device)
            if not loss.isfinite():
                raise ValueError(f"loss: expected a finite number, got {loss.item()} in step {step + 1}")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate(step)
                optimizer.step()
            model.zero_grad()
            step += 1
            show(step, f"loss {loss.item():.3f}")
            if step % 50 == 0 or step == recipe.steps:
                log += json.dumps({"step": step, "loss": round(loss.item(), 4)}) + "\n"
            if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                state = {"recipe": repr(recipe), "model": model.state_dict(), "step": step, "log": log}
                with whole(checkpoint) as part:
                    torch.save(state | {"optimizers": [each.state_dict() for each in optimizers]}, part)
                saved_at = time.monotonic()
    with torch.no_grad():
        losses = [loss_of(model.eval(), others(number), device).item() for number in range(HELD_OUT_BATCHES)]
    size = sum(parameter.numel() for parameter in model.parameters())
    told = {"held-out loss": round(sum(losses) / len(losses), 4), "parameters": size}
    told |= {"seconds of this run": round(time.monotonic() - began)}
    publish(model.cpu(), processor, log + json.dumps(told) + "\n", out, work)
    print(json.dumps(told))


def main() -> None:
    """The command line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    large = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="photos with captions, as `specvlm train` takes them")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, which replaces what is there")
    parser.add_argument("--steps", type=int, default=4000 if large else 2400, help="(4000 on a GPU, 2400 without)")
    parser.add_argument("--width", type=int, default=512 if large else 256, help="(512 on a GPU, 256 without)")
    parser.add_argument("--layers", type=int, default=10 if large else 8, help="(10 on a GPU, 8 without)")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    keep_freed_memory()
    train(args.data, args.out, Recipe(args.steps, args.width, args.layers), device)


if __name__ == "__main__":
    main()
