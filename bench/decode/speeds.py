"""Tokens a second without a draft: transformers' `generate`, eager and compiled, and ours."""

from collections.abc import Iterator
from typing import Any

import torch

from bench.decode.figures import Figure, Kind, Teller
from bench.decode.models import Size, Subject
from bench.decode.run import Run, seconds_of
from bench.floors import layer_weights

SECTION, PREFILL = "AR", "prefill"
OURS, HF_EAGER, HF_STATIC = "ours", "HF eager generate", "HF static cache, torch.compile"
BANDWIDTH = "ours, share of the copy bandwidth"
TIME, OVER_FLOOR = "time to the first token", "over its floor of operations"
OVER_EAGER, OVER_STATIC = f"ours over {HF_EAGER}", f"ours over {HF_STATIC}"


def autoregressive(run: Run) -> Iterator[Figure]:
    """Ours, decode only, and its share of the copy bandwidth; and the time before."""
    subject = run.subject
    tell = Teller(Kind.RANDOM, subject.size.name, SECTION)
    subject.model.warm_up(**subject.asked, draft=next(iter(subject.drafts.values())))
    stats = [subject.model.generate(**subject.asked, draft=None).stats for _ in range(subject.size.answers)]
    ours = tell.many(OURS, "tokens/s", [one.tokens_per_second for one in stats], tokens=subject.size.tokens)
    yield ours
    yield tell.one(
        BANDWIDTH, "share", run.of_bandwidth(ours.value), bandwidth=run.bandwidth, prompt=subject.size.prompt_tokens
    )
    before = Teller(Kind.RANDOM, subject.size.name, PREFILL)
    first = before.many(TIME, "ms", [1e3 * one.prefill_seconds for one in stats], prompt=subject.size.prompt_tokens)
    yield first
    if run.rate is None:
        yield before.none(OVER_FLOOR, "x", "no rate of matrix products was measured")
    else:
        floor = prefill_operations(subject.size) / run.rate
        yield before.one(OVER_FLOOR, "x", 1e-3 * first.value / floor, floor_ms=1e3 * floor, rate=run.rate)


def prefill_operations(size: Size) -> int:
    """Operations of the matrix products that a prompt with one picture cannot do without, up to its first logits."""
    language, vision = size.language, size.vision
    tokens, patches = size.prompt_tokens, size.image_tokens + 1
    products = layer_weights(language, itemsize=1) - 2 * language.hidden  # without its norms
    # A layer's last query sees all tokens, its first sees one: half of the square.
    seen = 2 * tokens * tokens * language.heads * language.head_dim
    answer = language.layers * (2 * tokens * products + seen) + 2 * language.hidden * language.vocabulary
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    layer = 2 * patches * (4 * width**2 + 2 * width * inner) + 4 * patches * patches * width
    embedded = 2 * size.image_tokens * 3 * vision["patch_size"] ** 2 * width
    projected = 2 * size.image_tokens * (width * language.hidden + language.hidden**2)
    # The features are the last layer's but one.
    looked = embedded + (vision["num_hidden_layers"] - 1) * layer + projected
    return answer + looked


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
    """Tokens a second of transformers' greedy `generate`, decode only: the tokens, and the time, that a long answer has
    more than one of a quarter. What every call prepares anew, a cache or its graphs, is in both."""
    model, tokens = subject.model.target.model, subject.size.hf_tokens
    fewer = 1 + tokens // 4

    def seconds(count: int) -> float:
        asked = subject.prompt | options
        return seconds_of(lambda: model.generate(**asked, do_sample=False, max_new_tokens=count), subject.device)

    for count in (tokens, fewer) * 2:  # compiles, where it compiles, and records
        seconds(count)
    long = [seconds(tokens) for _ in range(subject.size.answers)]
    short = sorted(seconds(fewer) for _ in range(subject.size.answers))[subject.size.answers // 2]
    return [(tokens - fewer) / (each - short) for each in long]
