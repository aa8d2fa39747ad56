"""Seeded draws at every node of a tree, and the walk from the root along the nodes that were drawn.

A draw is greedy decoding of noise-perturbed logits (`noise`):

    y = argmax(w + g),   w = logits / temperature, after top-k, after top-p

The filters are a threshold of w, found beforehand (`filters`); no softmax is written and nothing is sorted. A program
for each `TILE` tokens of a row packs value and token into one int64 that orders as (value, lowest token first) and
keeps the largest, 8 bytes a tile; the maximum over a row's tiles is its draw. A maximum does not depend on how it is
taken: a row draws the same token alone and among 128. Noise is computed only in tiles where a token stays, four tokens
a Philox call.

The walk takes a child if and only if it is its parent's draw: the answer is the draws, whatever was proposed. A draft
that proposes under the same noise (`drafting`) is taken more often, and that is all it can change.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ._checks import FLOATS, INTEGERS, KERNEL_FLOATS, check_parents, check_range, check_sampling, check_tensor
from ._dispatch import on_device, takes_kernel
from .filters import (
    LARGEST_32,
    LARGEST_64,
    LEAST_64,
    argument,
    float_key,
    is_zero,
    key_token,
    launch_border,
    pack_key,
    scaled_tile,
    setting,
)
from .noise import race_tile
from .reference import acceptance as reference
from .reference.acceptance import Accepted

#: Tokens a program of a draw.
TILE = 4096

#: Rows whose draws one program merges.
MERGE_ROWS = 16


@triton.jit(do_not_specialize=["temperature", "nodes", "tiles"])
def _draw_kernel(
    logits, positions, temperature, seed, border, keys, nodes, vocabulary, tiles, stride_b, stride_n, stride_v,
    PER_ROW_T: tl.constexpr, SAMPLED: tl.constexpr, FILTERED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    i_row, i_tile = tl.program_id(0), tl.program_id(1)
    i_b, i_n = i_row // nodes, i_row % nodes
    p_row = logits + i_b.to(tl.int64) * stride_b + i_n.to(tl.int64) * stride_n
    o_token = i_tile * TILE + tl.arange(0, TILE)
    t = setting(temperature, i_b, PER_ROW_T, tl.float32)

    b_z = scaled_tile(p_row, o_token, vocabulary, stride_v, t)
    if SAMPLED:
        wanted = t > 0
        if FILTERED:
            b_z = tl.where(float_key(b_z) >= tl.load(border + i_row), b_z, -float("inf"))
            wanted = wanted & (tl.max(b_z, 0) > -float("inf"))
        if wanted:
            position = tl.load(positions + i_row).to(tl.int64) + 1
            b_z += race_tile(i_tile * TILE, position, tl.load(seed + i_b), 0, TILE)
    b_key = tl.where(o_token < vocabulary, pack_key(b_z, o_token), LEAST_64)
    tl.store(keys + i_row.to(tl.int64) * tiles + i_tile, tl.max(b_key, 0))


@triton.jit
def merged(keys, o_row, m_row, tiles, TILES: tl.constexpr):
    """The draws of rows: the token of the largest key among a row's tiles, int64."""
    o_tile = tl.arange(0, TILES)
    p_keys = keys + o_row.to(tl.int64)[:, None] * tiles + o_tile[None, :]
    b_key = tl.load(p_keys, mask=m_row[:, None] & (o_tile < tiles)[None, :], other=LEAST_64)
    return key_token(tl.max(b_key, 1))


@triton.jit(do_not_specialize=["rows", "tiles"])
def _merge_kernel(keys, out, rows, tiles, ROWS: tl.constexpr, TILES: tl.constexpr):
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(out + o_row, merged(keys, o_row, o_row < rows, tiles, TILES), mask=o_row < rows)


