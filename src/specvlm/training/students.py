"""Drafts to be trained: fresh heads with a target's sizes, a small model made of its layers, or one to go on from."""

import json
import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from specvlm.compressors import CompressorConfig, compressor_config
from specvlm.config import HeadConfig, TrainConfig
from specvlm.drafts import (
    BlockConfig,
    BlockDraft,
    BlockHead,
    Draft,
    Eagle3Config,
    Eagle3Draft,
    Eagle3Head,
    EagleConfig,
    EagleDraft,
    EagleHead,
    VLMDraft,
    load_draft,
)
from specvlm.targets.base import Target
from specvlm.vocabulary import read_vocabulary

#: Which of a target's layers a small model begins with.
LAYERS: Final = (0, -1)


def new_draft(config: TrainConfig, target: Target, seed: int) -> Draft:
    """The draft that `config` asks for, bound to `target`; fresh weights follow from the seed.

    Raises:
        ValueError: there is no such draft, it does not fit the target, or an option is for other drafts.
    """
    torch.manual_seed(seed)
    if config.draft in _HEADS:
        draft: Any = _HEADS[config.draft](config, target)
    elif config.draft == "block":
        _refuse(config, "an EAGLE head", "compressor", "vocabulary")
        draft = BlockDraft(BlockHead(BlockConfig.for_target(target.spec, _width(config, target))))
    else:
        _refuse(config, "a fresh head", "intermediate_size", "compressor")
        draft = VLMDraft(shallow_model(target.model)) if config.draft == "vlm" else load_draft(config.draft)
        if config.vocabulary is not None:
            if not isinstance(draft, EagleDraft | Eagle3Draft):
                raise ValueError(f"vocabulary: expected none but for a head, got {config.vocabulary}")
            draft = draft.with_vocabulary(read_vocabulary(config.vocabulary, target.spec))
    draft.bind(target)
    return draft


def _refuse(config: TrainConfig, but_for: str, *names: str) -> None:
    for name in names:
        if getattr(config, name) is not None:
            raise ValueError(f"{name}: expected none but for {but_for}, got {getattr(config, name)}")


def _width(config: HeadConfig, target: Target) -> int:
    return config.intermediate_size or target.model.config.text_config.intermediate_size


def eagle_head(config: HeadConfig, target: Target) -> EagleDraft:
    """A fresh EAGLE head with the target's sizes, bound to none.

    Raises:
        ValueError, TypeError: a compressor or a vocabulary that cannot be.
    """
    sizes = EagleConfig.for_target(target.spec, _width(config, target), input_layernorm=True)
    draft = EagleDraft(EagleHead(replace(sizes, compressor=_compressor(config))))
    if config.vocabulary is None:
        return draft
    return draft.with_vocabulary(read_vocabulary(config.vocabulary, target.spec))


def _eagle3_head(config: HeadConfig, target: Target) -> Eagle3Draft:
    spec = target.spec
    everything = sorted(set(range(spec.vocab_size)) - spec.media_ids)
    ids = everything if config.vocabulary is None else read_vocabulary(config.vocabulary, spec)
    sizes = Eagle3Config.for_target(spec, _width(config, target), len(ids))
    head = Eagle3Head(replace(sizes, compressor=_compressor(config)))
    head.set_vocabulary(torch.tensor(ids))
    return Eagle3Draft(head)


_HEADS: Final[dict[str, Callable[[HeadConfig, Target], EagleDraft | Eagle3Draft]]] = {
    "eagle": eagle_head,
    "eagle3": _eagle3_head,
}


def _compressor(config: HeadConfig) -> CompressorConfig | None:
    return None if config.compressor is None else compressor_config(_compressor_settings(config.compressor))


def _compressor_settings(told: str) -> Any:
    """A kind alone, or a JSON object."""
    if not told.startswith("{"):
        return {"kind": told}
    try:
        return json.loads(told)
    except ValueError as error:
        raise ValueError(f"compressor: expected a kind or a JSON object, got {told!r}") from error


def shallow_model(target: PreTrainedModel) -> PreTrainedModel:
    """The target without most of its layers, as a model of its own."""
    config = deepcopy(target.config)
    config.text_config.num_hidden_layers = len(LAYERS)
    if getattr(config.text_config, "layer_types", None) is not None:
        config.text_config.layer_types = [config.text_config.layer_types[layer] for layer in LAYERS]
    model = type(target)(config)
    layers = [target.model.language_model.layers[layer] for layer in LAYERS]
    kept = {name: weight for name, weight in target.state_dict().items() if ".layers." not in name or "vision" in name}
    for number, layer in enumerate(layers):
        prefix = f"model.language_model.layers.{number}"
        kept |= {f"{prefix}.{name}": weight for name, weight in layer.state_dict().items()}
    model.load_state_dict(kept)
    model.generation_config = deepcopy(target.generation_config)
    return model


def save_draft(draft: Any, processor: Any, out: Path) -> None:
    """Writes a trained draft into `out`, where other files may lie; its config.json, by which it is known, comes last.

    Args:
        processor: the target's, which goes with a small model.
    """
    if not isinstance(draft, VLMDraft):
        draft.save_pretrained(out)
        return
    part = out / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    draft.model.save_pretrained(part)
    processor.save_pretrained(part)
    for file in sorted(part.iterdir(), key=lambda file: (file.name == "config.json", file.name)):
        file.chmod(0o644)
        os.replace(file, out / file.name)
    part.rmdir()
