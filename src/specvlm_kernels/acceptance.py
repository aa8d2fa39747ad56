"""Seeded draws at every node of a tree, and the walk from the root along the nodes that were drawn.

A draw is greedy decoding of noise-perturbed logits (`noise`):

    y = argmax(w + g),   w = logits / temperature, after top-k, after top-p

Both filters are thresholds of w. A token stays if what lies strictly above it, counted in tokens or in probability, is
less than k, or than p; so all of a row that the filters come to is one number, the lowest w that stays, its *border*.
Ties at a border stay, the token that crosses p stays, and the largest always stays.

No softmax is written and nothing is sorted. Floats are mapped to integers of the same order, and one program a row
bisects between the least and the largest of them: each pass counts what lies above the middle and moves the end that
gives way to a key that occurs, so it ends at the border exactly, after a dozen passes or so and never more than 32.
Probabilities are summed as integers, in units of 2^-40 of the most likely token's: integer sums do not depend on the
order, so neither does the nucleus.

Then a program for each `TILE` tokens of a row packs value and token into one int64 that orders as (value, lowest token
first) and keeps the largest, 8 bytes a tile; the maximum over a row's tiles is its draw. A maximum does not depend on
how it is taken: a row draws the same token alone and among 128. Noise is computed only in tiles where a token stays.

The walk takes a child if and only if it is its parent's draw: the answer is the draws, whatever was proposed. A draft
that proposes under the same noise (`drafting`) is taken more often, and that is all it can change.
"""

import torch
import triton
import triton.language as tl

from ._checks import FLOATS, INTEGERS, KERNEL_FLOATS, check_parents, check_range, check_sampling, check_tensor
from ._dispatch import on_device, takes_kernel
from .noise import race_tile
from .reference import acceptance as reference
from .reference.acceptance import Accepted

#: Tokens a program of a draw.
TILE = 4096

#: Tokens that the search for a border holds at a time.
SEARCH_TILE = 8192

#: Rows whose draws one program merges.
MERGE_ROWS = 16

LEAST_32 = tl.constexpr(-(2**31))
LARGEST_32 = tl.constexpr(2**31 - 1)
LEAST_64 = tl.constexpr(-(2**63))
MASS_UNITS = tl.constexpr(2.0**40)


@triton.jit
def setting(x, i_b, PER_ROW: tl.constexpr, DTYPE: tl.constexpr):
    """A sampling setting of batch row i_b, from a [B] tensor or a number."""
    return tl.cast(tl.load(x + i_b) if PER_ROW else x, DTYPE)


@triton.jit
def float_key(b_x):
    """int32 keys in the order of the floats; -0 and 0 share one."""
    b_bits = tl.where(b_x == 0.0, 0.0, b_x).to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & LARGEST_32)


@triton.jit
def pack_key(b_z, o_token):
    """int64 keys in the order of (value, lowest token first)."""
    return (float_key(b_z).to(tl.int64) << 32) | (o_token ^ LARGEST_32).to(tl.int64)


@triton.jit
def key_token(b_key):
    """The token in a packed key."""
    return (b_key & LARGEST_32) ^ LARGEST_32


@triton.jit
def scaled_tile(p_row, o_token, vocabulary, stride_v, temperature):
    """Logits after temperature, fp32; -inf where NaN and past the vocabulary."""
    p_logits = p_row + o_token.to(tl.int64) * stride_v
    b_w = tl.load(p_logits, mask=o_token < vocabulary, other=-float("inf")).to(tl.float32)
    # Rounded as torch rounds, so that both backends filter the same numbers.
    b_w = tl.div_rn(b_w, tl.where(temperature > 0, temperature, 1.0))
    return tl.where(b_w == b_w, b_w, -float("inf"))


@triton.jit
def _mass(b_w, largest):
    """Probability in units of 2^-40 of the most likely token's."""
    b_e = tl.where(b_w == largest, 1.0, tl.exp(b_w - largest))  # largest may be infinite
    return (b_e * MASS_UNITS).to(tl.int64)


@triton.jit
def _key_tile(p_row, i_first, vocabulary, stride_v, temperature, TILE: tl.constexpr):
    o_token = i_first + tl.arange(0, TILE)
    b_w = scaled_tile(p_row, o_token, vocabulary, stride_v, temperature)
    return b_w, tl.where(o_token < vocabulary, float_key(b_w), LEAST_32)


