"""What a machine with a GPU is asked for, in stages of less than 8 minutes.

    python3 -m bench.gpu_check STAGE [ARGS]

    kernels     the kernels' tests, then their benchmark, which ends in which targets are met
    exact       every other test that needs a GPU: answers, states and graphs against transformers
    decode      the benchmark of whole decoding in full size, likewise
    sanitize    compute-sanitizer's memcheck and racecheck over one run of every kernel

ARGS go to the stage's benchmark, or else to pytest: ``decode --model 7b --out DIR --profiles DIR/profiles``.
Runs with the python3 and the packages that are there and installs nothing. The exit status is 1 where anything failed.
"""

import importlib.util
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch

#: Seconds: of a stage, of its tests, and what a step is given to end by itself after it was asked to.
STAGE_SECONDS, TEST_SECONDS, GRACE = 470.0, 200.0, 20.0

#: Tests compile far more than they compute.
WORKERS = "8"


def step(name: str, command: Sequence[str], seconds: float) -> bool:
    """Runs one command, interrupted when its time is over; whether it succeeded."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    began = time.monotonic()
    process = subprocess.Popen(command)
    try:
        status = process.wait(max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            status = process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        print(f"== {name}: out of time after {seconds:.0f} s", flush=True)
        status = status or 1
    print(f"== {name}: {'passed' if status == 0 else f'failed, status {status}'}, {time.monotonic() - began:.0f} s")
    return status == 0


def tests(*where: str) -> list[str]:
    """The command that runs the GPU's tests there."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", *where]
    return command + ["-n", WORKERS] * (importlib.util.find_spec("xdist") is not None)


def benchmark(name: str, began: float, options: Sequence[str]) -> bool:
    """Runs a benchmark for what is left of the stage; it looks at the clock in between."""
    left = STAGE_SECONDS - (time.monotonic() - began)
    # The interrupt is for a compiler that takes longer than the benchmark.
    command = [sys.executable, "-m", name, "--seconds", f"{left - 2 * GRACE:.0f}", *options]
    return step("benchmark", command, left - GRACE)


def kernels(options: Sequence[str]) -> bool:
    """Tests first; the benchmark's own gate stands before its figures, so it runs in any case."""
    began = time.monotonic()
    passed = step("GPU tests", tests("tests/kernels"), TEST_SECONDS)
    return benchmark("bench.kernels", began, options) and passed


def exact(options: Sequence[str]) -> bool:
    """All but the kernels'."""
    return step("GPU tests", [*tests("tests"), "--ignore", "tests/kernels", *options], STAGE_SECONDS)


def decode(options: Sequence[str]) -> bool:
    """A benchmark alone, which needs all the time there is; `exact` says whether what it times is right."""
    return benchmark("bench.decode", time.monotonic(), options)


def sanitize(options: Sequence[str]) -> bool:
    """The tests that need minutes each are marked slow, and left to this stage."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu and slow", "tests/kernels/test_sanitizer.py"]
    return step("compute-sanitizer", [*command, *options], STAGE_SECONDS)


STAGES: dict[str, Callable[[Sequence[str]], bool]] = {
    "kernels": kernels,
    "exact": exact,
    "decode": decode,
    "sanitize": sanitize,
}


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 done, 1 something failed, 2 no such stage or no GPU."""
    if not arguments or arguments[0] not in STAGES:
        print(f"STAGE: expected {' or '.join(STAGES)}, got {' '.join(arguments) or 'nothing'}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(
            "gpu-check: expected a CUDA device, found none; `python -m bench.kernels` and `bench.decode` print floors",
            file=sys.stderr,
        )
        return 2
    return int(not STAGES[arguments[0]](arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
