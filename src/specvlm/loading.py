"""From a name to a model that answers."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from specvlm.decoder import SpecVLM
from specvlm.demo import MODEL_DIR
from specvlm.drafts import Draft
from specvlm.targets.hf import FAMILIES

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    target: str | Path,
    draft: Draft | str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> SpecVLM:
    """Loads a target with its processor, and a draft.

    Args:
        target: a folder or hub id in transformers' format, or "demo", the model that ships.
        draft: the name of a draft without weights ("ngram"), a folder or a hub id; None: "ngram" for the shipped
            target, else none.
        dtype: "float32", "float16" or "bfloat16"; None: bfloat16 on a GPU, float32 on a CPU.
        device: None: the GPU if there is one, else the CPU.

    Raises:
        ValueError: what is missing, broken or unsupported, naming what was expected and what came.

    Example:
        >>> model = specvlm.load("demo")
        >>> model.ask("scene.png", "What is in the picture?")
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device: expected cuda or cpu, got {device!r}") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that is there, got {str(place)!r}, and torch finds no GPU")
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype: expected {', '.join(DTYPES)}, got {dtype!r}")
    wanted = DTYPES[dtype] if isinstance(dtype, str) else dtype
    precision = wanted or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    if str(target) == "demo":
        target, draft = MODEL_DIR, "ngram" if draft is None else draft
    return SpecVLM(_model(target, precision).to(place), draft=draft, processor=_processor(target))


def _model(target: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model, whole: transformers would fill what a checkpoint lacks with random numbers and a warning."""
    try:
        config = AutoConfig.from_pretrained(target)
        family = {family.config_class: family for family in FAMILIES}.get(type(config))
        if family is None:
            names = " or ".join(family.config_class.model_type for family in FAMILIES)
            raise ValueError(f"target: expected a {names} model, got {config.model_type} in {target}")
        model, info = family.from_pretrained(target, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except SafetensorError as error:
        raise ValueError(f"target: expected whole safetensors files in {target}, got {error}") from error
    except OSError as error:
        raise ValueError(f"target: expected a model folder or hub id, got {str(target)!r}: {_line(error)}") from error
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            raise ValueError(
                f"target: expected every tensor in {target}, got {problem} {sorted(map(str, info[problem]))}"
            )
    return model


def _processor(target: str | Path) -> Any:
    try:
        return AutoProcessor.from_pretrained(target)
    except (OSError, ValueError) as error:
        raise ValueError(f"target: expected a processor in {target}, got {_line(error)}") from error


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
