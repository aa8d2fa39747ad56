"""A draft's folder on disk: config.json and model.safetensors, each written whole or not at all, read strictly."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specvlm.files import whole

Config = TypeVar("Config")


def write_folder(folder: Path, *, draft_type: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a draft's two files to `folder`, in the place of older ones only when both are on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "config.json") as settings, whole(folder / "model.safetensors") as weights:
        save_file(dict(tensors), weights, metadata={"format": "pt"})
        settings.write_text(json.dumps({"draft_type": draft_type, **config}, indent=2) + "\n")
        for path in (settings, weights):
            path.chmod(0o644)


def read_folder(folder: Path, *, draft_type: str, config_class: type[Config]) -> tuple[Config, dict[str, Tensor]]:
    """The config and the tensors of a draft's folder.

    Raises:
        ValueError: a file is missing or broken, the draft is of another type, or the config has a field too many,
            one too few, or one out of its range.
    """
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"draft: expected a JSON object in {path}, got {error}") from error
    if not isinstance(settings, dict) or settings.pop("draft_type", None) != draft_type:
        raise ValueError(f'draft_type: expected "{draft_type}" in {path}')
    known = {field.name for field in fields(config_class)}  # type: ignore[arg-type]
    if unknown := sorted(settings.keys() - known):
        raise ValueError(f"{path}: expected fields among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    try:
        config = config_class(**settings)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error
    weights = folder / "model.safetensors"
    try:
        return config, load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"draft: expected a whole safetensors file {weights}, got {error}") from error


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copies `tensors` into `module`.

    Raises:
        ValueError: tensors are missing, unexpected or misshapen; the message lists them all.
    """
    wanted = module.state_dict()
    problems = [f"missing {name}" for name in sorted(wanted.keys() - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - wanted.keys())]
    problems += [
        f"misshapen {name} (expected {list(wanted[name].shape)}, got {list(tensors[name].shape)})"
        for name in sorted(wanted.keys() & tensors.keys())
        if wanted[name].shape != tensors[name].shape
    ]
    if problems:
        raise ValueError(f"draft: expected the tensors of its config in {source}, got {'; '.join(problems)}")
    module.load_state_dict(tensors)
