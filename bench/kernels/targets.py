"""What the kernels are to reach, and which of it a run shows to be met."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from bench.kernels.attention import FLASHINFER, FLEX
from bench.kernels.registry import Case, Ceilings, Measurement, Timing

#: A measured figure of one case; None: what it takes was not measured there.
Figure = Callable[[Measurement, Ceilings], float | None]


class Verdict(StrEnum):
    """How a target stands: `OPEN` where some of its cases were not measured and none missed it."""

    MET = "met"
    MISSED = "missed"
    OPEN = "open"
    UNMEASURED = "unmeasured"


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a figure of some cases.

    Attributes:
        name: what it asks for, in words.
        applies: to which cases.
        figure: what is bounded.
        bound: by what.
        at_least: whether from below.
        unit: of the figure, for its printing.
    """

    name: str
    applies: Callable[[Case], bool]
    figure: Figure
    bound: float
    at_least: bool
    unit: str

    def fits(self, figure: float) -> bool:
        return figure >= self.bound if self.at_least else figure <= self.bound


@dataclass(frozen=True, slots=True)
class Standing:
    """A target after a run: the worst of its measured cases, and how many there were of how many."""

    target: Target
    verdict: Verdict
    measured: int
    cases: int
    worst: float | None = None
    where: str | None = None

    def line(self) -> str:
        """One line for people."""
        if self.worst is None:
            return f"{self.verdict}: {self.target.name} (0 of {self.cases} cases measured)"
        sign = ">=" if self.target.at_least else "<="
        return (
            f"{self.verdict}: {self.target.name}: {self.worst:.3g} {sign} {self.target.bound:g} {self.target.unit} "
            f"in the worst of {self.measured} measured of {self.cases}, {self.where}"
        )


def standings(cases: Sequence[Case], measured: Sequence[Measurement], ceilings: Ceilings | None) -> list[Standing]:
    """How every target stands; without ceilings nothing was measured."""
    return [_standing(target, cases, measured, ceilings) for target in TARGETS]


def _standing(
    target: Target, cases: Sequence[Case], measured: Sequence[Measurement], ceilings: Ceilings | None
) -> Standing:
    wanted = {case.name for case in cases if target.applies(case)}
    figures: Mapping[str, float] = {}
    if ceilings is not None:
        found = {each.case.name: target.figure(each, ceilings) for each in measured if each.case.name in wanted}
        figures = {name: figure for name, figure in found.items() if figure is not None}
    if not figures:
        return Standing(target, Verdict.UNMEASURED, 0, len(wanted))
    where = (min if target.at_least else max)(figures, key=lambda name: figures[name])
    verdict = Verdict.MET if len(figures) == len(wanted) else Verdict.OPEN
    if not target.fits(figures[where]):
        verdict = Verdict.MISSED
    return Standing(target, verdict, len(figures), len(wanted), figures[where], where)


def bandwidth_share(measured: Measurement, ceilings: Ceilings) -> float:
    """Of the copy bandwidth."""
    return measured.case.bytes / measured.kernel.median / ceilings.bandwidth


def over_floor(measured: Measurement, ceilings: Ceilings) -> float:
    """The time as a multiple of the floor."""
    return measured.kernel.median / ceilings.floor(measured.case)


def over_floor_and_launch(measured: Measurement, ceilings: Ceilings) -> float:
    """What is left of the time after one launch, as a multiple of the floor."""
    return (measured.kernel.median - ceilings.launch) / ceilings.floor(measured.case)


def microseconds(measured: Measurement, ceilings: Ceilings) -> float:
    return 1e6 * measured.kernel.median


def speedup_over(*names: str) -> Figure:
    """Over the fastest of these baselines that could be had; None where none could."""

    def figure(measured: Measurement, ceilings: Ceilings) -> float | None:
        times = [time.median for name, time in measured.baselines.items() if name in names and isinstance(time, Timing)]
        return min(times) / measured.kernel.median if times else None

    return figure


def _tree(case: Case, low: float, high: float) -> bool:
    """One answer's tree of at most 64 nodes behind `low` to `high` slots of bf16."""
    facts = case.facts
    return (
        case.op == "tree_attention"
        and facts["batch"] == 1
        and facts["cache_bits"] == 16
        and facts["nodes"] <= 64
        and low <= facts["kv"] <= high
    )


def _drawn(case: Case, filtered: bool) -> bool:
    """64 nodes of 32,000 logits, with top-p or without any filter."""
    facts = case.facts
    size = case.op in ("draw", "accept") and (facts["nodes"], facts["vocabulary"]) == (64, 32000)
    return size and facts["top_k"] == 0 and (facts["top_p"] < 1) == filtered


def _wide(case: Case, *ops: str) -> bool:
    return case.op in ops and case.facts["tokens"] >= 2880 and case.facts["channels"] >= 4096


#: 64 nodes of 4 heads each ask for 256 operations a byte of a bf16 cache: the tensor cores, and not the bytes, are what
#: they wait for. No kernel reads such a cache at a copy's bandwidth; the second target takes what the first leaves out.
TARGETS = (
    Target(
        "tree_attention, KV >= 4096, N <= 64: share of the copy bandwidth",
        lambda case: _tree(case, 4096, 1e9) and case.facts["nodes"] * case.facts["group"] <= 64,
        bandwidth_share,
        0.8,
        True,
        "of it",
    ),
    Target(
        "tree_attention, KV >= 4096, 64 nodes of grouped heads: time over the floor of bytes and operations",
        lambda case: _tree(case, 4096, 1e9) and case.facts["nodes"] * case.facts["group"] > 64,
        over_floor,
        1.25,
        False,
        "floors",
    ),
    Target(
        "tree_attention, KV 600 to 2048: time less one launch, over the floor",
        lambda case: _tree(case, 600, 2048),
        over_floor_and_launch,
        1.5,
        False,
        "floors",
    ),
    Target(
        "tree_attention: speedup over SDPA with a mask",
        lambda case: _tree(case, 0, 1e9),
        speedup_over("SDPA with a mask"),
        2.0,
        True,
        "times",
    ),
    Target(
        "tree_attention: never slower than FlexAttention or FlashInfer",
        lambda case: case.op == "tree_attention" and bool(case.facts["compared"]),
        speedup_over(FLEX, FLASHINFER),
        1.0,
        True,
        "times",
    ),
    Target(
        "draw and accept, 64 x 32000, greedy or plain sampling",
        lambda case: _drawn(case, False),
        microseconds,
        15.0,
        False,
        "µs",
    ),
    Target(
        "draw and accept, 64 x 32000, with top-p",
        lambda case: _drawn(case, True),
        microseconds,
        40.0,
        False,
        "µs",
    ),
    *[
        Target(
            f"products of a layer and the head for 1 to 64 rows{kind}: share of the copy bandwidth",
            lambda case, bits=bits: case.facts.get("bits") == bits,
            bandwidth_share,
            0.85,
            True,
            "of it",
        )
        for bits, kind in ((16, ""), (8, ", e4m3 weights"))
    ],
    Target(
        "pool, conv and prune of 2880 x 4096 and larger: share of the copy bandwidth",
        lambda case: _wide(case, "pool_tokens", "conv_tokens", "prune_tokens"),
        bandwidth_share,
        0.8,
        True,
        "of it",
    ),
    Target(
        "resample of 2880 x 4096 and larger: time over the floor",
        lambda case: _wide(case, "resample_tokens"),
        over_floor,
        1.5,
        False,
        "floors",
    ),
)
