"""Times the kernels on the GPU at hand against its copy bandwidth, against plain torch, and against targets.

    python -m bench.kernels [--out bench/results] [--seconds 420] [--only OP ...]

First every op is held against its reference at every shape, on random data, a cache with NaN where nobody may read;
if one is wrong, nothing is timed. A measurement is a CUDA graph that runs the op over many layers (or places in
caches, or batches of logits) in turn, as a decoder does: the host's share is out of it, and all is read from memory,
not from a cache. What compiles for long (other people's kernels, other cuts of ours) comes after all cases. Lines go
to kernels.jsonl as they come, the plot at the end; the last lines say which targets are met. When the time is over the
rest stays unmeasured, and is said to be. Without a GPU it prints what can be computed, and writes nothing.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench.kernels import report
from bench.kernels.attention import attention_cases
from bench.kernels.cache import cache_cases
from bench.kernels.draws import draw_cases
from bench.kernels.growth import growth_cases
from bench.kernels.layers import layer_cases
from bench.kernels.losses import loss_cases
from bench.kernels.registry import Call, Case, Ceilings, Measurement, Place, Timing, UnavailableError, WrongError
from bench.kernels.targets import Verdict, standings
from bench.kernels.timing import Timer, ceilings, timed
from bench.kernels.tokens import token_cases
from bench.machine import machine

#: What floors are computed with where there is no GPU, an H200's: bytes a second that it copies with, and the bf16
#: operations a second of its datasheet.
COMPUTED_BANDWIDTH, COMPUTED_RATE = 4.3e12, 990e12


def cases() -> list[Case]:
    """Every op at every shape."""
    return [
        *attention_cases(),
        *draw_cases(),
        *cache_cases(),
        *layer_cases(),
        *growth_cases(),
        *token_cases(),
        *loss_cases(),
    ]


def wrong_ones(chosen: Sequence[Case], place: Place) -> list[str]:
    """The gate: what every case's check has to complain of."""
    found = []
    for case in chosen:
        try:
            case.prepare(place).check()
        except WrongError as error:
            found.append(f"{case.name}: {error}")
    return found


def measure(case: Case, place: Place, timer: Timer) -> tuple[Measurement, bool]:
    """Times a case and its quick baselines; the second result: whether it has slow ones."""
    problem = case.prepare(place)
    kernel = timer(problem.run, problem.turns)
    baselines = {name: time_of(make, problem.turns, timer) for name, make in problem.baselines.items()}
    return Measurement(case, kernel, baselines), bool(problem.slow)


def with_slow(measured: Measurement, place: Place, timer: Timer) -> Measurement:
    """A measurement with the slow baselines of its case."""
    problem = measured.case.prepare(place)
    slow = {name: time_of(make, problem.turns, timer) for name, make in problem.slow.items()}
    return replace(measured, baselines={**measured.baselines, **slow})


def time_of(make: Callable[[], Call], turns: int, timer: Timer) -> Timing | str:
    """A baseline's time, or why there is none: another's compiler may fail in any way, and that is told, not hidden."""
    try:
        return timer(make(), turns)
    except UnavailableError as error:
        return f"not available: {error}"
    except WrongError as error:
        return f"wrong: {error}"
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        return f"failed: {type(error).__name__}: {lines[0][:120]}"


def compute(chosen: Sequence[Case]) -> None:
    """Without a GPU: bytes and floors, marked as what they are."""
    print(
        "No CUDA device here: nothing is measured. COMPUTED from shapes alone, floors at "
        f"{COMPUTED_BANDWIDTH / 1e12:g} TB/s and {COMPUTED_RATE / 1e12:g} TFLOP/s:\n"
    )
    print(report.COMPUTED_HEAD)
    for case in chosen:
        print(report.computed_row(case, COMPUTED_BANDWIDTH, COMPUTED_RATE))
    print()
    for standing in standings(chosen, [], None):
        print(standing.line())


def run(
    chosen: Sequence[Case], place: Place, out: Path, seconds: float, timer: Timer, best: Callable[[], Ceilings]
) -> int:
    """Gate, measurements, files and targets; 1 where an op is wrong or a target missed, else 0."""
    ends = time.monotonic() + seconds
    wrong = wrong_ones(chosen, place)
    if wrong:
        print("Wrong, so nothing is timed:", *wrong, sep="\n  ")
        return 1
    limits, about = best(), machine()
    print(
        f"All {len(chosen)} cases are right. {about['gpu']}: copies at {limits.bandwidth / 1e12:.2f} TB/s, bf16 "
        f"products at {limits.rate / 1e12:.0f} TFLOP/s, a launch {1e6 * limits.launch:.1f} µs\n\n{report.HEAD}"
    )
    measured: dict[str, Measurement] = {}
    out.mkdir(parents=True, exist_ok=True)
    with (out / "kernels.jsonl").open("w") as file:
        report.write_line(file, about | {"cuda": torch.version.cuda} | {"ceilings": asdict(limits)})

        def tell(found: Measurement) -> None:
            measured[found.case.name] = found
            print(report.row(found, limits), flush=True)
            report.write_line(file, report.as_json(found, limits))

        later: list[str] = []
        with contextlib.suppress(KeyboardInterrupt):  # who waits no longer gets what there is
            for case in chosen:
                if time.monotonic() > ends:
                    break
                found, has_slow = measure(case, place, timer)
                tell(found)
                later += [case.name] * has_slow
            while later and time.monotonic() < ends:
                tell(with_slow(measured[later[0]], place, timer))
                later.pop(0)
        standing = standings(chosen, list(measured.values()), limits)
        report.write_line(file, {"targets": [report.standing_as_json(each) for each in standing]})
    if len(measured) < len(chosen) or later:
        print(
            f"\nStopped before the end: of {len(chosen)} cases {len(chosen) - len(measured)} are not measured, "
            f"{len(later)} lack their slow baselines"
        )
    if not report.plot(list(measured.values()), limits, f"{about['gpu']}, {about['commit']}", out / "kernels.png"):
        print("\nNo plot: matplotlib cannot be imported")
    print()
    for each in standing:
        print(each.line())
    return int(any(each.verdict == Verdict.MISSED for each in standing))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status: 1 where an op is wrong or a target missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="where files go")
    parser.add_argument("--seconds", type=float, default=420.0, help="no case is begun later than this")
    parser.add_argument("--only", nargs="+", metavar="OP", help="these ops alone")
    options = parser.parse_args(arguments)
    known = cases()
    unknown = sorted(set(options.only or ()) - {case.op for case in known})
    if unknown:
        parser.error(f"--only: expected ops among {', '.join(sorted({case.op for case in known}))}, got {unknown[0]}")
    chosen = [case for case in known if options.only is None or case.op in options.only]
    if not torch.cuda.is_available():
        compute(chosen)
        return 0
    torch.manual_seed(0)
    return run(chosen, Place(torch.device("cuda")), options.out, options.seconds, timed, ceilings)


if __name__ == "__main__":
    sys.exit(main())
