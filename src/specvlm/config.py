"""What a user sets: frozen dataclasses that validate themselves. The command line is made from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from specvlm.checks import check_int, check_number

#: How a learning rate goes.
SCHEDULES: Final = ("cosine", "constant")

_WEIGHTS: Final = (
    "learning_rate",
    "weight_decay",
    "clip",
    "cross_entropy_weight",
    "feature_weight",
    "l1_weight",
    "ranking_weight",
    "balance_weight",
    "rows_weight",
    "feature_noise",
    "unrolled_decay",
)


#: The lowest temperature above 0.
_COLDEST: Final = 1e-30


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
        if 0 < self.temperature < _COLDEST:  # logits over it are infinite in fp32
            raise ValueError(f"temperature: expected 0 or a number >= {_COLDEST}, got {self.temperature}")
        check_int("top_k", self.top_k, low=0, high=2**31 - 1)
        check_number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if self.seed is not None:
            check_int("seed", self.seed, low=-(2**63), high=2**63 - 1)
        for name, kind in (
            ("max_new_tokens", int),
            ("temperature", float),
            ("top_k", int),
            ("top_p", float),
            ("seed", int),
        ):
            if getattr(self, name) is not None:  # numpy's numbers, say, which the kernels need not know
                object.__setattr__(self, name, kind(getattr(self, name)))
        object.__setattr__(self, "stop_strings", _as_strings(self.stop_strings))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a draft learns from a frozen target; the defaults are SpecVLM's.

    Attributes:
        learning_rate: of AdamW, after `warm_up` steps; 8e-5 for a 7B target, 5e-5 for 13B.
        schedule: "cosine": it falls to a tenth along a cosine; "constant": it stays.
        warm_up: steps in which it rises from 0.
        betas, weight_decay: AdamW's.
        clip: the largest norm of a gradient.
        cross_entropy_weight, feature_weight: the loss's.
        l1_weight, ranking_weight: of what else the draft's distribution may be held to.
        balance_weight, rows_weight: of an elastic compressor's gate: that its options are used alike, and that those
            which leave fewer rows, and so the draft less work, go first.
        feature_noise: half the width of the uniform noise added to the features a head reads, so that it learns
            to read its own; a small model reads none.
        unrolled: how many steps a head takes on its own outputs before the loss, 1 being the target's features alone.
        unrolled_decay: what each further step weighs less.
        checkpoint_every: steps between checkpoints.
        seed: of all that is random; with the data it fixes the result.

    Raises:
        ValueError: a field is out of its range, naming it, what was expected and what came.
        TypeError: a field is of the wrong type.
    """

    learning_rate: float = field(default=8e-5, metadata={"help": "AdamW's; 5e-5 for a 13B target."})
    schedule: str = field(default="cosine", metadata={"help": "cosine (to a tenth) or constant."})
    warm_up: int = field(default=0, metadata={"help": "Steps in which the learning rate rises from 0."})
    betas: tuple[float, float] = field(default=(0.9, 0.95), metadata={"help": "AdamW's."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's."})
    clip: float = field(default=1.0, metadata={"help": "The largest norm of a gradient."})
    cross_entropy_weight: float = field(
        default=0.1, metadata={"help": "Of the cross-entropy with the target's distribution."}
    )
    feature_weight: float = field(default=1.0, metadata={"help": "Of Smooth L1 with the target's features."})
    l1_weight: float = field(default=0.0, metadata={"help": "Of L1 between the probabilities, as well."})
    ranking_weight: float = field(
        default=0.0, metadata={"help": "Of how unlikely the order of the target's 10 likeliest tokens is, as well."}
    )
    balance_weight: float = field(
        default=0.01, metadata={"help": "Of how unevenly an elastic compressor's gate uses its options."}
    )
    rows_weight: float = field(
        default=0.0, metadata={"help": "Of the share of a picture's rows that the gate lets through."}
    )
    feature_noise: float = field(default=0.0, metadata={"help": "Half the width of the noise on a head's features."})
    unrolled: int = field(default=1, metadata={"help": "Steps of a head on its own outputs; EAGLE-3 takes 7."})
    unrolled_decay: float = field(default=0.8, metadata={"help": "What each further of these steps weighs less."})
    checkpoint_every: int = field(default=200, metadata={"help": "Steps between checkpoints."})
    seed: int = field(default=0, metadata={"help": "The same seed gives the same draft."})

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected {' or '.join(SCHEDULES)}, got {self.schedule!r}")
        for name, low in (("warm_up", 0), ("unrolled", 1), ("checkpoint_every", 1)):
            check_int(name, getattr(self, name), low=low)
        check_int("seed", self.seed, low=0, high=2**40)
        object.__setattr__(self, "betas", tuple(self.betas))
        for beta in self.betas:
            check_number("betas", beta)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas}")
        for name in _WEIGHTS:
            check_number(name, getattr(self, name))
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}: expected a finite number >= 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """What a fresh head is like.

    Raises:
        ValueError: a field is out of its range, naming it, what was expected and what came.
        TypeError: a field is of the wrong type.
    """

    vocabulary: str | None = field(
        default=None, metadata={"help": "A file of specvlm vocab: the head proposes these tokens alone."}
    )
    compressor: str | None = field(
        default=None,
        metadata={
            "help": "What a head reads of a picture: text_only, decoupled, vispec, or a JSON object of settings."
        },
    )
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Width inside the head's MLP; by default the target's."}
    )

    def __post_init__(self) -> None:
        if self.intermediate_size is not None:
            check_int("intermediate_size", self.intermediate_size, low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(HeadConfig):
    """What a draft is trained for and on, and where it goes.

    Raises:
        ValueError: a field is out of its range, naming it, what was expected and what came.
        TypeError: a field is of the wrong type.
    """

    target: str = field(metadata={"help": "Folder or hub id of a LLaVA in transformers' format, or demo."})
    data: str = field(metadata={"help": "A .jsonl, LLaVA's .json, a folder, or a .tar, which stays packed."})
    out: str = field(metadata={"help": "Folder of the draft; a run that was stopped goes on from what is in it."})
    draft: str = field(
        default="eagle",
        metadata={"help": "eagle, eagle3, block, vlm (a target of two layers), or a draft's folder to go on from."},
    )
    pictures: str | None = field(
        default=None, metadata={"help": "A folder or .tar that the data's paths start from; by default the data's own."}
    )
    question: str | None = field(default=None, metadata={"help": "What is asked where the data have captions alone."})
    epochs: int = field(default=5, metadata={"help": "How often every example is seen, unless steps are given."})
    steps: int | None = field(default=None, metadata={"help": "Steps of the optimiser, instead of epochs."})
    batch: int = field(default=128, metadata={"help": "Examples in a step."})
    micro_batch: int = field(default=4, metadata={"help": "Examples in the memory at once; it divides the batch."})
    held_out: float = field(
        default=0.05, metadata={"help": "The part of the data that tau is measured on, if they do not say themselves."}
    )
    tau_prompts: int = field(default=8, metadata={"help": "Held-out prompts decoded every epoch; 0: none."})
    max_new_tokens: int = field(
        default=256, metadata={"help": "Most tokens in an answer that the target says, for tau or to learn from."}
    )
    self_generate: bool = field(
        default=False, metadata={"help": "The target answers first, and the draft learns from its answers."}
    )
    refuse_long: bool = field(
        default=False, metadata={"help": "Refuse examples longer than the context, which are cut else."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": "float32, float16 or bfloat16; by default bfloat16 on a GPU, else float32."}
    )
    device: str | None = field(default=None, metadata={"help": "cuda or cpu; by default the GPU if there is one."})

    def __post_init__(self) -> None:
        HeadConfig.__post_init__(self)  # super() does not know a slotted dataclass
        for name in ("epochs", "batch", "micro_batch", "max_new_tokens"):
            check_int(name, getattr(self, name), low=1)
        if self.steps is not None:
            check_int("steps", self.steps, low=1)
        check_int("tau_prompts", self.tau_prompts, low=0)
        if self.batch % self.micro_batch:
            raise ValueError(f"micro_batch: expected a divisor of the batch of {self.batch}, got {self.micro_batch}")
        check_number("held_out", self.held_out)
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out: expected a number in [0, 1), got {self.held_out}")


def _as_strings(stop_strings: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if stop_strings is None:
        return None
    if not isinstance(stop_strings, str | Sequence):
        raise TypeError(f"stop_strings: expected strings, got {stop_strings!r}")
    strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
    if not strings or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop_strings: expected one or more strings that are not empty, got {stop_strings!r}")
    return strings
