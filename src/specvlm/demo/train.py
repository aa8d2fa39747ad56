"""Train the demo model from nothing: ``python -m specvlm.demo.train --out DIR``.

First the vision tower learns to say what every cell holds. Then it stays as it is, and projector and
language model learn to answer: features that hold still are soon looked at.
Killed runs resume from the last checkpoint; the finished model appears in DIR at once.
"""

import argparse
import ctypes
import json
import math
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

from specvlm.demo.build import IMAGE_TOKENS, build_model, build_processor, train_tokenizer
from specvlm.demo.data import IGNORED, LABELS, Encoder, Pictures, Rows, pictures, rows, texts

LOG_NAME = "training_log.jsonl"
_WORK_SUFFIX = ".training"
_CHECKPOINT = "checkpoint.pt"
_ENTRIES = 400  # of the log
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # from malloc.h


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the trained weights, besides the machine's rounding."""

    vision_steps: int = 1500
    steps: int = 3300
    seed: int = 0
    vision_batch: int = 48
    batch: int = 10
    vision_lr: float = 1e-3
    lr: float = 2e-3
    fact_weight: float = 2.0
    warm_up: int = 50
    flat_share: float = 0.4
    tokenizer_scenes: int = 4000

    @property
    def total(self) -> int:
        return self.vision_steps + self.steps

    def phase(self, step: int) -> str:
        """What a step learns: "cells", then "answers"."""
        return "cells" if step < self.vision_steps else "answers"


class CellHeads(nn.Module):
    """Linear classifiers on each patch token: what shape, colour and size its cell holds. Dropped after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values) + 1) for name, values in LABELS.items()})

    def loss(self, features: Tensor, cells: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of features [B,36,C] against the cells' labels [B,36]."""
        losses = [
            cross_entropy(head(features).flatten(0, 1), cells[name].flatten()) for name, head in self.heads.items()
        ]
        return torch.stack(losses).mean()


