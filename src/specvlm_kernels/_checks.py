"""One place that turns a bad tensor into a ValueError naming the argument, what was expected and what came.

Shape, dtype and device are checked on every device. Values are looked at on CPU only: on a GPU that would
cost a synchronisation, and the kernels clamp what they address by. While `torch.compile` traces there are none yet: the
operator that it puts in its graph looks at them when it runs.
"""

import math
from collections.abc import Callable, Sequence

import torch

#: What the kernels compute in; the references, and a cache whose rows are only moved, take fp64 too.
KERNEL_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOATS = (*KERNEL_FLOATS, torch.float64)

INTEGERS = (torch.int32, torch.int64)


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
    # Plain loops and few objects: a decoder comes through here in every layer.
    got = x.shape
    fits = len(got) == len(shape)
    if fits and got != shape:
        for want, size in zip(shape, got, strict=True):
            if want != size and isinstance(want, int):
                fits = False
    if not fits:
        wanted = ", ".join("*" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(got)}")
    if x.dtype is not dtype and (isinstance(dtype, torch.dtype) or x.dtype not in dtype):
        dtypes = (dtype,) if isinstance(dtype, torch.dtype) else dtype
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name}: expected dtype {wanted}, got {str(x.dtype).removeprefix('torch.')}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {x.device}")
    return x


def readable(x: torch.Tensor) -> bool:
    """Whether the values of `x` are looked at."""
    return x.is_cpu and not torch.compiler.is_compiling()


def check_range(name: str, x: torch.Tensor, low: int, high: int) -> None:
    """Checks low <= x < high for every element of a CPU tensor; a GPU tensor passes unread."""
    if readable(x) and (count := x.numel()):
        # A length or two is quicker to look at as numbers.
        values = x.flatten().tolist() if count <= 16 else [int(bound) for bound in x.aminmax()]
        least, most = min(values), max(values)
        if least < low or most >= high:
            raise ValueError(f"{name}: expected values in [{low}, {high}), got [{least}, {most}]")


def check_whole(name: str, x: object, low: int, high: int, step: int = 1) -> None:
    """Checks that `x` is a whole number from `low` to `high`, and a multiple of `step`."""
    if not isinstance(x, int) or not low <= x <= high or x % step:
        kind = "whole number" if step == 1 else f"multiple of {step}"
        raise ValueError(f"{name}: expected a {kind} from {low} to {high}, got {x!r}")


def check_grid(name: str, grid: object, tokens: int) -> None:
    """Checks that `grid` is a height and a width of at least 1 that hold `tokens` tokens."""
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or not all(isinstance(n, int) and n >= 1 for n in grid):
        raise ValueError(f"{name}: expected a height and a width, whole numbers of at least 1, got {grid!r}")
    height, width = grid
    if height * width != tokens:
        raise ValueError(f"{name}: expected height * width = {tokens}, got {height} * {width}")


def check_finite(name: str, x: object) -> None:
    """Checks that `x` is a number, and neither infinite nor NaN."""
    if not isinstance(x, (int, float)) or not -math.inf < x < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {x!r}")


def check_forward_only(**tensors: torch.Tensor) -> None:
    """Checks that nobody waits for a gradient through these tensors: a kernel gives none."""
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if x.requires_grad:
                raise ValueError(
                    f"{name}: expected a tensor that needs no gradient, or torch.no_grad(), since the kernel is "
                    "forward only; got requires_grad=True"
                )


def check_rows_contiguous(name: str, x: torch.Tensor) -> None:
    """Checks that neighbours on the last axis are neighbours in memory; the other strides are free."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name}: expected a contiguous last axis, got strides {list(x.stride())}")


def check_parents(parents: torch.Tensor) -> None:
    """Checks -1 <= parents[b, i] < i on a CPU tensor [B, N]; a GPU tensor passes unread."""
    if not readable(parents):
        return
    if parents.shape[1:] != (1,):
        bad = (parents >= torch.arange(parents.shape[1], dtype=torch.int32)) | (parents < -1)
        if bad.any():
            i_b, i = bad.nonzero()[0].tolist()
            raise ValueError(f"parents: expected parents[b, i] in [-1, i), got parents[{i_b}, {i}] = {parents[i_b, i]}")
    else:  # trees of one node, which autoregressive decoding sends every round
        for i_b, (parent,) in enumerate(parents.tolist()):
            if parent != -1:
                raise ValueError(f"parents: expected parents[b, i] in [-1, i), got parents[{i_b}, 0] = {parent}")


def check_path(path: torch.Tensor, length: torch.Tensor) -> None:
    """Checks 1 <= path[b, 0] < path[b, 1] < ... up to length[b] on CPU tensors; GPU tensors pass unread."""
    if readable(path):
        for nodes, count in zip(path.tolist(), length.tolist(), strict=True):
            taken = nodes[:count]
            if any(low >= high for low, high in zip([0, *taken], taken, strict=False)):
                raise ValueError(f"path: expected node indices that ascend from at least 1, got {taken}")


def check_setting(
    name: str,
    x: object,
    batch: int,
    device: torch.device,
    dtype: torch.dtype | Sequence[torch.dtype],
    expected: str,
    fits: Callable[[float], bool],
) -> None:
    """Checks a sampling setting: a number, or a [batch] tensor on `device`, whose values all satisfy `fits`.

    Args:
        expected: what `fits` asks for, in words, for the message.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if isinstance(x, torch.Tensor):
        check_tensor(name, x, (batch,), dtype, device)
        values = x.tolist() if readable(x) else []
    elif isinstance(x, (int, float)):
        values = [x]
    else:
        raise ValueError(f"{name}: expected a number or a [{batch}] tensor, got {type(x).__name__}")
    for value in values:
        if not fits(value):
            raise ValueError(f"{name}: expected {expected}, got {value}")


def check_sampling(
    temperature: object, top_k: object, top_p: object, seed: object, batch: int, device: torch.device
) -> None:
    """Checks the settings of a draw, each a number or a [batch] tensor, and the seeds.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    check_setting(
        "temperature", temperature, batch, device, torch.float32, "a finite number >= 0", lambda t: 0 <= t < math.inf
    )
    check_setting("top_k", top_k, batch, device, INTEGERS, "a whole number >= 0", lambda k: k >= 0 and k % 1 == 0)
    check_setting("top_p", top_p, batch, device, torch.float32, "a number in (0, 1]", lambda p: 0 < p <= 1)
    if seed is not None:
        check_tensor("seed", seed, (batch,), torch.int64, device)
    elif isinstance(temperature, torch.Tensor):
        if not temperature.is_cpu or (readable(temperature) and bool((temperature > 0).any())):
            raise ValueError(f"seed: expected a [{batch}] int64 tensor where temperature may be above 0, got None")
    elif isinstance(temperature, (int, float)) and temperature > 0:
        raise ValueError(f"seed: expected a [{batch}] int64 tensor where temperature may be above 0, got None")
