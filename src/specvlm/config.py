"""What a user sets: frozen dataclasses that validate themselves. The command line is made from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from specvlm.checks import check_int, check_number


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    """How one answer is decoded.

    Attributes:
        max_new_tokens: the most tokens the answer may have, at least 1; None: what the model's generation
            config says, else 256.
        temperature: 0 takes the most likely token; above 0 tokens are sampled.
        top_k: keep the `top_k` most likely tokens; 0 keeps all.
        top_p: keep the smallest set of likely tokens whose probability reaches `top_p`, in (0, 1].
        seed: the same seed gives the same answer; None draws one afresh (and the statistics report it).
        stop_strings: end the answer with the token that completes one of these.

    Raises:
        ValueError: a field is out of its range, naming it, what was expected and what came.
        TypeError: a field is of the wrong type.
    """

    max_new_tokens: int | None = field(default=None, metadata={"help": "Most tokens in the answer (256)."})
    temperature: float = field(default=0.0, metadata={"help": "0: the most likely token; above 0: sample."})
    top_k: int = field(default=0, metadata={"help": "Sample from the k most likely tokens; 0: from all."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens of this total probability."})
    seed: int | None = field(default=0, metadata={"help": "The same seed gives the same answer."})
    stop_strings: tuple[str, ...] | None = field(
        default=None, metadata={"help": "End the answer at this text (may be given again)."}
    )

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            check_int("max_new_tokens", self.max_new_tokens, low=1)
        check_number("temperature", self.temperature)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: expected a finite number >= 0, got {self.temperature}")
        check_int("top_k", self.top_k, low=0)
        check_number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if self.seed is not None:
            check_int("seed", self.seed, low=-(2**63), high=2**63 - 1)
        object.__setattr__(self, "stop_strings", _as_strings(self.stop_strings))


def _as_strings(stop_strings: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if stop_strings is None:
        return None
    strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
    if not strings or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop_strings: expected one or more strings that are not empty, got {stop_strings!r}")
    return strings
