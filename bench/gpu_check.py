"""What a machine with a GPU is asked for, in stages of less than 8 minutes: ``python3 -m bench.gpu_check STAGE``.

    kernels     the GPU's tests, then the benchmark of the kernels, which ends in which targets are met
    sanitize    compute-sanitizer's memcheck and racecheck over one run of every kernel

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


def kernels() -> bool:
    """Tests first; the benchmark's own gate stands before its figures, so it runs in any case."""
    began = time.monotonic()
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", "tests"]
    if importlib.util.find_spec("xdist"):
        tests += ["-n", WORKERS]
    passed = step("GPU tests", tests, TEST_SECONDS)
    left = STAGE_SECONDS - (time.monotonic() - began)
    # The interrupt is for a compiler that takes longer than the benchmark, which looks at the clock in between.
    command = [sys.executable, "-m", "bench.kernels", "--seconds", f"{left - 2 * GRACE:.0f}"]
    return step("benchmark", command, left - GRACE) and passed


def sanitize() -> bool:
    """The tests that need minutes each are marked slow, and left to this stage."""
    tests = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu and slow", "tests/kernels/test_sanitizer.py"]
    return step("compute-sanitizer", tests, STAGE_SECONDS)


STAGES: dict[str, Callable[[], bool]] = {"kernels": kernels, "sanitize": sanitize}


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 done, 1 something failed, 2 no such stage or no GPU."""
    if len(arguments) != 1 or arguments[0] not in STAGES:
        print(f"STAGE: expected {' or '.join(STAGES)}, got {' '.join(arguments) or 'nothing'}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gpu-check: expected a CUDA device, found none; `python -m bench.kernels` prints floors", file=sys.stderr)
        return 2
    return int(not STAGES[arguments[0]]())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
