"""Tokens a second without a draft: transformers' `generate`, eager and compiled, and ours."""

from collections.abc import Iterator
from typing import Any

import torch

from bench.decode.figures import Figure, Kind, Teller
from bench.decode.models import Subject
from bench.decode.run import Run, seconds_of

SECTION = "AR"
OURS, HF_EAGER, HF_STATIC = "ours", "HF eager generate", "HF static cache, torch.compile"
BANDWIDTH = "ours, share of the copy bandwidth"
OVER_EAGER, OVER_STATIC = f"ours over {HF_EAGER}", f"ours over {HF_STATIC}"


def autoregressive(run: Run) -> Iterator[Figure]:
    """Ours, decode only, and its share of the copy bandwidth."""
    subject = run.subject
    tell = Teller(Kind.RANDOM, subject.size.name, SECTION)
    subject.model.warm_up(**subject.asked, draft=next(iter(subject.drafts.values())))
    stats = [subject.model.generate(**subject.asked, draft=None).stats for _ in range(subject.size.answers)]
    ours = tell.many(OURS, "tokens/s", [one.tokens_per_second for one in stats], tokens=subject.size.tokens)
    yield ours
    yield tell.one(
        BANDWIDTH, "share", run.of_bandwidth(ours.value), bandwidth=run.bandwidth, prompt=subject.size.prompt_tokens
    )


def transformers_eager(run: Run) -> Iterator[Figure]:
    """Transformers' `generate` as it is."""
    tell = Teller(Kind.RANDOM, run.subject.size.name, SECTION)
    eager = tell.many(HF_EAGER, "tokens/s", hf_rates(run.subject), tokens=run.subject.size.hf_tokens)
    yield eager
    if ours := run.found.value(run.subject.size.name, SECTION, OURS):
        yield tell.one(OVER_EAGER, "x", ours / eager.value)


def transformers_compiled(run: Run) -> Iterator[Figure]:
    """Transformers' `generate` with a static cache, for which it compiles the model on a GPU."""
    subject = run.subject
    tell = Teller(Kind.RANDOM, subject.size.name, SECTION)
    try:
        rates = hf_rates(subject, cache_implementation="static")
    except Exception as error:  # another's compiler may fail in any way, and that is told, not hidden
        lines = str(error).strip().splitlines() or ["no message"]
        yield tell.none(HF_STATIC, "tokens/s", f"{type(error).__name__}: {lines[0][:120]}")
        return
    finally:
        torch._dynamo.reset()  # and with it the memory of its graphs
    was_compiled = hasattr(subject.model.target.model, "_compiled_call")
    static = tell.many(HF_STATIC, "tokens/s", rates, tokens=subject.size.hf_tokens, compiled=was_compiled)
    yield static
    if ours := run.found.value(subject.size.name, SECTION, OURS):
        yield tell.one(OVER_STATIC, "x", ours / static.value)


def hf_rates(subject: Subject, **options: Any) -> list[float]:
    """Tokens a second of transformers' greedy `generate`, decode only: less the time of an answer of one token."""
    model, tokens = subject.model.target.model, subject.size.hf_tokens

    def seconds(count: int) -> float:
        asked = subject.prompt | options
        return seconds_of(lambda: model.generate(**asked, do_sample=False, max_new_tokens=count), subject.device)

    for _ in range(2):  # compiles, where it compiles, and records
        seconds(tokens)
    long = [seconds(tokens) for _ in range(subject.size.answers)]
    one = sorted(seconds(1) for _ in range(subject.size.answers))[subject.size.answers // 2]
    return [(tokens - 1) / (each - one) for each in long]
