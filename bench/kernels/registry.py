"""What a benchmark of the kernels consists of: cases, and the problems that they become on a device.

A case knows what its op cannot help reading, writing and computing, from its shape alone: so floors are known on a
machine without a GPU. Tensors, the check against the reference and what is compared with come when it is prepared.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[int], object]


class WrongError(Exception):
    """An op is wrong: the time of a wrong answer is of no use."""


class UnavailableError(Exception):
    """A baseline cannot be had on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where problems are made.

    Attributes:
        device: of all tensors.
        rotation_bytes: what a measurement walks through before it comes back: several times any L2 cache.
        most_turns: the most calls that it makes of this.
        compiled: what makes a fast function of a plain one; called with the function, and options by keyword.
    """

    device: torch.device
    rotation_bytes: int = 1 << 30
    most_turns: int = 256
    compiled: Callable[..., Callable[..., Any]] = torch.compile

    def turns(self, size: int) -> int:
        """How many problems of `size` bytes to walk through, 2 at least."""
        return max(2, min(self.most_turns, -(-self.rotation_bytes // size)))

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def int32(self, values: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


@dataclass(frozen=True, slots=True)
class Problem:
    """A case's tensors, in closures.

    Attributes:
        check: raises `WrongError` where the op is wrong.
        run: the op on the i-th set of tensors.
        turns: how many sets there are.
        baselines: by name, what makes a call of the same meaning; it may raise `UnavailableError`.
        slow: likewise; to make one takes many seconds, so they come when all else is measured.
    """

    check: Callable[[], None]
    run: Call
    turns: int
    baselines: Mapping[str, Callable[[], Call]]
    slow: Mapping[str, Callable[[], Call]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """One op at one shape.

    Attributes:
        op: its name in `specvlm_kernels`.
        shape: in words.
        bytes: what it cannot help reading and writing, each once.
        prepare: makes the problem on a device.
        flops: what the tensor cores cannot help computing.
        facts: the shape in numbers: what targets choose cases by.
    """

    op: str
    shape: str
    bytes: int
    prepare: Callable[[Place], Problem]
    flops: int = 0
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op}, {self.shape}"


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device does at its best, measured in the same run.

    Attributes:
        bandwidth: bytes a second that a large copy reads and writes.
        rate: bf16 operations a second of a large matrix product.
        launch: seconds that a kernel which does nothing takes in a graph.
    """

    bandwidth: float
    rate: float
    launch: float

    def floor(self, case: Case) -> float:
        """Seconds that the case cannot beat: its bytes, or its operations."""
        return max(case.bytes / self.bandwidth, case.flops / self.rate)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: median and the tenth and ninetieth percentile."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """A case's times.

    Attributes:
        baselines: by name, the time, or why there is none.
    """

    case: Case
    kernel: Timing
    baselines: Mapping[str, Timing | str]


def require(fits: bool | torch.Tensor, message: str) -> None:
    """Raises `WrongError` where something does not hold."""
    if not bool(fits):
        raise WrongError(message)


def require_close(name: str, out: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """At most twice the error of plain torch in the same dtype: of the worst number but for a few roundings, of all
    together but for one."""
    eps, off, usual = torch.finfo(out.dtype).eps, (out - exact).abs(), (plain - exact).abs()
    error, other, floor = off.max(), usual.max(), 4 * eps * (1 + exact.abs().max())
    require(error <= 2 * other + floor, f"{name} is off by {error:.3g}")
    error, other, floor = off.norm(), usual.norm(), eps * exact.norm()
    require(error <= 2 * other + floor, f"{name} is off by {error / exact.norm():.3g} of its norm")
