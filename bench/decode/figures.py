"""What a run of the decoder's benchmark consists of: figures, each with what kind of model and acceptance it is of."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch

from bench.kernels.timing import spread

#: A fact that belongs to a figure.
Fact = float | str | bool


class Kind(StrEnum):
    """What a figure is of."""

    RANDOM = "random weights"
    REPLAYED = "replayed acceptance"
    WIDENED = "widened demo"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure.

    Attributes:
        kind: what it is of.
        model: the name of the model's size.
        section: which part of the run it is from.
        name: what was measured, in words.
        unit: of the value.
        value: the median; None: there is none, and the fact "why" tells the reason.
        p10, p90: the tenth and ninetieth percentile; None: there is one value alone.
        facts: what belongs to it, by name.
    """

    kind: Kind
    model: str
    section: str
    name: str
    unit: str
    value: float | None
    p10: float | None = None
    p90: float | None = None
    facts: Mapping[str, Fact] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Found:
    """The figures so far."""

    figures: list[Figure] = field(default_factory=list)

    def value(self, model: str, section: str, name: str) -> float | None:
        """The value of the figure of that name; None: there is none."""
        for figure in self.figures:
            if (figure.model, figure.section, figure.name) == (model, section, name):
                return figure.value
        return None


@dataclass(frozen=True, slots=True)
class Teller:
    """Makes the figures of one section.

    Attributes:
        kind, model, section: as the figures have them.
    """

    kind: Kind
    model: str
    section: str

    def one(self, name: str, unit: str, value: float, **facts: Fact) -> Figure:
        """A figure that was measured, or computed, once."""
        return Figure(self.kind, self.model, self.section, name, unit, value, facts=facts)

    def many(self, name: str, unit: str, values: Sequence[float], **facts: Fact) -> Figure:
        """Median and percentiles of `values`."""
        found = spread(list(values))
        return Figure(self.kind, self.model, self.section, name, unit, found.median, found.p10, found.p90, facts)

    def none(self, name: str, unit: str, why: str) -> Figure:
        """A figure that could not be had."""
        return Figure(self.kind, self.model, self.section, name, unit, None, facts={"why": why})


class Marks:
    """Moments of a device's work, by events, so that nothing waits until they are read; on a CPU, of the host's.

    Args:
        device: whose work it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._moments: list[torch.cuda.Event | float] = []

    def note(self, name: str) -> None:
        """Something called `name` begins, and what was under way ends."""
        self._names.append(name)
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._moments.append(event)
        else:
            self._moments.append(time.perf_counter())

    def spans(self) -> Iterator[tuple[str, float]]:
        """What began, and how many seconds until the next began; what began last has none."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for name, start, end in zip(self._names, self._moments, self._moments[1:], strict=False):
            if isinstance(start, torch.cuda.Event):
                yield name, 1e-3 * start.elapsed_time(end)
            else:
                yield name, end - start


def in_turn(calls: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of each of some calls, taken in turn so that a slow spell meets all alike.

    Before, each is called three times uncounted: a step is recorded the second time, and replayed from the third on.
    """
    for call in calls.values():
        for _ in range(3):
            call()
    marks = Marks(device)
    for _ in range(repeats):
        for name, call in calls.items():
            marks.note(name)
            call()
    marks.note("end")
    found: dict[str, list[float]] = {name: [] for name in calls}
    for name, seconds in marks.spans():
        found[name].append(seconds)
    return found