@triton.jit
def _step(b_drawn, b_token, b_parent, o_node, node, radius, first, end, NODES: tl.constexpr):
    """The draw at `node`, and its child nearest to that draw, the lowest of equals (NODES: none is near enough)."""
    drawn = tl.sum(tl.where(o_node == node, b_drawn, 0), 0)
    m_ordinal = (b_token >= first) & (b_token < end) & (drawn >= first) & (drawn < end)
    b_far = tl.where(m_ordinal, tl.abs(b_token - drawn), tl.where(b_token == drawn, 0, LARGEST_32))
    # Children come after their parents: whatever `parents` holds, the walk ends.
    m_child = (b_parent == node) & (b_far <= radius) & (o_node > node)
    nearest = tl.min(tl.where(m_child, b_far * NODES + o_node, LARGEST_64), 0)
    return drawn, tl.where(nearest == LARGEST_64, NODES, nearest % NODES).to(tl.int32)


@triton.jit(do_not_specialize=["nodes", "tiles", "radius", "first", "end"])
def _walk_kernel(
    keys, tokens, parents, path, length, next_token, nodes, tiles, radius, first, end,
    NODES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0)
    o_node = tl.arange(0, NODES)
    m_node = o_node < nodes
    o_row = i_b.to(tl.int64) * nodes + o_node
    b_drawn = merged(keys, o_row, m_node, tiles, TILES)
    b_token = tl.load(tokens + o_row, mask=m_node, other=-1)
    b_parent = tl.load(parents + o_row, mask=m_node, other=-1)

    count = 0
    b_path = tl.full([NODES], -1, tl.int32)
    drawn, child = _step(b_drawn, b_token, b_parent, o_node, 0, radius, first, end, NODES)
    while child < NODES:
        b_path = tl.where(o_node == count, child, b_path)
        count += 1
        drawn, child = _step(b_drawn, b_token, b_parent, o_node, child, radius, first, end, NODES)
    tl.store(path + o_row, b_path, mask=m_node)
    tl.store(length + i_b, count)
    tl.store(next_token + i_b, drawn)


