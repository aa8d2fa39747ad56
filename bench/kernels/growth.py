"""How a draft's tree grows between its forwards: a level's beam, and the tree of all levels, against plain torch."""

from collections.abc import Iterator

import torch

from bench.kernels.registry import Case, Place, Problem, require
from specvlm_kernels import reference, rerank_tree, select_beam

#: EAGLE-2's shape on a GPU: nodes expanded a level and children of each, levels, nodes of the tree.
WIDTH, LEVELS, NODES = 10, 6, 64


def growth_cases() -> Iterator[Case]:
    yield beam_case(WIDTH)
    yield tree_case(WIDTH, LEVELS, NODES)


def beam_case(width: int) -> Case:
    count = width * width
    return Case(
        "select_beam",
        f"{width} of {count}",
        count * (8 + 4) + 8 * width + width * (3 * 8 + 4 + 8),
        lambda place: beam_problem(place, width),
    )


def beam_problem(place: Place, width: int) -> Problem:
    count = width * width
    turns = place.turns(12 * count)
    tokens = torch.arange(turns * count, device=place.device).view(turns, 1, count)
    scores = -place.randn(turns, 1, count, dtype=torch.float32).abs()
    ancestors = torch.arange(width, device=place.device).view(1, width, 1)

    def check() -> None:
        ours, theirs = (
            each(tokens[0], scores[0], ancestors, width, 0) for each in (select_beam, reference.select_beam)
        )
        require(all(map(torch.equal, ours, theirs)), "select_beam chooses other nodes")

    return Problem(
        check,
        lambda turn: select_beam(tokens[turn], scores[turn], ancestors, width, 0),
        turns,
        {"torch": lambda: lambda turn: reference.select_beam(tokens[turn], scores[turn], ancestors, width, 0)},
    )


def tree_case(width: int, levels: int, nodes: int) -> Case:
    count = width + (levels - 1) * width * width
    return Case(
        "rerank_tree",
        f"{nodes} of {count}, {levels} levels",
        count * (8 + 8 + 4 + 4) + nodes * (8 + 4 + 4 + 4),
        lambda place: tree_problem(place, width, levels, nodes),
    )


def tree_problem(place: Place, width: int, levels: int, nodes: int) -> Problem:
    """Levels of `width` nodes with as many children each, of the first ones of the level above."""
    sizes = [width, *[width * width] * (levels - 1)]
    count, firsts = sum(sizes), [0, *[width + i * width * width for i in range(levels - 1)]]
    turns = place.turns(24 * count)
    rows, parents = [-torch.rand(turns, 1, width)], [torch.full((width,), -1)]
    for first in firsts[: levels - 1]:
        parents.append(torch.arange(first, first + width).repeat_interleave(width))
        above = rows[-1][..., :width].repeat_interleave(width, dim=-1)
        rows.append(above - torch.rand(turns, 1, width * width))
    depths = torch.arange(1, levels + 1, dtype=torch.int32).repeat_interleave(torch.tensor(sizes)).to(place.device)
    scores, parent = torch.cat(rows, -1).to(place.device), torch.cat(parents)[None].to(place.device)
    tokens = torch.arange(turns * count, device=place.device).view(turns, 1, count)
    root = torch.zeros(1, dtype=torch.int64, device=place.device)

    def check() -> None:
        given = root, tokens[0], parent, scores[0], depths, nodes, nodes
        require(all(map(torch.equal, rerank_tree(*given), reference.rerank_tree(*given))), "rerank_tree makes another")

    def plainly(turn: int) -> tuple[torch.Tensor, ...]:
        return reference.rerank_tree(root, tokens[turn], parent, scores[turn], depths, nodes, nodes)

    return Problem(
        check,
        lambda turn: rerank_tree(root, tokens[turn], parent, scores[turn], depths, nodes, nodes),
        turns,
        {"torch": lambda: plainly},
    )
