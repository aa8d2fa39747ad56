"""What the host does in a round: its time, and, read from a profile, how often it waits for the device."""

import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.decode.figures import Fact, Figure, Kind, Teller
from bench.decode.rounds import STEP
from bench.decode.run import UNCOUNTED, Run, a_round, answering
from specvlm.drafts import Draft, NoDraft

SECTION = "host"
#: The most rounds under the profiler, and what they are called there.
ROUNDS, ROUND = 10, "specvlm round"

#: Kernels that are told, and how much of their names.
KERNELS, KERNEL_NAME = 6, 40

#: Calls of CUDA that return when the device has come so far. A copy to memory that is not pinned waits as well.
WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_COPY, _TO_HOST, _PINNED = "cudaMemcpyAsync", "DtoH", "Pinned"


@dataclass(frozen=True, slots=True)
class HostSide:
    """One round as the host saw it.

    Attributes:
        seconds: its time less the waiting.
        waits: how often it waited for the device; a copy and the synchronisation behind it are one.
        launches: kernels and graphs that it launched.
    """

    seconds: float
    waits: int
    launches: int


def host_time(draft: str) -> str:
    """The figure of the host's time, by the draft's name."""
    return f"{draft}, host time a round"


def profiled_time(draft: str) -> str:
    """The figure of the host's time in the profile, by the draft's name."""
    return f"{host_time(draft)}, profiled"


def synchronisations(draft: str) -> str:
    """The figure of the host's waits, by the draft's name."""
    return f"{draft}, synchronisations a round"


def file_of(model: str, draft: str) -> str:
    """The name of a profile's file."""
    return f"{model} {draft}.json".lower().replace(" ", "-")


def host_side(run: Run) -> Iterator[Figure]:
    """The host's time and waits in an AR step and with every draft, and the kernels that take longest.

    The profile's time holds the profiler's own, which knows every kernel of a graph; the other is without a profiler.
    """
    subject = run.subject
    tell = Teller(Kind.RANDOM, subject.size.name, SECTION)
    for name, draft in {STEP: NoDraft(), **subject.drafts}.items():
        yield tell.many(host_time(name), "µs", [1e6 * one for one in _unprofiled(run, draft)])
        with _folder(run.profiles) as folder:
            path = folder / file_of(subject.size.name, name)
            _profile(run, draft, path)
            events = json.loads(path.read_text())["traceEvents"]
        rounds = read_rounds(events)
        facts: dict[str, Fact] = {} if run.profiles is None else {"profile": path.name}
        if kernels := longest_kernels(events, len(rounds)):
            facts["kernels, µs a round"] = kernels
        if subject.device.type == "cuda" and not any(one.launches for one in rounds):
            yield tell.none(profiled_time(name), "µs", "the profile knows of no call of CUDA")
            yield tell.none(synchronisations(name), "waits", "the profile knows of no call of CUDA")
            continue
        launches = max(one.launches for one in rounds)
        yield tell.many(profiled_time(name), "µs", [1e6 * one.seconds for one in rounds], launches=launches, **facts)
        yield tell.one(synchronisations(name), "waits", max(one.waits for one in rounds), rounds=len(rounds))


@contextlib.contextmanager
def _folder(profiles: Path | None) -> Iterator[Path]:
    """The folder, made if need be; without one, one that goes again."""
    if profiles is None:
        with tempfile.TemporaryDirectory() as made:
            yield Path(made)
    else:
        profiles.mkdir(parents=True, exist_ok=True)
        yield profiles


def _rounds(run: Run) -> int:
    return min(ROUNDS, 2 * run.subject.size.repeats)


@torch.inference_mode()
def _unprofiled(run: Run, draft: Draft) -> list[float]:
    """Seconds of the host in some rounds, a little too many: the device's own time in a commit is among them."""
    subject, found = run.subject, []

    def settled() -> float:
        """The time, when the device has done all that it was asked for."""
        if subject.device.type == "cuda":
            torch.cuda.synchronize(subject.device)
        return time.perf_counter()

    with answering(subject, draft) as (state, session):
        for _ in range(UNCOUNTED):
            a_round(subject, state, session, lambda part: None)
        while not state.finished and len(found) < _rounds(run):
            began = settled()
            tree = session.propose(state)
            scores = subject.model.target.verify(tree, state)
            accepted = state.accept(tree, scores)
            launched = time.perf_counter() - began
            began = settled()
            state.commit(tree, scores, accepted)
            found.append(launched + time.perf_counter() - began)
    return found


@torch.inference_mode()
def _profile(run: Run, draft: Draft, path: Path) -> None:
    subject = run.subject
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (subject.device.type == "cuda")
    with answering(subject, draft) as (state, session):
        for _ in range(UNCOUNTED):
            a_round(subject, state, session, lambda part: None)
        with profile(activities=activities) as profiler:
            for _ in range(_rounds(run)):
                if not state.finished:
                    with record_function(ROUND):
                        a_round(subject, state, session, lambda part: None)
    profiler.export_chrome_trace(str(path))


def read_rounds(events: Sequence[Mapping[str, Any]]) -> list[HostSide]:
    """What the host did in every round of a trace, from its "traceEvents"."""
    timed = sorted((event for event in events if event.get("ph") == "X"), key=lambda event: event["ts"])
    calls = [event for event in timed if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    to_host = {
        event["args"]["correlation"]
        for event in timed
        if event.get("cat") == "gpu_memcpy" and _TO_HOST in event["name"] and _PINNED not in event["name"]
    }
    found = []
    for span in timed:
        if (span.get("cat"), span["name"]) == ("user_annotation", ROUND):
            ends = span["ts"] + span["dur"]
            inside = [call for call in calls if span["ts"] <= call["ts"] < ends]
            found.append(_host_side(span["dur"], inside, to_host))
    return found


def _host_side(duration: float, calls: Sequence[Mapping[str, Any]], to_host: set[int]) -> HostSide:
    """One round of `duration` µs."""
    waited, waits, launches, copied = 0.0, 0, 0, False
    for call in calls:
        name = call["name"].split("_v")[0]
        if name == _COPY and call.get("args", {}).get("correlation") in to_host:
            waited += call["dur"]
            waits += 1
            copied = True
        elif name in WAITING:
            waited += call["dur"]
            waits += not copied
            copied = False
        elif "Launch" in name:
            launches += 1
            copied = False
    return HostSide(1e-6 * (duration - waited), waits, launches)


def longest_kernels(events: Sequence[Mapping[str, Any]], rounds: int) -> str:
    """The kernels of a trace that took longest, with the µs that each took a round."""
    sums: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "kernel":
            sums[event["name"].split("(")[0][:KERNEL_NAME]] += event["dur"]
    return ", ".join(f"{name} {total / rounds:.0f}" for name, total in sums.most_common(KERNELS))