def launch_draw(
    logits: torch.Tensor,
    positions: torch.Tensor,
    temperature: float | torch.Tensor,
    seed: torch.Tensor | None,
    border: torch.Tensor | None,
) -> torch.Tensor:
    """The best packed key of each tile of each row: [B, N, tiles] int64. No seed: temperature is 0 on every row."""
    batch, nodes, vocabulary = logits.shape
    tile = min(TILE, max(16, triton.next_power_of_2(vocabulary)))
    tiles = triton.cdiv(vocabulary, tile)
    keys = torch.empty((batch, nodes, tiles), dtype=torch.int64, device=logits.device)
    _draw_kernel[(batch * nodes, tiles)](
        logits, positions.contiguous(), argument(temperature, float), None if seed is None else seed.contiguous(),
        border, keys, nodes, vocabulary, tiles, *logits.stride(),
        PER_ROW_T=isinstance(temperature, torch.Tensor), SAMPLED=seed is not None, FILTERED=border is not None,
        TILE=tile, num_warps=max(1, min(8, tile // 512)),
    )  # fmt: skip
    return keys


def launch_keys(
    logits: torch.Tensor,
    positions: torch.Tensor,
    temperature: float | torch.Tensor,
    top_k: int | torch.Tensor,
    top_p: float | torch.Tensor,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    """The kernels of a draw: filters and noise only where the host does not know that they are off."""
    if seed is None or is_zero(temperature):
        return launch_draw(logits, positions, 0.0, None, None)
    return launch_draw(logits, positions, temperature, seed, launch_border(logits, temperature, top_k, top_p))


def launch_merge(keys: torch.Tensor) -> torch.Tensor:
    """The draws in packed keys [B, N, tiles]: [B, N] int64."""
    batch, nodes, tiles = keys.shape
    out = torch.empty((batch, nodes), dtype=torch.int64, device=keys.device)
    _merge_kernel[(triton.cdiv(batch * nodes, MERGE_ROWS),)](
        keys, out, batch * nodes, tiles, ROWS=MERGE_ROWS, TILES=triton.next_power_of_2(tiles), num_warps=4
    )
    return out


def launch_walk(
    keys: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    radius: int = 0,
    ordinal: tuple[int, int] = (0, 0),
) -> Accepted:
    """The walk down the tree along the draws in packed keys [B, N, tiles]; see `accept_within` for a radius above 0."""
    batch, nodes, tiles = keys.shape
    path, length, next_token = empty_walk(batch, nodes, keys.device)
    _walk_kernel[(batch,)](
        keys, tokens.contiguous(), parents.contiguous(), path, length, next_token, nodes, tiles, radius, *ordinal,
        NODES=triton.next_power_of_2(nodes), TILES=triton.next_power_of_2(tiles), num_warps=4,
    )  # fmt: skip
    return Accepted(path, length, next_token)


def empty_walk(batch: int, nodes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for a walk: path [B, N], length [B], next_token [B]."""
    return (
        torch.empty((batch, nodes), dtype=torch.int32, device=device),
        torch.empty(batch, dtype=torch.int32, device=device),
        torch.empty(batch, dtype=torch.int64, device=device),
    )


def check_draw(
    logits: torch.Tensor,
    positions: torch.Tensor,
    temperature: float | torch.Tensor,
    top_k: int | torch.Tensor,
    top_p: float | torch.Tensor,
    seed: torch.Tensor | None,
) -> bool:
    """Checks what `draw`, `accept` and `draft_topk` share; True where a kernel serves."""
    check_tensor("logits", logits, ("B", "N", "V"), FLOATS)
    kernel = takes_kernel("logits", logits)
    if kernel:
        check_tensor("logits", logits, ("B", "N", "V"), KERNEL_FLOATS)
    batch, nodes, vocabulary = logits.shape
    if vocabulary == 0:
        raise ValueError(f"logits: expected at least one token, got shape {list(logits.shape)}")
    check_tensor("positions", positions, (batch, nodes), INTEGERS, logits.device)
    check_range("positions", positions, 0, 2**62)
    check_sampling(temperature, top_k, top_p, seed, batch, logits.device)
    return kernel


def check_walk(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    positions: torch.Tensor,
    temperature: float | torch.Tensor,
    top_k: int | torch.Tensor,
    top_p: float | torch.Tensor,
    seed: torch.Tensor | None,
) -> bool:
    """Checks what `accept` and its kin share; True where a kernel serves."""
    kernel = check_draw(logits, positions, temperature, top_k, top_p, seed)
    batch, nodes, _ = logits.shape
    if nodes == 0:
        raise ValueError(f"logits: expected at least one node, got shape {list(logits.shape)}")
    check_tensor("tokens", tokens, (batch, nodes), torch.int64, logits.device)
    check_tensor("parents", parents, (batch, nodes), torch.int32, logits.device)
    check_parents(parents)
    return kernel


def as_rows(
    logits: torch.Tensor,
    temperature: float | torch.Tensor,
    top_k: int | torch.Tensor,
    top_p: float | torch.Tensor,
) -> list[torch.Tensor | None]:
    """The settings as an operator takes them: [B] tensors, None where the host knows that one is off."""
    of_types = ((temperature, 0, torch.float32), (top_k, 0, torch.int64), (top_p, 1, torch.float32))
    return [
        x
        if isinstance(x, torch.Tensor)
        else None
        if x == off
        else torch.full((logits.shape[0],), x, dtype=dtype, device=logits.device)
        for x, off, dtype in of_types
    ]


def as_settings(
    temperature: torch.Tensor | None, top_k: torch.Tensor | None, top_p: torch.Tensor | None, seed: torch.Tensor | None
) -> dict[str, Any]:
    """Keyword arguments from what `as_rows` made."""
    return {
        "temperature": 0.0 if temperature is None else temperature,
        "top_k": 0 if top_k is None else top_k,
        "top_p": 1.0 if top_p is None else top_p,
        "seed": seed,
    }


@torch.library.custom_op("specvlm_kernels::draw", mutates_args=())
def _draw(
    logits: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    return draw(logits, positions, **as_settings(temperature, top_k, top_p, seed))


@_draw.register_fake
def _(logits: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
    return logits.new_empty(logits.shape[:2], dtype=torch.int64)


@torch.library.custom_op("specvlm_kernels::accept", mutates_args=())
def _accept(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    walk = accept(logits, tokens, parents, positions, **as_settings(temperature, top_k, top_p, seed))
    return walk.path, walk.length, walk.next_token


@_accept.register_fake
def _(logits: torch.Tensor, *_: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_walk(logits.shape[0], logits.shape[1], logits.device)


def draw(
    logits: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 0.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draws a token at every node: argmax(w + g), w the logits after temperature, top-k and top-p, g the node's noise.

    The same logits, settings, seed and position give the same token, however many rows ride along.

    Args:
        logits: [B, N, V] fp32, fp16 or bf16 (on CPU fp64 too), any strides. NaN counts as -inf.
        positions: [B, N] int32 or int64, the nodes' own positions; noise is keyed by the position after it.
        temperature: a number or [B] fp32. 0: the argmax; filters and noise do not matter.
        top_k: a number or [B] int64 or int32: the k largest stay, with all that tie with the k-th. 0: all stay.
        top_p: a number or [B] fp32 in (0, 1]: of what top-k left, a token stays if the probability strictly above it
            is less than top_p. Probabilities are integers in units of 2^-40 of the largest. 1: all stay.
        seed: [B] int64; may be None only where the host knows that temperature is 0.

    Returns:
        [B, N] int64, each in [0, V). Ties go to the lowest id; a row without any finite or infinite value above -inf
        draws token 0.

    Raises:
        ValueError: a wrong shape, dtype or device, or no seed; for numbers and CPU tensors also a wrong value.

    Example:
        >>> draw(torch.tensor([[[0.0, 2.0, 1.0]]]), torch.tensor([[7]], dtype=torch.int32)).tolist()
        [[1]]
    """
    kernel = check_draw(logits, positions, temperature, top_k, top_p, seed)
    if torch.compiler.is_compiling():
        return _draw(logits, positions, *as_rows(logits, temperature, top_k, top_p), seed)
    if not kernel:
        return reference.draw(logits, positions, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    with on_device(logits):
        return launch_merge(launch_keys(logits, positions, temperature, top_k, top_p, seed))


def accept(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 0.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    seed: torch.Tensor | None = None,
) -> Accepted:
    """Draws at every node and walks from the root: a child is taken if and only if it is its parent's draw.

    Args:
        logits: [B, N, V], N >= 1; as in `draw`.
        tokens: [B, N] int64, node 0 the root. A token outside the vocabulary is never taken.
        parents: [B, N] int32, parents[b, i] < i; -1 for the root and for unused rows, which are never taken.
        positions: [B, N] int32 or int64.
        temperature, top_k, top_p, seed: as in `draw`.

    Returns:
        Accepted(path [B, N] int32, length [B] int32, next_token [B] int64). Of equal siblings the lowest is taken.

    Raises:
        ValueError: as in `draw`; on CPU also a parent outside [-1, i).
    """
    kernel = check_walk(logits, tokens, parents, positions, temperature, top_k, top_p, seed)
    if torch.compiler.is_compiling():
        settings = as_rows(logits, temperature, top_k, top_p)
        return Accepted(*_accept(logits, tokens, parents, positions, *settings, seed))
    if not kernel:
        return reference.accept(
            logits, tokens, parents, positions, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
    with on_device(logits):
        return launch_walk(launch_keys(logits, positions, temperature, top_k, top_p, seed), tokens, parents)
