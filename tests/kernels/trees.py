"""Random draft trees for the kernel tests, as hypothesis strategies."""

import torch
from hypothesis import strategies as st


def parents_of(kind: str, nodes: int, seed: int) -> list[int]:
    """A parent for each of `nodes` nodes: chain | star | random; node 0 is the root (-1)."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "chain":
        return [i - 1 for i in range(nodes)]
    if kind == "star":
        return [-1] + [0] * (nodes - 1)
    return [-1] + [int(torch.randint(0, i, (), generator=generator)) for i in range(1, nodes)]


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 128, min_nodes: int = 1) -> list[int]:
    """Parents of a chain, a star or a random tree of `min_nodes` to `max_nodes` nodes."""
    kind = draw(st.sampled_from(["chain", "star", "random"]))
    return parents_of(kind, draw(st.integers(min_nodes, max_nodes)), draw(st.integers(0, 2**16)))
