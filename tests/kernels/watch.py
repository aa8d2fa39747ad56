"""What shows that a kernel ran, and that it wrote everything it returns."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

WILD = -77_777_777


@contextlib.contextmanager
def launched(*kernels: Any) -> Iterator[None]:
    """Within it every one of `kernels` has to be launched, and what an op allocates starts as NaN, or as `WILD`."""
    launches = dict.fromkeys(kernels, 0)
    empty = torch.empty

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        out = empty(*args, **options)
        return out.fill_(math.nan if out.is_floating_point() else WILD)

    def counting(kernel: Any) -> Any:
        run = kernel.run

        def counted(*args: Any, **options: Any) -> Any:
            launches[kernel] += 1
            return run(*args, **options)

        return mock.patch.object(kernel, "run", counted)

    with contextlib.ExitStack() as stack:
        for kernel in kernels:
            stack.enter_context(counting(kernel))
        stack.enter_context(mock.patch.object(torch, "empty", poisoned))
        yield
    missing = [kernel.__name__ for kernel, count in launches.items() if count == 0]
    assert not missing, f"not launched: {missing}"
