"""Times whole decoding in full size, of LLaVA-1.5 with random weights, against this GPU's copy bandwidth and targets.

    python -m bench.decode [--model 7b 13b] [--out bench/results] [--seconds 420] [--profiles DIR]

Figures are printed and written to decode-MODEL.jsonl as they come, what matters most first; the plot comes at the end,
then which targets are met, then one line of JSON. Every figure says what it is of: random weights, whose values no time
hangs on; replayed acceptance, where a draft that costs what an EAGLE head costs knows the answer and lies at a set
rate; or the demo, widened to that size, whose head accepts as it does. When the time is over the rest stays unmeasured.

`--model tiny` runs all of it on a CPU, to see that it runs; it has no targets. Without a GPU, and without that, it
prints what can be computed, and writes nothing.
"""

import argparse
import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from bench import floors
from bench.decode import host, memory, replay, report, rounds, speeds, widened
from bench.decode.figures import Figure, Found
from bench.decode.models import SIZES, Size, random_subject
from bench.decode.run import Run, limits_of
from bench.decode.targets import Verdict, standings
from bench.kernels.report import write_line
from bench.machine import machine

Section = Callable[[Run], Iterator[Figure]]

#: Parts of a run, what matters most first: memory before transformers takes any; the profiler, which may slow what
#: comes behind it, and a compiler that takes minutes last.
SECTIONS: tuple[Section, ...] = (
    speeds.autoregressive,
    rounds.verification,
    rounds.whole_rounds,
    memory.memory,
    speeds.transformers_eager,
    replay.replayed,
    widened.widened_demo,
    host.host_side,
    speeds.transformers_compiled,
)


def figures_of(
    make: Callable[[], Run], name: str, sections: Sequence[Section], failed: list[str], late: Callable[[], bool]
) -> Iterator[Figure]:
    """The figures of one model; a section that fails is told with its traceback, and the others go on.

    When it is `late`, nothing more is begun.
    """
    if late():
        return
    try:
        run = make()
    except Exception:
        traceback.print_exc()
        failed.append(f"{name}: making it")
        return
    for section in sections:
        if late():
            return
        try:
            yield from section(run)
        except Exception:
            traceback.print_exc()
            failed.append(f"{name}: {section.__name__}")


def measure(
    sizes: Sequence[Size], sections: Sequence[Section], out: Path, seconds: float, profiles: Path | None
) -> int:
    """Figures, files and targets; 1 where a section failed or a target is missed, else 0.

    Args:
        sizes: models, one after the other.
        sections: what each is measured in.
        out: the files' path, without what they end in.
        seconds: no figure is begun later than this.
        profiles: the folder that profiles stay in; None: they do not.
    """
    began, found, failed = time.monotonic(), Found(), list[str]()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth, rate = limits_of(device)
    about = machine() | {"cuda": torch.version.cuda, "bandwidth": bandwidth, "rate": rate}
    print(f"{about['gpu'] or about['cpu']}: copies at {bandwidth / 1e12:.3g} TB/s\n\n{report.HEAD}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)

    def run_of(size: Size) -> Run:
        memory.begin()  # what is left of the model before
        subject = random_subject(size, device)
        memory.begin()
        return Run(subject, bandwidth, rate, found, profiles)

    def late() -> bool:
        nonlocal stopped
        stopped = time.monotonic() - began > seconds
        return stopped

    stopped = False
    with Path(f"{out}.jsonl").open("w") as file:
        write_line(file, about)
        with contextlib.suppress(KeyboardInterrupt):  # who waits no longer gets what there is
            for size in sizes:
                for figure in figures_of(lambda size=size: run_of(size), size.name, sections, failed, late):
                    found.figures.append(figure)
                    print(report.row(figure), flush=True)
                    passed = round(time.monotonic() - began, 1)
                    write_line(file, report.as_json(figure) | {"seconds": passed})
                    if stopped := passed > seconds:
                        break
        standing = standings(sizes, found)
        write_line(file, {"targets": [report.standing_as_json(each) for each in standing], "failed": failed})
    if stopped:
        print("\nStopped before the end: the time is over")
    if failed:
        print("\nFailed:", *failed, sep="\n  ")
    if not report.plot(sizes, found, f"{about['gpu'] or about['cpu']}, {about['commit']}", Path(f"{out}.png")):
        print("\nNo plot: matplotlib cannot be imported")
    print()
    for each in standing:
        print(each.line())
    print(json.dumps(about | {"figures": len(found.figures), "failed": failed}))
    return int(bool(failed) or any(each.verdict == Verdict.MISSED for each in standing))


def compute(sizes: Sequence[Size]) -> None:
    """Without a GPU: floors, marked as what they are, and what is unmeasured."""
    print("No CUDA device here: nothing is measured.\n")
    floors.main()
    print()
    for each in standings(sizes, Found()):
        print(each.line())
    print(json.dumps(machine() | {"measured": False}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status: 1 where something failed or a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=SIZES, default=["7b", "13b"], help="sizes, one after the other")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="where files go")
    parser.add_argument("--seconds", type=float, default=420.0, help="no figure is begun later than this")
    parser.add_argument("--profiles", type=Path, metavar="DIR", help="a folder that profiles are to stay in")
    options = parser.parse_args(arguments)
    sizes = [SIZES[name] for name in options.model]
    if not torch.cuda.is_available() and any(size.judged for size in sizes):
        compute(sizes)
        return 0
    return measure(
        sizes, SECTIONS, options.out / "-".join(["decode", *options.model]), options.seconds, options.profiles
    )


if __name__ == "__main__":
    sys.exit(main())
