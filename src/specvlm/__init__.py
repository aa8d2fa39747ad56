"""Vision-language models that answer faster without one token of the answer changing.

model = specvlm.load("llava-hf/llava-1.5-7b-hf", draft="ngram")
print(model.ask("photo.jpg", "What is on the table?"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specvlm.config import GenerateConfig
    from specvlm.decoder import Answer, SpecVLM, decode
    from specvlm.loading import load
    from specvlm.state import Emitted
    from specvlm.stats import Stats

__all__ = ["Answer", "Emitted", "GenerateConfig", "SpecVLM", "Stats", "decode", "load"]

_HOMES = {
    "Answer": "decoder",
    "Emitted": "state",
    "GenerateConfig": "config",
    "SpecVLM": "decoder",
    "Stats": "stats",
    "decode": "decoder",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: torch and transformers take seconds that `--help` needs not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
