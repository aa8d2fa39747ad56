"""The draft's best children under the noise that the target will draw with.

A target's draw is argmax(w + g), g a function of seed, position and token alone. So a draft that wants to be accepted
proposes the k best of its own w + g, with the same g: what it then has to guess is the target's argmax, at any
temperature, and no longer the outcome of a coin.

    z = logits / temperature + g        (temperature 0: z = logits)
    score(i) = log softmax(c z)_i,      c = max(1, temperature)

The score estimates how probable it is that the draw is this child. At temperature 0 it is the usual log-softmax of the
logits. Above temperature 1 the noise keeps its size while w shrinks by the temperature, so z is sharpened back by it.

One program holds `TILE` tokens of a row in registers as packed int64 keys (value, lowest token first): it takes the
largest k times, and sums the softmax in fp32. A second kernel, a program a row, does the same with the tiles' keys.
Logits are read once; nothing of the vocabulary's size is written. A draft of a reduced vocabulary says which ids its
logits are of, and the noise of those ids alone is made, a Philox call each.
"""

import torch
import triton
import triton.language as tl

from ._checks import check_range, check_tensor, check_whole
from ._dispatch import on_device
from .acceptance import as_rows, check_draw
from .filters import LEAST_64, argument, is_zero, key_token, key_value, pack_key, scaled_tile, setting
from .noise import race, race_tile, uniform
from .reference import drafting as reference

#: Tokens a program.
TILE = 4096

#: The most children of one node.
MOST_CHILDREN = 64


@triton.jit
def _centred(b_z, largest, sharpness):
    """sharpness * (z - largest), 0 at the largest, which may be infinite."""
    return tl.where(b_z == largest, 0.0, (b_z - largest) * sharpness)


