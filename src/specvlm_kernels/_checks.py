"""One place that turns a bad tensor into a ValueError naming the argument, what was expected and what came.

Shape, dtype and device are checked on every device. Values are looked at on CPU only: on a GPU that would
cost a synchronisation, and the kernels clamp what they address by.
"""

from collections.abc import Sequence

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(
    name: str,
    x: object,
    shape: Sequence[int | str | None],
    dtype: torch.dtype | Sequence[torch.dtype],
    device: torch.device | None = None,
) -> torch.Tensor:
    """Checks that `x` is a tensor of `shape`, `dtype` and `device`, and returns it.

    Args:
        name: the argument's name, for the message.
        shape: one entry a dimension: a size, or a name (or None) for a size that is free.
        dtype: the dtype, or the dtypes, allowed.
        device: where it must lie; None: anywhere.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")
    fits = x.ndim == len(shape) and all(
        not isinstance(want, int) or want == got for want, got in zip(shape, x.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(x.shape)}")
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    if x.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name}: expected dtype {wanted}, got {str(x.dtype).removeprefix('torch.')}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {x.device}")
    return x


def check_range(name: str, x: torch.Tensor, low: int, high: int) -> None:
    """Checks low <= x < high for every element of a CPU tensor; a GPU tensor passes unread."""
    if x.device.type == "cpu" and x.numel() and (int(x.min()) < low or int(x.max()) >= high):
        raise ValueError(f"{name}: expected values in [{low}, {high}), got [{int(x.min())}, {int(x.max())}]")
