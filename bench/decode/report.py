"""What a run says: a table as it comes, JSON lines, a plot."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.decode import replay, rounds, speeds
from bench.decode.figures import Figure, Found
from bench.decode.models import HEADS, Size
from bench.decode.run import PARTS
from bench.decode.targets import Standing
from specvlm.tree import BUCKETS

HEAD = "| of | model | part | figure | median | p10 to p90 | unit | facts |\n|---|---|---|---|--:|--:|---|---|"


def row(figure: Figure) -> str:
    """A figure as a line of the table."""
    value = "none" if figure.value is None else f"{figure.value:.4g}"
    spread = "" if figure.p10 is None else f"{figure.p10:.4g} to {figure.p90:.4g}"
    facts = "; ".join(f"{name}: {_told(fact)}" for name, fact in figure.facts.items())
    return (
        f"| {figure.kind} | {figure.model} | {figure.section} | {figure.name} | {value} | {spread} | {figure.unit} "
        f"| {facts} |"
    )


def _told(fact: float | str | bool) -> str:
    return f"{fact:.4g}" if isinstance(fact, float) else str(fact)


def as_json(figure: Figure) -> dict[str, Any]:
    return asdict(figure)


def standing_as_json(standing: Standing) -> dict[str, Any]:
    return {
        "target": standing.target.name,
        "model": standing.model,
        "verdict": standing.verdict.value,
        "bound": standing.target.bound,
        "value": standing.value,
        "figure": standing.figure,
    }


def plot(sizes: Sequence[Size], found: Found, title: str, path: Path) -> bool:
    """A row of plots a model. False: there is no matplotlib here."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(len(sizes), 4, figsize=(20, 4 * len(sizes)), layout="constrained", squeeze=False)
    for size, (speed, curve, parts, speedup) in zip(sizes, rows, strict=True):
        _speeds(speed, size.name, found)
        _curve(curve, size.name, found)
        _parts(parts, size.name, found)
        _speedup(speedup, size.name, found)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _speeds(axes: Any, model: str, found: Found) -> None:
    values = {
        name: found.value(model, speeds.SECTION, name) for name in (speeds.HF_EAGER, speeds.HF_STATIC, speeds.OURS)
    }
    known = {name: value for name, value in values.items() if value is not None}
    axes.barh(list(known), list(known.values()))
    axes.set(title=f"{model}, random weights: AR", xlabel="tokens a second, decode only")


def _curve(axes: Any, model: str, found: Found) -> None:
    times = {nodes: found.value(model, rounds.VERIFY, rounds.name_of(nodes)) for nodes in BUCKETS}
    known = {nodes: value for nodes, value in times.items() if value is not None}
    axes.plot(list(known), list(known.values()), marker="o")
    if 1 in known:
        axes.axhline(1.1 * known[1], color="grey", linewidth=0.8, linestyle="--", label="1.10 x one node")
        axes.legend()
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set(title=f"{model}, random weights: verify", xlabel="nodes", ylabel="ms")


def _parts(axes: Any, model: str, found: Found) -> None:
    for name in HEADS:
        left = 0.0
        for number, part in enumerate(PARTS):
            width = found.value(model, rounds.ROUND, f"{name}, {part}") or 0.0
            axes.barh(name, width, left=left, color=f"C{number}", label=part if name == next(iter(HEADS)) else None)
            left += width
    if step := found.value(model, rounds.ROUND, rounds.STEP):
        axes.barh(rounds.STEP, step, color="grey")
    axes.legend()
    axes.set(title=f"{model}, random weights: a round", xlabel="ms")


def _speedup(axes: Any, model: str, found: Found) -> None:
    for head in HEADS:
        ratios = {tau: found.value(model, replay.SECTION, replay.over_ar(tau, head)) for tau in replay.TAUS}
        known = {tau: ratio for tau, ratio in ratios.items() if ratio is not None}
        axes.plot(list(known), list(known.values()), marker="o", label=head)
    low, high = axes.get_ylim()
    for name, tau in replay.PUBLISHED.items():
        axes.axvline(tau, color="grey", linewidth=0.8, linestyle=":")
        axes.text(tau, high, f"{name} ", rotation=90, va="top", ha="right", fontsize=6)
    axes.set_ylim(low, high)
    axes.legend()
    axes.set(title=f"{model}, replayed acceptance", xlabel="tau, published ones dotted", ylabel="speedup over AR")