@triton.jit
def _search(
    p_row, low, high, limit, largest, vocabulary, stride_v, temperature, MASS: tl.constexpr, TILE: tl.constexpr
):
    """The least key that occurs in [low, high] and has less than `limit` above it; low and high occur."""
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)
        b_sum = tl.full([TILE], 0, tl.int64 if MASS else tl.int32)
        b_next = tl.full([TILE], LARGEST_32, tl.int32)
        b_last = tl.full([TILE], LEAST_32, tl.int32)
        for i_first in range(0, vocabulary, TILE):
            b_w, b_key = _key_tile(p_row, i_first, vocabulary, stride_v, temperature, TILE)
            m_above = b_key > middle
            b_sum += tl.where(m_above, _mass(b_w, largest), 0) if MASS else m_above.to(tl.int32)
            b_next = tl.minimum(b_next, tl.where(m_above, b_key, LARGEST_32))
            b_last = tl.maximum(b_last, tl.where(m_above, LEAST_32, b_key))
        above = tl.sum(b_sum, 0)
        if (above.to(tl.float64) if MASS else above) < limit:
            high = tl.max(b_last, 0)
        else:
            low = tl.min(b_next, 0)
    return high


@triton.jit(do_not_specialize=["temperature", "top_k", "top_p", "nodes"])
def _border_kernel(
    logits, temperature, top_k, top_p, border, nodes, vocabulary, stride_b, stride_n, stride_v,
    PER_ROW_T: tl.constexpr, PER_ROW_K: tl.constexpr, PER_ROW_P: tl.constexpr,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0)
    i_b, i_n = i_row // nodes, i_row % nodes
    t = setting(temperature, i_b, PER_ROW_T, tl.float32)
    k = setting(top_k, i_b, PER_ROW_K, tl.int64)
    p = setting(top_p, i_b, PER_ROW_P, tl.float32)
    if not (t > 0):
        tl.store(border + i_row, LEAST_32)
        return
    p_row = logits + i_b.to(tl.int64) * stride_b + i_n.to(tl.int64) * stride_n

    b_least = tl.full([TILE], LARGEST_32, tl.int32)
    b_largest = tl.full([TILE], -float("inf"), tl.float32)
    for i_first in range(0, vocabulary, TILE):
        b_w, b_key = _key_tile(p_row, i_first, vocabulary, stride_v, t, TILE)
        b_least = tl.minimum(b_least, tl.where(b_key == LEAST_32, LARGEST_32, b_key))
        b_largest = tl.maximum(b_largest, b_w)
    largest = tl.max(b_largest, 0)
    low, high = tl.min(b_least, 0), float_key(largest)

    if TOP_K and (k > 0) & (k < vocabulary):
        low = _search(p_row, low, high, k, largest, vocabulary, stride_v, t, False, TILE)
    if TOP_P and p < 1:
        b_total = tl.full([TILE], 0, tl.int64)
        for i_first in range(0, vocabulary, TILE):
            b_w, b_key = _key_tile(p_row, i_first, vocabulary, stride_v, t, TILE)
            b_total += tl.where(b_key >= low, _mass(b_w, largest), 0)
        limit = p.to(tl.float64) * tl.sum(b_total, 0).to(tl.float64)
        low = _search(p_row, low, high, limit, largest, vocabulary, stride_v, t, True, TILE)
    tl.store(border + i_row, low)


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
def _merged(keys, o_row, m_row, tiles, TILES: tl.constexpr):
    """The draws of rows: the token of the largest key among a row's tiles, int64."""
    o_tile = tl.arange(0, TILES)
    p_keys = keys + o_row.to(tl.int64)[:, None] * tiles + o_tile[None, :]
    b_key = tl.load(p_keys, mask=m_row[:, None] & (o_tile < tiles)[None, :], other=LEAST_64)
    return key_token(tl.max(b_key, 1))


@triton.jit(do_not_specialize=["rows", "tiles"])
def _merge_kernel(keys, out, rows, tiles, ROWS: tl.constexpr, TILES: tl.constexpr):
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(out + o_row, _merged(keys, o_row, o_row < rows, tiles, TILES), mask=o_row < rows)


@triton.jit
def _step(b_drawn, b_token, b_parent, o_node, node, NODES: tl.constexpr):
    """The draw at `node`, and its lowest child that is that draw (NODES: none)."""
    drawn = tl.sum(tl.where(o_node == node, b_drawn, 0), 0)
    # Children come after their parents: whatever `parents` holds, the walk ends.
    m_child = (b_parent == node) & (b_token == drawn) & (o_node > node)
    return drawn, tl.min(tl.where(m_child, o_node, NODES), 0)


