"""What a run says: a table as it comes, JSON lines, a plot; and without a GPU what can be computed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from bench.kernels.registry import Case, Ceilings, Measurement, Timing
from bench.kernels.targets import Standing, bandwidth_share

HEAD = (
    "| op | shape | µs | p10 to p90 | GB/s | of copy bandwidth | over the floor | baselines, µs |\n"
    "|---|---|--:|--:|--:|--:|--:|---|"
)
COMPUTED_HEAD = "| op | shape | bytes | tensor-core operations | floor, µs |\n|---|---|--:|--:|--:|"


def row(measured: Measurement, ceilings: Ceilings) -> str:
    """A measured case as a line of the table."""
    case, kernel = measured.case, measured.kernel
    baselines = "; ".join(f"{name}: {told(time, kernel)}" for name, time in measured.baselines.items())
    return (
        f"| {case.op} | {case.shape} | {1e6 * kernel.median:.1f} | {1e6 * kernel.p10:.1f} to {1e6 * kernel.p90:.1f} "
        f"| {case.bytes / kernel.median / 1e9:.0f} | {bandwidth_share(measured, ceilings):.0%} "
        f"| {kernel.median / ceilings.floor(case):.2f} | {baselines} |"
    )


def told(time: Timing | str, kernel: Timing) -> str:
    """A baseline's time and how often ours fits into it, or why it has none."""
    return time if isinstance(time, str) else f"{1e6 * time.median:.1f} ({time.median / kernel.median:.2f}x)"


def computed_row(case: Case, bandwidth: float, rate: float) -> str:
    """A case that nobody measured: what follows from its shape."""
    floor = max(case.bytes / bandwidth, case.flops / rate)
    return f"| {case.op} | {case.shape} | {case.bytes} | {case.flops or ''} | {1e6 * floor:.2f} |"


def as_json(measured: Measurement, ceilings: Ceilings) -> dict[str, Any]:
    """A measured case; times in seconds."""
    case = measured.case
    return {
        "op": case.op,
        "shape": case.shape,
        "facts": dict(case.facts),
        "bytes": case.bytes,
        "flops": case.flops,
        "floor": ceilings.floor(case),
        "kernel": asdict(measured.kernel),
        "baselines": {
            name: time if isinstance(time, str) else asdict(time) for name, time in measured.baselines.items()
        },
    }


def standing_as_json(standing: Standing) -> dict[str, Any]:
    return {
        "target": standing.target.name,
        "verdict": standing.verdict.value,
        "bound": standing.target.bound,
        "worst": standing.worst,
        "where": standing.where,
        "measured": standing.measured,
        "cases": standing.cases,
    }


def write_line(file: TextIO, what: Mapping[str, Any]) -> None:
    """One JSON line, on the disk before anything else happens."""
    file.write(json.dumps(what) + "\n")
    file.flush()


def plot(measured: Sequence[Measurement], ceilings: Ceilings, title: str, path: Path) -> bool:
    """A bar a case: its share of the floor that it cannot beat. False: there is no matplotlib here."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [each.case.name for each in measured]
    shares = [ceilings.floor(each.case) / each.kernel.median for each in measured]
    ops = sorted({each.case.op for each in measured})
    colours = [f"C{ops.index(each.case.op) % 10}" for each in measured]
    figure, axes = plt.subplots(figsize=(10, 1 + 0.2 * len(measured)), layout="constrained")
    axes.barh(names, shares, color=colours)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("floor / time: 1 is the copy's bandwidth or the matrix product's rate")
    axes.set_title(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
