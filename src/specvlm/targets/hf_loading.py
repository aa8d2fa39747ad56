"""Reads a Hugging Face checkpoint whole, or says what it lacks."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

#: What transformers raises over files that hold something else than it expects.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError)


def load_whole(
    role: str, source: str | Path, families: Sequence[Any], dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """The model in `source`: transformers would fill what a checkpoint lacks with random numbers and a warning.

    Args:
        role: what the model is to be, "target" or "draft", for messages.
        source: a folder or hub id.
        families: the model classes that will do.
        dtype: of the weights; "auto": as they are stored.

    Raises:
        ValueError: no model is there, it is of another family, or a tensor is missing or misshapen.
    """
    _, family = read_config(role, source, families)
    if (Path(source) / "generation_config.json").is_file():  # one that cannot be read would be left out
        with reading(role, "a generation_config.json", source):
            GenerationConfig.from_pretrained(source)
    try:
        model, info = family.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except SafetensorError as error:
        raise ValueError(f"{role}: expected whole safetensors files in {source}, got {error}") from error
    except OSError as error:
        raise ValueError(
            f"{role}: expected a model folder or hub id, got {str(source)!r}: {first_line(error)}"
        ) from error
    for problem in ("missing_keys", "mismatched_keys"):
        if info.get(problem):
            raise ValueError(
                f"{role}: expected every tensor in {source}, got {problem} {sorted(map(str, info[problem]))}"
            )
    return model


def read_config(role: str, source: str | Path, families: Sequence[Any]) -> tuple[PreTrainedConfig, Any]:
    """The config of the model in `source`, and which of `families` it is of; the rest is as in `load_whole`."""
    try:
        config = AutoConfig.from_pretrained(source)
    except OSError as error:
        raise ValueError(
            f"{role}: expected a model folder or hub id, got {str(source)!r}: {first_line(error)}"
        ) from error
    except _UNREADABLE as error:
        raise ValueError(f"{role}: expected a config.json of a model in {source}, got {first_line(error)}") from error
    family = {family.config_class: family for family in families}.get(type(config))
    if family is None:
        names = " or ".join(family.config_class.model_type for family in families)
        raise ValueError(f"{role}: expected a {names} model, got {config.model_type} in {source}")
    return config, family


@contextlib.contextmanager
def reading(role: str, what: str, source: str | Path) -> Iterator[None]:
    """Raises a ValueError that names `role`, `what` was expected in `source`, and what came, where reading it fails."""
    try:
        yield
    except _UNREADABLE as error:
        raise ValueError(f"{role}: expected {what} in {source}, got {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
