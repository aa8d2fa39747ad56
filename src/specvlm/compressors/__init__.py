"""What of a picture a draft head reads. `compressor_config` makes a config of what a head's config.json holds."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from specvlm.compressors.base import Compressor, CompressorConfig, keep_rows, picture_runs
from specvlm.compressors.elastic import Concat, ConcatConfig, Select, SelectConfig, Weight, WeightConfig
from specvlm.compressors.plain import Decoupled, DecoupledConfig, TextOnly, TextOnlyConfig
from specvlm.compressors.vispec import ViSpecAdaptor, ViSpecConfig

#: Configs by their name on disk.
BY_KIND: dict[str, type[CompressorConfig]] = {
    config.kind: config
    for config in (TextOnlyConfig, DecoupledConfig, ViSpecConfig, SelectConfig, WeightConfig, ConcatConfig)
}

__all__ = [
    "BY_KIND",
    "Compressor",
    "CompressorConfig",
    "Concat",
    "ConcatConfig",
    "Decoupled",
    "DecoupledConfig",
    "Select",
    "SelectConfig",
    "TextOnly",
    "TextOnlyConfig",
    "ViSpecAdaptor",
    "ViSpecConfig",
    "Weight",
    "WeightConfig",
    "compressor_config",
    "keep_rows",
    "picture_runs",
]


def compressor_config(settings: CompressorConfig | Mapping[str, Any]) -> CompressorConfig:
    """A compressor's config of its settings by name, "kind" among them, as `CompressorConfig.settings` gives them.

    Raises:
        ValueError, TypeError: no such kind, or a field too many or out of its range, by name.
    """
    if isinstance(settings, CompressorConfig):
        return settings
    if not isinstance(settings, Mapping) or settings.get("kind") not in BY_KIND:
        got = settings.get("kind") if isinstance(settings, Mapping) else settings
        raise ValueError(f"compressor: expected a kind of {', '.join(BY_KIND)}, got {got!r}")
    config, given = BY_KIND[settings["kind"]], {name: value for name, value in settings.items() if name != "kind"}
    if unknown := sorted(given.keys() - {field.name for field in fields(config)}):
        raise ValueError(f"compressor: expected settings of {config.kind}, got {', '.join(unknown)}")
    return config(**given)
