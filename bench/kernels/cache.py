"""What moves keys and values: a round's new rows into a layer, and an accepted path of all layers."""

from collections.abc import Iterator

import torch

from bench.kernels.attention import GROUPED, HEAD_DIM, SEVEN, THIRTEEN, Model
from bench.kernels.registry import Case, Place, Problem, require
from specvlm_kernels import compact_kv, reference, write_kv

LAYERS, PATH, REACH, CAPACITY = 32, (2, 5, 11, 30), 32, 640


def cache_cases() -> Iterator[Case]:
    for model in (SEVEN, THIRTEEN, GROUPED):
        yield compact_case(model, LAYERS)
        yield write_case(model, 64)


def write_case(model: Model, nodes: int) -> Case:
    return Case(
        "write_kv",
        f"{model.name}, one layer, {nodes} rows",
        2 * 2 * 2 * model.kv_heads * nodes * HEAD_DIM,
        lambda place: write_problem(place, model, nodes),
        facts={"nodes": nodes},
    )


def write_problem(place: Place, model: Model, nodes: int) -> Problem:
    turns = place.turns(2 * 2 * 2 * model.kv_heads * nodes * HEAD_DIM)
    slab = place.randn(2, 1, model.kv_heads, turns * nodes, HEAD_DIM)
    # As a decoder has them: a transposed view of a projection's result.
    new = place.randn(turns, 2, 1, nodes, model.kv_heads, HEAD_DIM).transpose(3, 4)
    starts = place.int32([[turn * nodes] for turn in range(turns)])

    def check() -> None:
        ours, theirs = slab.clone(), slab.clone()
        write_kv(ours[0], ours[1], *new[-1], starts[-1])
        reference.write_kv(theirs[0], theirs[1], *new[-1], starts[-1])
        require(torch.equal(ours, theirs), "write_kv wrote wrongly")

    def indexed(turn: int) -> None:
        slots = starts[turn] + torch.arange(nodes, device=place.device)
        for half, rows in zip(slab, new[turn], strict=True):
            half.index_copy_(2, slots, rows)

    return Problem(
        check,
        lambda turn: write_kv(slab[0], slab[1], *new[turn], starts[turn]),
        turns,
        {"index_copy": lambda: indexed},
    )


def compact_case(model: Model, layers: int) -> Case:
    return Case(
        "compact_kv",
        f"{model.name}, {layers} layers, {len(PATH)} rows",
        2 * 2 * layers * 2 * model.kv_heads * len(PATH) * HEAD_DIM,
        lambda place: compact_problem(place, model, layers),
    )


def compact_problem(place: Place, model: Model, layers: int) -> Problem:
    """A path is a few rows of a cache: so each turn has its own place in one, `REACH` slots from the next."""
    path = place.int32([[*PATH, *[-1] * 60]])
    length = place.int32([len(PATH)])
    starts = place.int32([[start] for start in range(0, CAPACITY, REACH)])
    moved = 2 * 2 * layers * 2 * model.kv_heads * len(PATH) * HEAD_DIM
    count = max(1, -(-place.rotation_bytes // (moved * len(starts))))
    caches = place.randn(count, layers, 2, 1, model.kv_heads, CAPACITY, HEAD_DIM)
    sources = starts + torch.tensor(PATH, device=place.device)
    targets = starts + torch.arange(1, 1 + len(PATH), device=place.device)

    def check() -> None:
        ours, theirs = caches[0].clone(), caches[0].clone()
        compact_kv(ours, starts[-1], path, length)
        reference.compact_kv(theirs, starts[-1], path, length)
        require(torch.equal(ours, theirs), "compact_kv moved wrongly")

    def compacted(turn: int) -> None:
        compact_kv(caches[turn // len(starts)], starts[turn % len(starts)], path, length)

    def indexed(turn: int) -> None:
        cache, at = caches[turn // len(starts)], turn % len(starts)
        cache.index_copy_(4, targets[at], cache.index_select(4, sources[at]))

    return Problem(check, compacted, count * len(starts), {"index_select, index_copy": lambda: indexed})
