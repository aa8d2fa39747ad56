"""What shows that a kernel ran, and that it wrote everything it returns."""

import contextlib
import importlib
import math
import pkgutil
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

import specvlm_kernels

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


def package_kernels() -> set[str]:
    """The names of all kernels of the package, as compiled."""
    names = [f"specvlm_kernels.{module.name}" for module in pkgutil.iter_modules(specvlm_kernels.__path__)]
    members = [x for name in names for x in vars(importlib.import_module(name)).values()]
    return {x.__name__ for x in members if isinstance(x, JITFunction) and x.__name__.endswith("_kernel")}
