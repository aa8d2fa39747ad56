"""Trains the demo's small model, a draft, on the demo's model: ``python -m specvlm.demo.train_vlm --out DIR``.

It is the target with two layers of its eight: the same vision tower, which stays as it is, tokenizer and processor, and
at first the same projector, embeddings, first and last layer, norm and output head. It learns the target's distribution
on answers about scenes of the training side; a step's batch follows from its number, so a run that was killed resumes
to the same weights.
"""

import argparse
from pathlib import Path
from typing import cast

import torch

from specvlm.demo import MODEL_DIR
from specvlm.demo.data import Encoder
from specvlm.demo.train import LOG_NAME, keep_freed_memory, publish
from specvlm.demo.train_head import batch_of, measured_tau, watch
from specvlm.drafts import VLMDraft
from specvlm.loading import load
from specvlm.targets.hf import HFTarget
from specvlm.training import DistillConfig, distill
from specvlm.training.students import shallow_model


def train(out: Path, config: DistillConfig) -> None:
    """Trains a small model and writes it to `out`, whose old content it replaces, with processor and log.

    The work in progress lies beside `out`, in a folder of its own that goes when the model is finished.
    """
    model = load(MODEL_DIR)
    target = cast(HFTarget, model.target)
    draft = VLMDraft(shallow_model(target.model))
    draft.bind(target)
    encoder = Encoder(model.processor.tokenizer)
    work = out.with_name(f"{out.name}.training")
    work.mkdir(parents=True, exist_ok=True)
    run = distill(
        target,
        draft,
        lambda step: batch_of(step, encoder),
        config,
        checkpoint=work / "checkpoint.pt",
        measure_tau=lambda: measured_tau(model, draft),
    )
    watch(run, config, work / LOG_NAME)
    publish(draft.model, model.processor, (work / LOG_NAME).read_text(), out, work)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model, which replaces what is there")
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps (3000)")
    args = parser.parse_args()
    torch.set_num_threads(2)
    keep_freed_memory()
    config = DistillConfig(
        steps=args.steps, learning_rate=1e-3, cross_entropy_weight=1.0, warm_up=50, checkpoint_every=100
    )
    train(args.out, config)


if __name__ == "__main__":
    main()