class Trainer:
    """The model under training, its optimizers, and how far they have come."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.encoder = Encoder(tokenizer)
        self.model = build_model(tokenizer)
        self.heads = CellHeads(self.model.config.vision_config.hidden_size)
        self.token_weights = torch.ones(len(tokenizer))
        self.token_weights[self.encoder.facts] = recipe.fact_weight
        self.vision_tower = torch.compile(self.model.model.vision_tower, dynamic=False)
        self.language_model = torch.compile(self.model.model.language_model, dynamic=False)
        self.optimizers = {"cells": self._vision_optimizers(), "answers": self._language_optimizers()}
        self.step = 0
        self.seconds = 0.0
        self.log: list[dict[str, float]] = []

    def train_step(self) -> dict[str, float]:
        """One update; returns its losses."""
        recipe = self.recipe
        phase = recipe.phase(self.step)
        seed = f"{recipe.seed} {self.step}"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if phase == "cells":
                loss = self._cell_loss(pictures(recipe.vision_batch, seed))
            else:
                loss = self._answer_loss(rows(recipe.batch, seed, self.encoder))
        loss.backward()
        self._update(phase)
        self.step += 1
        return {phase: loss.item()}

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": {name: [o.state_dict() for o in group] for name, group in self.optimizers.items()},
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same recipe.

        Raises:
            ValueError: the checkpoint belongs to another recipe.
        """
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(f"checkpoint: expected recipe {asdict(self.recipe)}, got {state['recipe']}")
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for name, group in self.optimizers.items():
            for optimizer, saved in zip(group, state["optimizers"][name], strict=True):
                optimizer.load_state_dict(saved)
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]

    def _vision_optimizers(self) -> list[torch.optim.Optimizer]:
        parameters = [*self.model.model.vision_tower.parameters(), *self.heads.parameters()]
        return [torch.optim.AdamW(parameters, lr=self.recipe.vision_lr, betas=(0.9, 0.98), weight_decay=0.01)]

    def _language_optimizers(self) -> list[torch.optim.Optimizer]:
        named = [(name, p) for name, p in self.model.named_parameters() if "vision_tower" not in name]
        return muon_and_adamw(named, self.recipe.lr)

    def _features(self, batch: Pictures) -> Tensor:
        return self.vision_tower(batch.pixels).last_hidden_state[:, 1:]

    def _cell_loss(self, batch: Pictures) -> Tensor:
        return self.heads.loss(self._features(batch), batch.cells)

    def _answer_loss(self, batch: Rows) -> Tensor:
        model, start = self.model.model, self.encoder.image_start
        with torch.no_grad():
            features = self._features(batch.pictures)
        embeds = model.get_input_embeddings()(batch.ids)
        image = model.multi_modal_projector(features).to(embeds.dtype)
        embeds = torch.cat([embeds[:, :start], image, embeds[:, start + IMAGE_TOKENS :]], dim=1)
        hidden = self.language_model(
            inputs_embeds=embeds, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        wanted = batch.labels != IGNORED
        logits = self.model.lm_head(hidden[wanted]).float()
        return cross_entropy(logits, batch.labels[wanted], self.token_weights)

    def _update(self, phase: str) -> None:
        scale = self._schedule()
        peak = self.recipe.vision_lr if phase == "cells" else self.recipe.lr
        for optimizer in self.optimizers[phase]:
            for group in optimizer.param_groups:
                parameters = [p for p in group["params"] if p.grad is not None]
                nn.utils.clip_grad_norm_(parameters, 1.0)
                group["lr"] = scale * peak
            optimizer.step()
        self.model.zero_grad()
        self.heads.zero_grad()

    def _schedule(self) -> float:
        """Share of the phase's peak learning rate: cosine for the vision tower, then warm-up, plateau and a line to
        zero."""
        recipe = self.recipe
        if self.step < recipe.vision_steps:
            return 0.5 + 0.5 * math.cos(math.pi * self.step / recipe.vision_steps)
        done = self.step - recipe.vision_steps
        left = (recipe.steps - done) / ((1 - recipe.flat_share) * recipe.steps)
        return min(1.0, (done + 1) / recipe.warm_up, left)


def muon_and_adamw(named: Iterable[tuple[str, nn.Parameter]], lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between a model's ends, AdamW for all else."""
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named:
        inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (hidden if inner else others).append(parameter)
    return [
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=3),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(out: Path, recipe: Recipe, *, checkpoint_seconds: float = 120.0) -> None:
    """Train by `recipe`, or resume, and put the model, its processor and its log into `out`.

    The work in progress lies beside `out`, in a folder of its own that goes when the model is finished.
    """
    work = out.with_name(out.name + _WORK_SUFFIX)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(work / "tokenizer", recipe)
    trainer = Trainer(recipe, tokenizer)
    checkpoint = work / _CHECKPOINT
    if checkpoint.exists():
        trainer.restore(torch.load(checkpoint, weights_only=True))
        print(f"resumed at step {trainer.step}", flush=True)
    saved = time.monotonic()
    while trainer.step < recipe.total:
        started = time.monotonic()
        losses = trainer.train_step()
        trainer.seconds += time.monotonic() - started
        _record(trainer, losses)
        if time.monotonic() - saved > checkpoint_seconds:
            _replace(checkpoint, trainer.state())
            saved = time.monotonic()
    log = "".join(json.dumps(entry) + "\n" for entry in trainer.log)
    publish(trainer.model, build_processor(tokenizer), log, out, work)


def _tokenizer(folder: Path, recipe: Recipe) -> PreTrainedTokenizerFast:
    """The tokenizer, trained once: a resumed run reads it back."""
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        train_tokenizer(texts(recipe.tokenizer_scenes, recipe.seed)).save_pretrained(partial)
        os.replace(partial, folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _record(trainer: Trainer, losses: dict[str, float]) -> None:
    total = trainer.recipe.total
    if trainer.step % max(1, total // _ENTRIES) and trainer.step != total:
        return
    before = trainer.log[-1] if trainer.log else {"step": 0, "seconds": 0.0}
    pace = (trainer.seconds - before["seconds"]) / (trainer.step - before["step"])
    left = pace * (total - trainer.step)
    entry = {"step": trainer.step, "seconds": round(trainer.seconds, 1)}
    trainer.log.append(entry | {name: round(value, 4) for name, value in losses.items()})
    shown = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
    print(f"step {trainer.step}/{total}  {shown}  about {left / 60:.1f} min left", flush=True)


def _replace(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a kill at any moment leaves a whole one, the new or the old."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def publish(model: LlavaForConditionalGeneration, processor: LlavaProcessor, log: str, out: Path, work: Path) -> None:
    """Write the finished model in bf16 to a new folder, then move it to `out`, whose old content it replaces.

    `work`, the folder of the work in progress, goes.
    """
    finished = work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    model.to(torch.bfloat16).eval().save_pretrained(finished)
    processor.save_pretrained(finished)
    (finished / LOG_NAME).write_text(log)
    for file in finished.iterdir():
        file.chmod(0o644)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(finished, out)
    shutil.rmtree(work)


def keep_freed_memory() -> None:
    """Ask glibc not to hand freed tensors back to the kernel: faulting them in again costs half of a step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, (2 << 30) - 1)
        libc.mallopt(_M_TOP_PAD, 256 << 20)


def main() -> None:
    """Read the command line and train."""
    default = Recipe()
    parser = argparse.ArgumentParser(description="Train the demo model from nothing.")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the finished model, which replaces what is there"
    )
    parser.add_argument("--vision-steps", type=int, default=default.vision_steps)
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--seed", type=int, default=default.seed)
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(2)
    keep_freed_memory()
    train(arguments.out, Recipe(arguments.vision_steps, arguments.steps, arguments.seed))


if __name__ == "__main__":
    main()
