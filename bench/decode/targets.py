"""What decoding is to reach, and which of it a run shows to be met."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.decode import host, memory, replay, rounds, speeds
from bench.decode.figures import Found
from bench.decode.models import FULL_HEAD, HEADS, SIZES, Size
from bench.kernels.targets import Verdict

#: Heads that read less than the whole.
_LESS = tuple(name for name in HEADS if name != FULL_HEAD)


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a figure.

    Attributes:
        name: what it asks for, in words.
        section: the figure's.
        figures: names of figures, of which the best has to fit, or, where `every`, the worst.
        bound: by what.
        at_least: whether from below.
        unit: of the figure, for its printing.
        every: all have to fit.
        only: the one model that it is set for; None: all.
    """

    name: str
    section: str
    figures: tuple[str, ...]
    bound: float
    at_least: bool
    unit: str
    every: bool = False
    only: str | None = None

    def fits(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass(frozen=True, slots=True)
class Standing:
    """A target after a run, for one model."""

    target: Target
    model: str
    verdict: Verdict
    value: float | None = None
    figure: str | None = None

    def line(self) -> str:
        """One line for people."""
        target = self.target
        if self.value is None:
            return f"{self.verdict}: {self.model}, {target.name}"
        sign = ">=" if target.at_least else "<="
        return f"{self.verdict}: {self.model}, {target.name}: {self.value:.3g} {sign} {target.bound:g} {target.unit}"


def standings(sizes: Sequence[Size], found: Found) -> list[Standing]:
    """How every target stands for every model that has targets."""
    judged = [size.name for size in sizes if size.judged]
    return [_standing(each, model, found) for model in judged for each in TARGETS if each.only in (None, model)]


def _standing(target: Target, model: str, found: Found) -> Standing:
    values = {name: found.value(model, target.section, name) for name in target.figures}
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        return Standing(target, model, Verdict.UNMEASURED)
    chosen = (max if target.at_least != target.every else min)(known, key=lambda name: known[name])
    verdict = Verdict.MET if target.fits(known[chosen]) else Verdict.MISSED
    if verdict == Verdict.MET and target.every and len(known) < len(values):
        verdict = Verdict.OPEN
    return Standing(target, model, verdict, known[chosen], chosen)


TARGETS = (
    Target("AR: share of the copy bandwidth", speeds.SECTION, (speeds.BANDWIDTH,), 0.85, True, "of it"),
    Target("AR: over transformers' eager generate", speeds.SECTION, (speeds.OVER_EAGER,), 5.0, True, "times"),
    Target(
        "prefill: over its floor of operations",
        speeds.PREFILL,
        (speeds.OVER_FLOOR,),
        2.0,
        False,
        "times",
        only=SIZES["7b"].name,
    ),
    Target("verify: 64 nodes over one", rounds.VERIFY, (rounds.OVER_ONE,), 1.10, False, "times"),
    Target(
        "round with the full head over an AR step", rounds.ROUND, (rounds.over_step(FULL_HEAD),), 1.6, False, "times"
    ),
    Target(
        "round with a head that reads less over a step",
        rounds.ROUND,
        tuple(rounds.over_step(name) for name in _LESS),
        1.45,
        False,
        "times",
    ),
    Target(
        "growth of a tree: share of the copy bandwidth",
        rounds.ROUND,
        tuple(rounds.growth_bandwidth(name) for name in HEADS),
        0.85,
        True,
        "of it",
        every=True,
    ),
    Target(
        "host time a round",
        host.SECTION,
        tuple(host.host_time(name) for name in HEADS),
        100.0,
        False,
        "µs",
        every=True,
    ),
    Target(
        "host synchronisations a round",
        host.SECTION,
        tuple(host.synchronisations(name) for name in HEADS),
        1.0,
        False,
        "waits",
        every=True,
    ),
    Target(
        f"replayed acceptance, tau {replay.AIM}: over AR",
        replay.SECTION,
        tuple(replay.over_ar(replay.AIM, name) for name in HEADS),
        3.3,
        True,
        "times",
    ),
    Target(
        f"replayed acceptance, tau {replay.AIM}: over transformers' eager generate",
        replay.SECTION,
        tuple(replay.over_hf(replay.AIM, name) for name in HEADS),
        15.0,
        True,
        "times",
    ),
    Target("memory besides weights and KV slab", memory.SECTION, (memory.REST,), 1.0, False, "GiB"),
)
