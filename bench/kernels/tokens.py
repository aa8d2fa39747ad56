"""Fewer visual tokens, forward, against plain torch: a picture of LLaVA-1.5, and five of them."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from bench.kernels.attention import HEAD_DIM, SEVEN, THIRTEEN, Model
from bench.kernels.draws import SCORE_GAP
from bench.kernels.registry import Call, Case, Place, Problem, require, require_close
from specvlm_kernels import conv_tokens, pool_tokens, prune_tokens, reference, resample_tokens

GRIDS = ((24, 24), (120, 24))
STRIDE, WINDOW, COUNT = 2, 3, 2


def token_cases() -> Iterator[Case]:
    for model in (SEVEN, THIRTEEN):
        for grid in GRIDS:
            yield pool_case(model, grid)
            yield conv_case(model, grid)
            yield prune_case(model, grid, by_query=False)
            yield prune_case(model, grid, by_query=True)
            yield resample_case(model, grid)


def facts(model: Model, grid: tuple[int, int]) -> dict[str, float]:
    return {"tokens": math.prod(grid), "channels": HEAD_DIM * model.heads}


def random_tokens(place: Place, model: Model, grid: tuple[int, int]) -> torch.Tensor:
    """[turns, 1, tokens, channels], as wide as the model."""
    tokens, channels = math.prod(grid), HEAD_DIM * model.heads
    return place.randn(place.turns(2 * tokens * channels), 1, tokens, channels)


def plain_call(plain: Callable[..., Any], arguments: Callable[[int], tuple]) -> Callable[[], Call]:
    """A plain function as it is."""
    return lambda: lambda turn: plain(*arguments(turn))


def compiled_call(
    place: Place, model: Model, grid: tuple[int, int], plain: Callable[..., Any], arguments: Callable[[int], tuple]
) -> dict[str, Callable[[], Call]]:
    """The same compiled, at one size: every further one takes seconds."""

    def compiled() -> Call:
        fast = place.compiled(plain, dynamic=False)
        return lambda turn: fast(*arguments(turn))

    return {"torch.compile": compiled} if (model, grid) == (SEVEN, GRIDS[-1]) else {}


def pool_case(model: Model, grid: tuple[int, int]) -> Case:
    tokens, channels = math.prod(grid), HEAD_DIM * model.heads
    fewer = math.prod(-(-size // STRIDE) for size in grid)

    def prepare(place: Place) -> Problem:
        x = random_tokens(place, model, grid)

        def plain(x: torch.Tensor) -> torch.Tensor:
            planes = x.transpose(1, 2).unflatten(2, grid)
            out = F.avg_pool2d(planes, STRIDE, ceil_mode=True, count_include_pad=False)
            return out.flatten(2).transpose(1, 2).contiguous()

        def check() -> None:
            exact = reference.pool_tokens(x[0].double(), grid, STRIDE)
            require_close("pool_tokens", pool_tokens(x[0], grid, STRIDE), plain(x[0]), exact)

        baselines = {"avg_pool2d": plain_call(plain, lambda turn: (x[turn],))}
        slow = compiled_call(place, model, grid, plain, lambda turn: (x[turn],))
        return Problem(check, lambda turn: pool_tokens(x[turn], grid, STRIDE), len(x), baselines, slow)

    shape = f"{model.name}, {tokens} tokens, stride {STRIDE}"
    return Case("pool_tokens", shape, 2 * channels * (tokens + fewer), prepare, facts=facts(model, grid))


def conv_case(model: Model, grid: tuple[int, int]) -> Case:
    tokens, channels = math.prod(grid), HEAD_DIM * model.heads
    places = [(size - WINDOW) // STRIDE + 1 for size in grid]
    seen = math.prod((count - 1) * STRIDE + WINDOW for count in places)

    def prepare(place: Place) -> Problem:
        x = random_tokens(place, model, grid)
        weight, bias = place.randn(channels, WINDOW, WINDOW) / WINDOW, place.randn(channels)

        def plain(x: torch.Tensor) -> torch.Tensor:
            planes = x.transpose(1, 2).unflatten(2, grid)
            out = F.conv2d(planes, weight[:, None], bias, STRIDE, groups=channels)
            return out.flatten(2).transpose(1, 2).contiguous()

        def check() -> None:
            exact = reference.conv_tokens(x[0].double(), grid, weight.double(), bias.double(), STRIDE)
            require_close("conv_tokens", conv_tokens(x[0], grid, weight, bias, STRIDE), plain(x[0]), exact)

        baselines = {"conv2d": plain_call(plain, lambda turn: (x[turn],))}
        slow = compiled_call(place, model, grid, plain, lambda turn: (x[turn],))
        return Problem(check, lambda turn: conv_tokens(x[turn], grid, weight, bias, STRIDE), len(x), baselines, slow)

    moved = 2 * channels * (seen + math.prod(places)) + 2 * channels * (WINDOW**2 + 1)
    shape = f"{model.name}, {tokens} tokens, window {WINDOW}, stride {STRIDE}"
    return Case("conv_tokens", shape, moved, prepare, facts=facts(model, grid))


def prune_case(model: Model, grid: tuple[int, int], by_query: bool) -> Case:
    tokens, channels = math.prod(grid), HEAD_DIM * model.heads
    keep = tokens // 4

    def prepare(place: Place) -> Problem:
        x = random_tokens(place, model, grid)
        given = place.randn(len(x), 1, tokens, dtype=torch.float32)
        query = place.randn(1, channels) / channels**0.5

        def gathered(x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            indices = scores.topk(keep).indices.sort().values
            return x.gather(1, indices[..., None].expand(-1, -1, channels))

        def similar(x: torch.Tensor) -> torch.Tensor:
            return gathered(x, torch.mv(x[0], query[0])[None])

        def check_given() -> None:
            for got, expected in zip(
                prune_tokens(x[0], given[0], keep), reference.prune_tokens(x[0], given[0], keep), strict=True
            ):
                require(torch.equal(got, expected), "prune_tokens keeps other tokens")

        def check_query() -> None:
            out, indices = prune_tokens(x[0], None, keep, query=query)
            exact = torch.einsum("btc,bc->bt", x[0].double(), query.double())
            lost = exact.topk(keep).values.min() - exact.gather(1, indices).min()
            require(lost <= SCORE_GAP, f"prune_tokens by a query missed the best by {lost:.3g}")
            kept = x[0].gather(1, indices[..., None].expand(-1, -1, channels))
            require(torch.equal(out, kept), "prune_tokens by a query returns other tokens than its indices")

        def by_given(turn: int) -> object:
            return prune_tokens(x[turn], given[turn], keep)

        def by_similarity(turn: int) -> object:
            return prune_tokens(x[turn], None, keep, query=query)

        def arguments(turn: int) -> tuple:
            return (x[turn],) if by_query else (x[turn], given[turn])

        plain = similar if by_query else gathered
        name = "mv, topk, sort, gather" if by_query else "topk, sort, gather"
        baselines = {name: plain_call(plain, arguments)}
        slow = compiled_call(place, model, grid, plain, arguments)
        check, run = (check_query, by_similarity) if by_query else (check_given, by_given)
        return Problem(check, run, len(x), baselines, slow)

    # Scored by a query all tokens are read, otherwise the kept ones; written are these and their places.
    moved = 2 * channels * ((tokens if by_query else keep) + keep) + 8 * keep + (0 if by_query else 4 * tokens)
    shape = f"{model.name}, {keep} of {tokens} tokens{' by a query' * by_query}"
    return Case("prune_tokens", shape, moved, prepare, facts=facts(model, grid))


def resample_case(model: Model, grid: tuple[int, int]) -> Case:
    tokens, channels = math.prod(grid), HEAD_DIM * model.heads
    rows = COUNT * model.heads

    def prepare(place: Place) -> Problem:
        x = random_tokens(place, model, grid)
        # Weights outweigh the tokens: they are walked through, too.
        layers = place.turns(2 * 2 * channels**2)
        weights = place.randn(layers, 2, channels, channels) / channels**0.5
        queries = place.randn(COUNT, model.heads, HEAD_DIM)

        def plain(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            k, v = (F.linear(x, w).unflatten(2, (model.heads, HEAD_DIM)).transpose(1, 2) for w in weights)
            return F.scaled_dot_product_attention(queries.transpose(0, 1)[None], k, v).transpose(1, 2).flatten(2)

        def resampled(turn: int) -> torch.Tensor:
            return resample_tokens(x[turn], queries, *weights[turn % layers])

        def check() -> None:
            exact = reference.resample_tokens(x[0].double(), queries.double(), *weights[0].double())
            require_close("resample_tokens", resampled(0), plain(x[0], weights[0]), exact)

        baselines = {"keys, values, SDPA": plain_call(plain, lambda turn: (x[turn], weights[turn % layers]))}
        slow = compiled_call(place, model, grid, plain, lambda turn: (x[turn], weights[turn % layers]))
        return Problem(check, resampled, len(x), baselines, slow)

    moved = 2 * tokens * channels + 2 * 2 * channels**2 + 2 * 2 * COUNT * channels
    # Queries folded through the keys' weights, scores, means, and means through the values' weights.
    flops = 2 * 2 * rows * channels * HEAD_DIM + 2 * 2 * rows * tokens * channels
    shape = f"{model.name}, {COUNT} queries of {tokens} tokens"
    return Case("resample_tokens", shape, moved, prepare, flops, facts(model, grid))
