"""A training on disk: written whole or not at all, and taken up by the same training alone."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from specvlm.files import whole

#: What a run may have another value of when it goes on.
_FREE = frozenset({"config.checkpoint_every"})


def save(path: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint in the place of the one before.

    Raises:
        OSError: there is no room, say; the one before is still there and whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole(path) as fresh, fresh.open("wb") as file:
            torch.save({"run": dict(identity)} | dict(state), file)
    except (OSError, RuntimeError) as error:  # a RuntimeError is torch's for a write that failed
        left = "the one before is whole" if path.exists() else "there is none yet"
        raise OSError(f"checkpoint: expected room to write {path}, got {error}; {left}") from error


def resume(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `save` wrote, on the CPU; None: nothing.

    Raises:
        ValueError: the checkpoint is broken, or another run's, with the fields that differ.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        run = state["run"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, UnpicklingError) as error:
        raise ValueError(f"checkpoint: expected a whole one in {path}, got {error}") from error
    refuse_others("checkpoint", path, run, identity)
    return state


def refuse_others(what: str, path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses what another run left in `path`.

    Raises:
        ValueError: naming every field that differs, with both values.
    """
    theirs, mine = _flat(found), _flat(wanted)
    differing = [
        f"{name} {theirs.get(name, 'unset')!r} instead of {mine.get(name, 'unset')!r}"
        for name in sorted(theirs.keys() | mine.keys())
        if name not in _FREE and theirs.get(name) != mine.get(name)
    ]
    if differing:
        raise ValueError(f"{what}: expected this run's own in {path}, got one with {', '.join(differing)}")


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields of fields by their dotted names; sequences are lists, as JSON has them."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found
