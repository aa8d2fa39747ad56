"""Whether a draft leaves an answer as it is, and where it does not, how near the target's call was."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import torch

from specvlm.config import GenerateConfig
from specvlm.decoder import SpecVLM, limits_of
from specvlm.drafts import NoDraft
from specvlm.state import Sampling
from specvlm.targets.base import Target
from specvlm_kernels.reference.acceptance import perturbed


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first place where two answers differ.

    Attributes:
        index: counts the answer's tokens from 0.
        expected, got: the token of autoregressive decoding and that with the draft; None: that answer had ended.
        gap: how far apart autoregressive decoding saw the two, in logits: after temperature, top-k, top-p and
            noise when sampling. Near 0 they were a tie that rounding may settle either way. None: no finite number.
    """

    index: int
    expected: int | None
    got: int | None
    gap: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt answered twice.

    Attributes:
        tokens: length of the autoregressive answer.
        tau: tokens a round with the draft.
        divergence: None: the answers are equal.
    """

    tokens: int
    tau: float
    divergence: Divergence | None


def compare(model: SpecVLM, inputs: Mapping[str, Any], config: GenerateConfig) -> Comparison:
    """Answers `inputs` by autoregressive decoding and with the model's draft, from one seed, and compares.

    Raises:
        ValueError: the model has no draft, or what `SpecVLM.generate` refuses.
    """
    if isinstance(model.draft, NoDraft):
        raise ValueError("draft: expected one to check, got none")
    options = asdict(config)
    expected = model.generate(**inputs, **options, draft=None)
    options["seed"] = expected.stats.seed
    got = model.generate(**inputs, **options)
    for index, (token, other) in enumerate(zip_longest(expected.tokens, got.tokens)):
        if token != other:
            gap = (
                None
                if token is None or other is None
                else _gap(model.target, inputs, GenerateConfig(**options), index, token, other)
            )
            return Comparison(len(expected.tokens), got.stats.tau, Divergence(index, token, other, gap))
    return Comparison(len(expected.tokens), got.stats.tau, None)


@torch.no_grad()
def _gap(
    target: Target, inputs: Mapping[str, Any], config: GenerateConfig, index: int, token: int, other: int
) -> float | None:
    """By how much autoregressive decoding preferred its token `index` to `other`: the same arithmetic, run again."""
    sampling = Sampling.of(config, config.seed or 0, batch=1, device=target.spec.device)
    limits = limits_of(config, target.spec, inputs)  # the slab's size follows from them
    state, _ = target.prefill(inputs, sampling=sampling, limits=limits, taps=None)
    with contextlib.closing(state):
        state.first()
        for _ in range(index):
            tree = state.root_tree()
            scores = target.verify(tree, state)
            state.commit(tree, scores, state.accept(tree, scores))
        logits = target.head(state.step.features[:, :1])  # the row whose draw the last token was
        rated = perturbed(
            logits, state.kv_len[:, None] - 1, config.temperature, config.top_k, config.top_p, sampling.seed
        )[0, 0]
        gap = float(rated[token] - rated[other])
    return gap if math.isfinite(gap) else None