@triton.jit(do_not_specialize=["temperature", "nodes", "tiles", "excluded"])
def _tile_topk_kernel(
    logits, positions, temperature, seed, exclude, ids, keys, sums, nodes, vocabulary, tiles, excluded,
    stride_b, stride_n, stride_v,
    PER_ROW_T: tl.constexpr, SAMPLED: tl.constexpr, EXCLUDES: tl.constexpr, MAPPED: tl.constexpr,
    K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    i_row, i_tile = tl.program_id(0), tl.program_id(1)
    i_b, i_n = i_row // nodes, i_row % nodes
    p_row = logits + i_b.to(tl.int64) * stride_b + i_n.to(tl.int64) * stride_n
    o_token = i_tile * TILE + tl.arange(0, TILE)
    t = setting(temperature, i_b, PER_ROW_T, tl.float32)

    b_id = o_token
    if MAPPED:
        b_id = tl.load(ids + o_token, mask=o_token < vocabulary, other=0)
    b_z = scaled_tile(p_row, o_token, vocabulary, stride_v, t)
    if SAMPLED and t > 0:
        position = tl.load(positions + i_row).to(tl.int64) + 1
        if MAPPED:
            b_z += race(uniform(b_id, position, tl.load(seed + i_b), 0))
        else:
            b_z += race_tile(i_tile * TILE, position, tl.load(seed + i_b), 0, TILE)
    if EXCLUDES:
        for i in range(excluded):
            b_z = tl.where(b_id == tl.load(exclude + i), -float("inf"), b_z)

    b_key = tl.where(o_token < vocabulary, pack_key(b_z, o_token), LEAST_64)
    o_part = i_row.to(tl.int64) * tiles + i_tile
    b_e = tl.exp(_centred(b_z, tl.max(b_z, 0), tl.maximum(t, 1.0)))
    tl.store(sums + o_part, tl.sum(tl.where(o_token < vocabulary, b_e, 0.0), 0))
    for i in range(K):
        best = tl.max(b_key, 0)
        tl.store(keys + o_part * K + i, best)
        b_key = tl.where(b_key == best, LEAST_64, b_key)


@triton.jit(do_not_specialize=["temperature", "nodes", "tiles"])
def _row_topk_kernel(
    keys, sums, temperature, ids, tokens, scores, nodes, tiles,
    PER_ROW_T: tl.constexpr, MAPPED: tl.constexpr, K: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    t = setting(temperature, i_row // nodes, PER_ROW_T, tl.float32)
    sharpness = tl.maximum(t, 1.0)
    o_key, o_tile = tl.arange(0, KEYS), tl.arange(0, TILES)
    b_key = tl.load(keys + i_row * tiles * K + o_key, mask=o_key < tiles * K, other=LEAST_64)

    largest = key_value(tl.max(b_key, 0))
    b_first = tl.load(keys + (i_row * tiles + o_tile) * K, mask=o_tile < tiles, other=LEAST_64)
    b_sum = tl.load(sums + i_row * tiles + o_tile, mask=o_tile < tiles, other=0.0)
    b_weight = tl.where(o_tile < tiles, tl.exp(_centred(key_value(b_first), largest, sharpness)), 0.0)
    log_sum = tl.log(tl.sum(b_sum * b_weight, 0))
    for i in range(K):
        best = tl.max(b_key, 0)
        value = key_value(best)
        empty = value == -float("inf")
        token = tl.where(empty, 0, key_token(best))
        if MAPPED:
            token = tl.where(empty, 0, tl.load(ids + token))
        tl.store(tokens + i_row * K + i, token)
        tl.store(scores + i_row * K + i, tl.where(empty, value, _centred(value, largest, sharpness) - log_sum))
        b_key = tl.where(b_key == best, LEAST_64, b_key)


def launch_draft_topk(
    logits: torch.Tensor,
    k: int,
    positions: torch.Tensor,
    temperature: float | torch.Tensor,
    seed: torch.Tensor | None,
    exclude: torch.Tensor | None,
    ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernels; arguments as in `draft_topk`, already checked. No seed: temperature is 0 on every row."""
    batch, nodes, vocabulary = logits.shape
    tile = min(TILE, max(16, triton.next_power_of_2(vocabulary)))
    tiles = triton.cdiv(vocabulary, tile)
    device = logits.device
    ids = None if ids is None else ids.contiguous()
    keys = torch.empty((batch, nodes, tiles, k), dtype=torch.int64, device=device)
    sums = torch.empty((batch, nodes, tiles), dtype=torch.float32, device=device)
    tokens = torch.empty((batch, nodes, k), dtype=torch.int64, device=device)
    scores = torch.empty((batch, nodes, k), dtype=torch.float32, device=device)
    temperature = argument(temperature, float)
    per_row = isinstance(temperature, torch.Tensor)
    _tile_topk_kernel[(batch * nodes, tiles)](
        logits, positions.contiguous(), temperature, None if seed is None else seed.contiguous(),
        None if exclude is None else exclude.contiguous(), ids, keys, sums,
        nodes, vocabulary, tiles, 0 if exclude is None else len(exclude), *logits.stride(),
        PER_ROW_T=per_row, SAMPLED=seed is not None, EXCLUDES=exclude is not None, MAPPED=ids is not None,
        K=k, TILE=tile, num_warps=max(1, min(8, tile // 512)),
    )  # fmt: skip
    _row_topk_kernel[(batch * nodes,)](
        keys, sums, temperature, ids, tokens, scores, nodes, tiles,
        PER_ROW_T=per_row, MAPPED=ids is not None, K=k,
        KEYS=triton.next_power_of_2(tiles * k), TILES=triton.next_power_of_2(tiles), num_warps=4,
    )  # fmt: skip
    return tokens, scores


@torch.library.custom_op("specvlm_kernels::draft_topk", mutates_args=())
def _draft_topk(
    logits: torch.Tensor,
    k: int,
    positions: torch.Tensor,
    temperature: torch.Tensor | None,
    seed: torch.Tensor | None,
    exclude: torch.Tensor | None,
    vocabulary: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    heat = 0.0 if temperature is None else temperature
    return draft_topk(logits, k, positions, temperature=heat, seed=seed, exclude=exclude, vocabulary=vocabulary)


@_draft_topk.register_fake
def _(logits: torch.Tensor, k: int, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*logits.shape[:2], k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


def draft_topk(
    logits: torch.Tensor,
    k: int,
    positions: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 0.0,
    seed: torch.Tensor | None = None,
    exclude: torch.Tensor | None = None,
    vocabulary: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best children of every node under the noise of the target's draw, and how probable each is.

    With z = logits / temperature + g (temperature 0: z = logits; excluded ids: -inf), the tokens are the k largest of z
    in descending order, ties to the lowest id, and the scores log softmax(max(1, temperature) * z) over all of them.

    Args:
        logits: [B, N, V] the draft's, fp32, fp16 or bf16 (on CPU fp64 too), any strides. NaN counts as -inf. V is what
            the draft can propose, which may be less than the target's vocabulary.
        k: children a node, from 1 to V and at most 64.
        positions: [B, N] int32 or int64, the nodes' own positions: their children's is the next, as in `draw`.
        temperature: a number or [B] fp32, the target's.
        seed: [B] int64, the target's; may be None only where the host knows that temperature is 0.
        exclude: [E] int64, ids that are never proposed; their probability goes to the others.
        vocabulary: [V] int64, which of the target's tokens the logits are of, each once: noise, exclusions and the
            result go by these ids, as if the logits had been spread over the whole vocabulary, -inf everywhere else.
            Of equal values the one listed first goes first. None: token i is id i.

    Returns:
        tokens [B, N, k] int64 and scores [B, N, k] fp32. Where fewer than k tokens have a z above -inf, the rest are
        token 0 with score -inf, which is no proposal.

    Raises:
        ValueError: a wrong shape, dtype, device or k, or no seed; for numbers and CPU tensors also a wrong value.
    """
    kernel = check_draw(logits, positions, temperature, 0, 1.0, seed)
    size = logits.shape[-1]
    check_whole("k", k, 1, min(size, MOST_CHILDREN))
    if vocabulary is not None:
        check_tensor("vocabulary", vocabulary, (size,), torch.int64, logits.device)
        check_range("vocabulary", vocabulary, 0, 2**31 - 1)
    if exclude is not None:
        check_tensor("exclude", exclude, ("E",), torch.int64, logits.device)
        check_range("exclude", exclude, 0, size if vocabulary is None else 2**31 - 1)
    if torch.compiler.is_compiling():
        heat, _, _ = as_rows(logits, temperature, 0, 1.0)
        return _draft_topk(logits, k, positions, heat, seed, exclude, vocabulary)
    if not kernel:
        return reference.draft_topk(
            logits, k, positions, temperature=temperature, seed=seed, exclude=exclude, vocabulary=vocabulary
        )
    if is_zero(temperature):
        seed = None
    with on_device(logits):
        return launch_draft_topk(logits, k, positions, temperature, seed, exclude, vocabulary)
