"""What every section of a run works with, and the rounds of an answer one part at a time."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.decode.figures import Found, Marks, in_turn
from bench.decode.models import Subject
from bench.floors import step_bytes
from bench.kernels.timing import ceilings
from specvlm.config import GenerateConfig
from specvlm.drafts import Draft, DraftSession
from specvlm.state import DecodeState, Limits, Sampling

#: What a round consists of, in order.
PARTS = ("grow", "verify", "accept", "commit")
#: The sum of them.
WHOLE = "whole"
#: Rounds of an answer that are not counted: its first are of other shapes, and steps are recorded in them.
UNCOUNTED = 4
#: Bytes of a copy on a CPU.
_CPU_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Run:
    """A model under measurement, on a machine.

    Attributes:
        subject: the model.
        bandwidth: bytes a second that the machine copies with.
        rate: operations a second of its bf16 matrix products; None: not measured.
        found: the figures so far.
        profiles: the folder that profiles stay in; None: they do not.
    """

    subject: Subject
    bandwidth: float
    rate: float | None
    found: Found
    profiles: Path | None = None

    def of_bandwidth(self, rate: float) -> float:
        """The share of the copy bandwidth that `rate` steps a second, of one node each, read with."""
        size, itemsize = self.subject.size, self.subject.model.target.spec.dtype.itemsize
        return rate * step_bytes(size.language, size.prompt_tokens + size.tokens // 2, itemsize) / self.bandwidth


def limits_of(device: torch.device) -> tuple[float, float | None]:
    """Bytes a second that a device reads and writes in a large copy, and operations a second of large bf16 products,
    measured; on a CPU no such product is."""
    if device.type == "cuda":
        found = ceilings()
        return found.bandwidth, found.rate
    source = torch.randint(256, (_CPU_BYTES,), dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = in_turn({"copy": lambda: target.copy_(source)}, device, 3)["copy"]
    return 2 * _CPU_BYTES / min(seconds), None


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, with all that it starts on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@contextlib.contextmanager
def answering(subject: Subject, draft: Draft) -> Iterator[tuple[DecodeState, DraftSession]]:
    """An answer whose prompt has been run, and its draft; decode in inference mode."""
    target, tokens = subject.model.target, subject.size.tokens
    draft.bind(target)
    sampling = Sampling.of(GenerateConfig(max_new_tokens=tokens), 0, batch=1, device=target.spec.device)
    state, prompt = target.prefill(subject.prompt, sampling=sampling, limits=Limits(tokens), taps=draft.taps)
    with contextlib.closing(state):
        session = draft.start(prompt, state)
        state.first()
        yield state, session


def a_round(subject: Subject, state: DecodeState, session: DraftSession, note: Callable[[str], None]) -> None:
    """One round, its parts told as they begin."""
    note(PARTS[0])
    tree = session.propose(state)
    note(PARTS[1])
    scores = subject.model.target.verify(tree, state)
    note(PARTS[2])
    accepted = state.accept(tree, scores)
    note(PARTS[3])
    state.commit(tree, scores, accepted)


@torch.inference_mode()
def timed_rounds(subject: Subject, draft: Draft, rounds: int) -> dict[str, list[float]]:
    """Seconds of each part of some rounds, and of each round as a whole.

    A part lasts until the device begins the next one. The device stands idle when a round begins: so growth includes
    what the host does until its first kernel runs, and commit the tokens' way to the host.
    """
    found: dict[str, list[float]] = {part: [] for part in (*PARTS, WHOLE)}
    while len(found[WHOLE]) < rounds:
        marks, before = Marks(subject.device), len(found[WHOLE])
        with answering(subject, draft) as (state, session):
            for _ in range(UNCOUNTED):
                a_round(subject, state, session, lambda part: None)
            told = 0
            while not state.finished and before + told < rounds:
                a_round(subject, state, session, marks.note)
                told += 1
            marks.note("end")
            for part, seconds in marks.spans():
                found[part].append(seconds)
        found[WHOLE] += [sum(parts) for parts in zip(*(found[part][before:] for part in PARTS), strict=True)]
    return found
