"""Which implementation serves a call: the Triton kernel or the plain torch reference.

CUDA and HIP tensors always take the kernel. CPU tensors take the reference, or the kernel in Triton's
interpreter when the process was started with ``TRITON_INTERPRET=1``. Nothing else is tried: a kernel that
cannot run raises.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.runtime.driver import driver

#: Read once, as Triton itself does when a kernel is decorated.
INTERPRETED: bool = triton.knobs.runtime.interpret


def takes_kernel(name: str, x: torch.Tensor) -> bool:
    """True when a call on `x`, the argument `name`, runs the Triton kernel, False when it runs the reference.

    Raises:
        ValueError: `x` lies on a device that is neither CUDA (or HIP) nor CPU.
    """
    if x.device.type == "cuda":
        return True
    if x.device.type == "cpu":
        return INTERPRETED
    raise ValueError(f"{name}: expected a tensor on a cuda or cpu device, got {x.device}")


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the GPU that holds `x` the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def compute_capability() -> int:
    """Ten times the major plus the minor number of the current GPU's compute capability; 0 where it is not NVIDIA's."""
    return 0 if INTERPRETED else _compute_capability(driver.active.get_current_device())


@functools.cache  # asking costs microseconds, in every layer
def _compute_capability(device: object) -> int:
    target = driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def kernel_operator(name: str, launch: Callable[..., Any]) -> torch.library.CustomOpDef:
    """Registers a launcher as the operator ``torch.ops.specvlm_kernels.<name>``, which `torch.compile` does not enter.

    It serves the tensors that take a kernel. `launch` gets the tensor that names the device first, and writes into
    none of its arguments. The caller adds the shapes (`register_fake`) and, where there is one, the gradient.
    """

    @functools.wraps(launch)
    def run(x: torch.Tensor, *args: Any) -> Any:
        with on_device(x):
            return launch(x, *args)

    devices = ("cuda", "cpu") if INTERPRETED else ("cuda",)
    return torch.library.custom_op(f"specvlm_kernels::{name}", run, mutates_args=(), device_types=devices)
