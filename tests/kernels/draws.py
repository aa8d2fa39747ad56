"""What the tests of draws and walks share: logits, trees, and whether what was drawn follows a law."""

import random

import torch


def random_logits(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def places(batch: int, nodes: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + batch * nodes, dtype=torch.int32).view(batch, nodes)


def seeds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def to(device: str, *tensors: torch.Tensor, **options: object) -> tuple[list[torch.Tensor], dict[str, object]]:
    """Arguments and keyword arguments on `device`."""
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return [x.to(device) for x in tensors], moved


def tree_case(parents: list[int], seed: int, vocabulary: int = 5) -> tuple[torch.Tensor, ...]:
    """Logits [2, N, V], tokens, parents and positions; a few tokens, so that long paths and equal siblings occur."""
    nodes, chance = len(parents), random.Random(seed)
    logits = random_logits(2, nodes, vocabulary, seed=seed)
    best = logits.argmax(-1).tolist()
    tokens = [
        [
            best[b][max(parents[i], 0)] if chance.random() < 0.6 else chance.randrange(-1, vocabulary)
            for i in range(nodes)
        ]
        for b in range(2)
    ]
    used = [p if i < nodes * 0.8 or chance.random() < 0.5 else -1 for i, p in enumerate(parents)]
    depth = [0] * nodes
    for i in range(1, nodes):
        depth[i] = depth[used[i]] + 1 if used[i] >= 0 else 0
    return (
        logits,
        torch.tensor(tokens),
        torch.tensor([used, used], dtype=torch.int32),
        torch.tensor([depth, depth], dtype=torch.int32) + 30,
    )


def g_test(drawn: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The p-value of `drawn` under `probabilities`; tokens expected fewer than 20 times share a bin."""
    counts = torch.bincount(drawn.flatten(), minlength=len(probabilities)).double()
    expected = probabilities.double() * drawn.numel()
    assert (counts[expected == 0] == 0).all()
    rare = expected < 20
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] < 20:  # too few even together: they join the last bin
        counts = torch.cat([counts[:-2], counts[-2:].sum()[None]])
        expected = torch.cat([expected[:-2], expected[-2:].sum()[None]])
    g = 2 * torch.special.xlogy(counts, counts / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, (g / 2).clamp(min=0)))
