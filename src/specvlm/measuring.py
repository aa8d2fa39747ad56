"""How fast drafts are on one model: every draft in turn in one process, medians with their spread."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

from specvlm.decoder import Answer, SpecVLM
from specvlm.drafts import Draft, NoDraft
from specvlm.trace import Trace, TracedDraft, TracedTarget

#: Tokens of a warm-up: several rounds.
_WARM_UP = 24


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second over repeats: the median, and the quartiles on its sides."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Row:
    """How one draft did at one temperature.

    Attributes:
        draft: its name; None: autoregressive decoding.
        decode: decode only: tokens after the first over the time after the first.
        end_to_end: prefill included.
        tau: tokens a round, bonus included.
        identical: every answer was autoregressive decoding's of the same seed, token for token.
        draft_share, verify_share: the draft's and the target's forwards, of the time after the first token; the rest
            is the host's.
        growth_share: what of that rest is the growing of trees around the draft's forwards.
        host_ms: the host's time a round, outside both models' forwards, in milliseconds.
    """

    draft: str | None
    temperature: float
    decode: Speed
    end_to_end: Speed
    tau: float
    identical: bool
    draft_share: float
    verify_share: float
    growth_share: float
    host_ms: float

    def summary(self) -> dict[str, Any]:
        """The medians by name, as JSON holds them."""
        return {
            "draft": self.draft,
            "temperature": self.temperature,
            "tokens_per_second": self.decode.median,
            "end_to_end_tokens_per_second": self.end_to_end.median,
            "tau": self.tau,
            "identical": self.identical,
        }

    @property
    def host_share(self) -> float:
        """Of the time after the first token, what neither model's forwards took."""
        return 1 - self.draft_share - self.verify_share


@dataclass(frozen=True, slots=True)
class _Run:
    answers: list[Answer]
    trace: Trace


def measure(
    model: SpecVLM,
    prompts: Sequence[Mapping[str, Any]],
    drafts: Mapping[str | None, Draft | None],
    *,
    temperatures: Sequence[float],
    repeats: int,
    max_new_tokens: int,
) -> Iterator[list[Row]]:
    """Answers all `prompts` by every draft at every temperature, `repeats` times, after a warm-up of a few tokens.

    A repeat has a seed of its own and takes every condition in turn, each time beginning with another one, so that a
    slow spell of the machine meets all alike. Making the prompts is not measured.

    Args:
        drafts: by name; the name None, autoregressive decoding, is among them.

    Yields:
        after each repeat, the rows so far, in the order of temperatures and drafts.
    """
    conditions = [(name, temperature) for temperature in temperatures for name in drafts]
    runs: dict[tuple[str | None, float], list[_Run]] = {condition: [] for condition in conditions}

    def run(name: str | None, temperature: float, seed: int, asked: Sequence[Mapping[str, Any]], tokens: int) -> _Run:
        trace = Trace()
        draft = TracedDraft(drafts[name] or NoDraft(), trace)
        traced = SpecVLM.from_target(TracedTarget(model.target, trace), draft)
        options: dict[str, Any] = {"temperature": temperature, "seed": seed, "max_new_tokens": tokens}
        return _Run([traced.generate(**prompt, **options) for prompt in asked], trace)

    for condition in conditions:
        run(*condition, 0, prompts[:1], min(_WARM_UP, max_new_tokens))
    for repeat in range(repeats):
        first = repeat % len(conditions)
        for condition in conditions[first:] + conditions[:first]:
            runs[condition].append(run(*condition, repeat, prompts, max_new_tokens))
        yield [_row(*condition, runs[condition], runs[None, condition[1]]) for condition in conditions]


def _row(draft: str | None, temperature: float, runs: list[_Run], expected: list[_Run]) -> Row:
    stats = [[answer.stats for answer in run.answers] for run in runs]
    flat = [one for repeat in stats for one in repeat]
    seconds, rounds = sum(s.decode_seconds for s in flat), sum(s.rounds for s in flat)
    drafting, verifying = sum(run.trace.draft for run in runs), sum(run.trace.verify for run in runs)
    return Row(
        draft=draft,
        temperature=temperature,
        decode=_speed([sum(s.tokens - 1 for s in rs) / sum(s.decode_seconds for s in rs) for rs in stats]),
        end_to_end=_speed(
            [sum(s.tokens for s in rs) / sum(s.prefill_seconds + s.decode_seconds for s in rs) for rs in stats]
        ),
        tau=sum(s.tau * s.rounds for s in flat) / rounds,
        identical=_tokens(runs) == _tokens(expected),
        draft_share=drafting / seconds,
        verify_share=verifying / seconds,
        growth_share=sum(run.trace.growth for run in runs) / seconds,
        host_ms=(seconds - drafting - verifying) / rounds * 1e3,
    )


def _tokens(runs: list[_Run]) -> list[list[list[int]]]:
    return [[answer.tokens for answer in run.answers] for run in runs]


def _speed(values: list[float]) -> Speed:
    if len(values) == 1:
        return Speed(values[0], values[0], values[0])
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return Speed(middle, low, high)
