"""From a name to a model that answers."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, GenerationConfig

from specvlm.decoder import SpecVLM
from specvlm.demo import MODEL_DIR
from specvlm.drafts import Draft
from specvlm.targets.base import TargetSpec
from specvlm.targets.hf import FAMILIES, spec_of
from specvlm.targets.hf_loading import load_whole, read_config, reading

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
        draft: "ngram", "demo" (the shipped target's head), a folder or a hub id; None: "demo" for the shipped target,
            else none.
        dtype: "float32", "float16" or "bfloat16"; None: bfloat16 on a GPU, float32 on a CPU.
        device: None: the GPU if there is one, else the CPU.

    Raises:
        ValueError: what is missing, broken or unsupported, naming what was expected and what came.

    Example:
        >>> model = specvlm.load("demo")
        >>> model.ask("scene.png", "What is in the picture?")
    """
    if not isinstance(target, str | Path):
        raise ValueError(f"target: expected a folder, a hub id or demo, got {type(target).__name__}")
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device: expected cuda or cpu, got {device!r}") from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cuda or cpu, got {str(place)!r}")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected one that is there, got {str(place)!r}, and torch finds {torch.cuda.device_count()} GPUs"
        )
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype: expected {', '.join(DTYPES)}, got {dtype!r}")
    wanted = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if wanted not in (None, *DTYPES.values()):
        raise ValueError(f"dtype: expected {', '.join(DTYPES)}, got {dtype!r}")
    precision = wanted or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    if str(target) == "demo":
        target, draft = MODEL_DIR, "demo" if draft is None else draft
    model = load_whole("target", target, FAMILIES, precision).to(place)
    return SpecVLM(model, draft=draft, processor=_processor(target))


def load_spec(target: str | Path) -> TargetSpec:
    """Sizes, ids and tokenizer of a target, without its weights; dtype and device are the CPU's.

    Args:
        target: as `load` takes it.

    Raises:
        ValueError: what is missing, broken or unsupported.
    """
    source = MODEL_DIR if str(target) == "demo" else target
    config, _ = read_config("target", source, FAMILIES)
    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:  # there is none: transformers makes it of the config as well
        generation = GenerationConfig.from_model_config(config)
    tokenizer = getattr(_processor(source), "tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"target: expected a processor with a tokenizer in {target}, got one without")
    return spec_of(config, generation, tokenizer, dtype=torch.float32, device=torch.device("cpu"))


def _processor(target: str | Path) -> Any:
    with reading("target", "a processor", target):
        return AutoProcessor.from_pretrained(target)