@triton.jit(do_not_specialize=["nodes", "tiles"])
def _walk_kernel(
    keys, tokens, parents, path, length, next_token, nodes, tiles, NODES: tl.constexpr, TILES: tl.constexpr
):
    i_b = tl.program_id(0)
    o_node = tl.arange(0, NODES)
    m_node = o_node < nodes
    o_row = i_b.to(tl.int64) * nodes + o_node
    b_drawn = _merged(keys, o_row, m_node, tiles, TILES)
    b_token = tl.load(tokens + o_row, mask=m_node, other=-1)
    b_parent = tl.load(parents + o_row, mask=m_node, other=-1)

    count = 0
    b_path = tl.full([NODES], -1, tl.int32)
    drawn, child = _step(b_drawn, b_token, b_parent, o_node, 0, NODES)
    while child < NODES:
        b_path = tl.where(o_node == count, child, b_path)
        count += 1
        drawn, child = _step(b_drawn, b_token, b_parent, o_node, child, NODES)
    tl.store(path + o_row, b_path, mask=m_node)
    tl.store(length + i_b, count)
    tl.store(next_token + i_b, drawn)


def argument(x: float | torch.Tensor, number: type) -> float | torch.Tensor:
    """A sampling setting as a kernel takes it: a number of one type, or a dense tensor."""
    return x.contiguous() if isinstance(x, torch.Tensor) else number(x)


def is_zero(x: float | torch.Tensor) -> bool:
    """Whether the host knows that a setting is 0 on every row."""
    return not isinstance(x, torch.Tensor) and x == 0


def launch_border(
    logits: torch.Tensor,
    temperature: float | torch.Tensor,
    top_k: int | torch.Tensor,
    top_p: float | torch.Tensor,
) -> torch.Tensor:
    """The lowest w of each row that both filters leave, as an order-preserving int32: [B, N]."""
    batch, nodes, vocabulary = logits.shape
    border = torch.empty((batch, nodes), dtype=torch.int32, device=logits.device)
    tile = min(SEARCH_TILE, max(16, triton.next_power_of_2(vocabulary)))
    per_row = [isinstance(x, torch.Tensor) for x in (temperature, top_k, top_p)]
    _border_kernel[(batch * nodes,)](
        logits, argument(temperature, float), argument(top_k, int), argument(top_p, float), border,
        nodes, vocabulary, *logits.stride(),
        PER_ROW_T=per_row[0], PER_ROW_K=per_row[1], PER_ROW_P=per_row[2],
        TOP_K=per_row[1] or top_k > 0, TOP_P=per_row[2] or top_p < 1,
        TILE=tile, num_warps=max(1, min(16, tile // 512)),
    )  # fmt: skip
    return border


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
    open_ended = is_zero(top_k) and not isinstance(top_p, torch.Tensor) and top_p == 1
    border = None if open_ended else launch_border(logits, temperature, top_k, top_p)
    return launch_draw(logits, positions, temperature, seed, border)


def launch_merge(keys: torch.Tensor) -> torch.Tensor:
    """The draws in packed keys [B, N, tiles]: [B, N] int64."""
    batch, nodes, tiles = keys.shape
    out = torch.empty((batch, nodes), dtype=torch.int64, device=keys.device)
    _merge_kernel[(triton.cdiv(batch * nodes, MERGE_ROWS),)](
        keys, out, batch * nodes, tiles, ROWS=MERGE_ROWS, TILES=triton.next_power_of_2(tiles), num_warps=4
    )
    return out


def launch_walk(keys: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor) -> Accepted:
    """The walk down the tree along the draws in packed keys [B, N, tiles]."""
    batch, nodes, tiles = keys.shape
    path = torch.empty((batch, nodes), dtype=torch.int32, device=keys.device)
    length = torch.empty(batch, dtype=torch.int32, device=keys.device)
    next_token = torch.empty(batch, dtype=torch.int64, device=keys.device)
    _walk_kernel[(batch,)](
        keys, tokens.contiguous(), parents.contiguous(), path, length, next_token, nodes, tiles,
        NODES=triton.next_power_of_2(nodes), TILES=triton.next_power_of_2(tiles), num_warps=4,
    )  # fmt: skip
    return Accepted(path, length, next_token)


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
    kernel = check_draw(logits, positions, temperature, top_k, top_p, seed)
    batch, nodes, _ = logits.shape
    if nodes == 0:
        raise ValueError(f"logits: expected at least one node, got shape {list(logits.shape)}")
    check_tensor("tokens", tokens, (batch, nodes), torch.int64, logits.device)
    check_tensor("parents", parents, (batch, nodes), torch.int32, logits.device)
    check_parents(parents)
    if not kernel:
        return reference.accept(
            logits, tokens, parents, positions, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
    with on_device(logits):
        return launch_walk(launch_keys(logits, positions, temperature, top_k, top_p, seed), tokens, parents)
