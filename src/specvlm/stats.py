"""How an answer went: counts and times."""

import time
from collections import Counter
from dataclasses import dataclass

from specvlm.state import Emitted


@dataclass(frozen=True, slots=True)
class Stats:
    """How an answer was decoded.

    Attributes:
        tokens: tokens in the answer.
        rounds: forwards of the target after prefill.
        tau: tokens a round, bonus included, before any cut; 0 when prefill's token was the whole answer.
        tokens_per_second: decode only: the tokens after the first over the time after the first.
        end_to_end_tokens_per_second: all tokens over all time.
        prefill_seconds, decode_seconds: time to the first token, and from there to the last.
        accepted_histogram: how many rounds accepted 0, 1, 2, ... drafted tokens.
        from_draft: tokens of the answer that the draft had proposed.
        seed: repeats the answer.
    """

    tokens: int
    rounds: int
    tau: float
    tokens_per_second: float
    end_to_end_tokens_per_second: float
    prefill_seconds: float
    decode_seconds: float
    accepted_histogram: tuple[int, ...]
    from_draft: int
    seed: int


class StatsRecorder:
    """Counts what is emitted, from the moment it is made."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._tokens = self._from_draft = 0
        self._accepted: list[int] = []
        self._times = [time.perf_counter()]

    def add(self, emitted: Emitted) -> None:
        """Notes what a round emitted; the first call is prefill's token."""
        self._times.append(time.perf_counter())
        self._tokens += len(emitted.tokens[0])
        self._from_draft += emitted.from_draft[0]
        self._accepted.append(emitted.accepted[0])

    def stats(self) -> Stats:
        """The sums."""
        rounds = self._accepted[1:]
        prefill = self._times[1] - self._times[0]
        decode = self._times[-1] - self._times[1]
        counts = Counter(rounds)
        return Stats(
            tokens=self._tokens,
            rounds=len(rounds),
            tau=sum(rounds) / len(rounds) + 1 if rounds else 0.0,
            tokens_per_second=(self._tokens - 1) / decode if rounds else 0.0,
            end_to_end_tokens_per_second=self._tokens / (prefill + decode),
            prefill_seconds=prefill,
            decode_seconds=decode,
            accepted_histogram=tuple(counts[n] for n in range(max(counts, default=-1) + 1)),
            from_draft=self._from_draft,
            seed=self._seed,
        )
