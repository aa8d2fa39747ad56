"""How a training goes, for people and for machines: a line a step in metrics.jsonl, and plots of it."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

from specvlm.files import whole
from specvlm.training.distill import Progress

_LOSSES: Final = ("loss", "cross_entropy", "feature")


class Metrics:
    """metrics.jsonl: what every step of a training came to. A run that goes on drops the lines of steps it repeats.

    Args:
        path: the file.
        steps_per_epoch: by which lines are told their epoch.
    """

    def __init__(self, path: Path, steps_per_epoch: int) -> None:
        self._path, self._steps_per_epoch = path, steps_per_epoch
        self._file: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, at: Progress, *, measured: bool) -> None:
        """Adds a step's line, with tau if it was measured there."""
        if self._file is None:
            self._open(at.step)
        numbers = {"loss": at.loss, **at.parts, "agreement": at.agreement, "learning_rate": at.learning_rate}
        line = {"step": at.step, "epoch": round(at.step / self._steps_per_epoch, 4)}
        line |= {name: float(f"{value:.6g}") for name, value in numbers.items()}
        if measured and at.tau is not None:
            line["tau"] = round(at.tau, 4)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _open(self, step: int) -> None:
        kept = [line for line in read_metrics(self._path) if line["step"] < step]
        with whole(self._path) as fresh:
            fresh.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a")


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl, but for one that was broken off; none if there is no file."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def tau_estimate(agreement: float, depth: int) -> float:
    """Tokens a round along a chain of `depth` tokens, each of which is the target's with the chance of `agreement`."""
    return sum(agreement**level for level in range(depth + 1))


def draw_plots(metrics: Path, folder: Path) -> list[Path]:
    """losses.png and, where it was measured, tau.png by epoch.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots: expected matplotlib, which pip install 'specvlm[plots]' brings, got none") from error
    lines = list(read_metrics(metrics))
    drawn = []
    for name, wanted in (("losses", _LOSSES), ("tau", ("tau",))):
        curves = {what: curve for what in wanted if (curve := _curve(lines, what))}
        if not curves:
            continue
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="epoch", ylabel=name)
        for what, curve in curves.items():
            axes.plot(*zip(*curve, strict=True), marker="o" if name == "tau" else None, label=what.replace("_", " "))
        axes.legend()
        with whole(folder / f"{name}.png") as fresh:
            figure.savefig(fresh, format="png", dpi=120)
        drawn.append(folder / f"{name}.png")
    return drawn


def _curve(lines: Iterable[Mapping[str, Any]], what: str) -> list[tuple[float, float]]:
    return [(line["epoch"], line[what]) for line in lines if what in line]
