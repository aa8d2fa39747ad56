"""Ways to make fewer rows of a picture, over the kernels of `specvlm_kernels.token_pooling`.

Each has an amount: by how much it divides the rows, or, of a resampler, how many it makes. Source: SpecVLM (2025),
section 3.2, with pruning by the question besides its random one.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from specvlm.checks import check_int
from specvlm_kernels import conv_tokens, pool_tokens, prune_tokens, resample_tokens


class Primitive(nn.Module, ABC):
    """One way.

    Args:
        amount: of it.
        hidden_size: width H of the rows.
    """

    def __init__(self, amount: int, hidden_size: int) -> None:
        super().__init__()
        self.amount, self.hidden_size = amount, hidden_size

    @abstractmethod
    def count(self, rows: int) -> int:
        """How many it makes of a picture's `rows`.

        Raises:
            ValueError: it cannot, by name.
        """

    @abstractmethod
    def forward(self, rows: Tensor, features: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [P, R, H] for pictures of one size, and which row [P, R] int64, ascending, each stands in for.

        Args:
            rows: [P, T, H] embeddings.
            features: [P, T, H] the target's there.
            question: [P, H] the target's feature at the end of what was asked.
        """


class Everything(Primitive):
    """Every row."""

    def count(self, rows: int) -> int:
        return rows

    def forward(self, rows: Tensor, features: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        return rows, spaced(rows, rows.shape[1])


class Nothing(Primitive):
    """No row: the draft reads the text alone."""

    def count(self, rows: int) -> int:
        return 0

    def forward(self, rows: Tensor, features: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        return rows[:, :0], spaced(rows, 0)


class Pool(Primitive):
    """Means over squares of the picture's grid whose area is nearest to the amount."""

    def count(self, rows: int) -> int:
        (height, width), stride = _grid(rows), self._stride(rows)
        return -(-height // stride) * -(-width // stride)

    def forward(self, rows: Tensor, features: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        length = rows.shape[1]
        made = pool_tokens(rows.contiguous(), _grid(length), self._stride(length))
        return made, spaced(rows, made.shape[1])

    def _stride(self, rows: int) -> int:
        return self.amount if _grid(rows)[0] == 1 else _side(self.amount)


class Convolve(Primitive):
    """A depthwise convolution over squares of the grid, which begins as their mean."""

    def __init__(self, amount: int, hidden_size: int) -> None:
        super().__init__(amount, hidden_size)
        self._stride = _side(amount)
        self.weight = nn.Parameter(torch.full((hidden_size, self._stride, self._stride), 1 / self._stride**2))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def count(self, rows: int) -> int:
        height, width = _grid(rows)
        if height < self._stride:
            raise ValueError(f"convolve: expected a grid of at least {self._stride} rows, got {height} x {width}")
        return (height // self._stride) * (width // self._stride)

    def forward(self, rows: Tensor, features: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        count = self.count(rows.shape[1])
        made = conv_tokens(rows.contiguous(), _grid(rows.shape[1]), self.weight, self.bias, self._stride)
        return made, spaced(rows, count)


class Prune(Primitive):
    """The rows whose features are most like the question's, as they are."""

    def count(self, rows: int) -> int:
        return -(-rows // self.amount)

    def forward(self, rows: Tensor, features: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        scores = self._scores(features.detach(), question.detach())
        return prune_tokens(rows.contiguous(), scores, self.count(rows.shape[1]))

    def _scores(self, features: Tensor, question: Tensor) -> Tensor:
        return (features * question[:, None]).sum(dim=-1)


class PruneAtRandom(Prune):
    """Rows by chance, the same ones for every picture of a size: the control of the paper."""

    def _scores(self, features: Tensor, question: Tensor) -> Tensor:
        pictures, rows, _ = features.shape
        chance = torch.rand(rows, generator=torch.Generator().manual_seed(rows))
        return chance.to(features).expand(pictures, -1).contiguous()


class Resample(Primitive):
    """A cross-attention of as many learned queries as the amount says.

    Attributes:
        heads: of the attention, each at least 32 wide where the rows allow it.
    """

    def __init__(self, amount: int, hidden_size: int) -> None:
        super().__init__(amount, hidden_size)
        self.heads = math.gcd(hidden_size, max(1, hidden_size // 64))
        head_dim = hidden_size // self.heads
        self.queries = nn.Parameter(torch.randn(amount, self.heads, head_dim))
        self.key_weight = nn.Parameter(torch.randn(hidden_size, hidden_size) * hidden_size**-0.5)
        self.value_weight = nn.Parameter(torch.randn(hidden_size, hidden_size) * hidden_size**-0.5)

    def count(self, rows: int) -> int:
        if rows < self.amount:
            raise ValueError(f"resample: expected pictures of at least {self.amount} rows, got {rows}")
        return self.amount

    def forward(self, rows: Tensor, features: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        count = self.count(rows.shape[1])
        made = resample_tokens(rows.contiguous(), self.queries, self.key_weight, self.value_weight)
        return made, spaced(rows, count)


#: By name.
PRIMITIVES: dict[str, type[Primitive]] = {
    "all": Everything,
    "none": Nothing,
    "pool": Pool,
    "convolve": Convolve,
    "prune": Prune,
    "prune_random": PruneAtRandom,
    "resample": Resample,
}


def check_option(name: str, amount: int) -> None:
    """Raises a ValueError or TypeError unless there is a primitive of that name, and that much of it."""
    if name not in PRIMITIVES:
        raise ValueError(f"primitive: expected one of {', '.join(PRIMITIVES)}, got {name!r}")
    check_int(name, amount, low=1)


def spaced(rows: Tensor, count: int) -> Tensor:
    """[P, count] int64: which of rows [P, T, H] evenly spaced outputs stand in for, the last for the last."""
    ends = torch.arange(1, count + 1, device=rows.device) * rows.shape[1] // max(count, 1)
    return (ends - 1).expand(rows.shape[0], -1)


def _grid(rows: int) -> tuple[int, int]:
    """A square where the rows make one; else a line, for which nothing tells how the picture was cut."""
    side = math.isqrt(rows)
    return (side, side) if side * side == rows else (1, rows)


def _side(amount: int) -> int:
    return max(1, round(math.sqrt(amount)))
