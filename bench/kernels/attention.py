"""Tree attention against a mask over everything: SDPA, FlexAttention and FlashInfer where they can be had."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from bench.kernels.registry import Call, Case, Place, Problem, UnavailableError, require, require_close
from specvlm_kernels import pack_ancestors, reference, tree_attention
from specvlm_kernels.tree_attention import TreeAttentionConfig, count_arrivals, default_config, launch_tree_attention

TREE_SEED, HEAD_DIM = 0, 128

#: Slots that a decoder's slab has behind the prompt (an answer of 256 tokens and the largest tree), and its step.
ROOM, SLAB_STEP = 384, 256


@dataclass(frozen=True, slots=True)
class Model:
    """What of a model attention sees; heads of 128."""

    name: str
    heads: int
    kv_heads: int


SEVEN, THIRTEEN, GROUPED = Model("7B", 32, 32), Model("13B", 40, 40), Model("GQA 32/8", 32, 8)
CONTEXTS, NODES = (600, 2048, 4096, 8192, 32768), (1, 64)

FLEX, FLASHINFER = "FlexAttention, max-autotune", "FlashInfer, custom mask"

#: Where FlexAttention and FlashInfer are tried too, and other cuts of ours: each of them compiles for long.
COMPARED = {(SEVEN, 2048, 64), (SEVEN, 8192, 64), (GROUPED, 8192, 64), (SEVEN, 8192, 1)}
OTHER_CUTS = {(SEVEN, 600, 64), (SEVEN, 2048, 64), (SEVEN, 600, 1), (SEVEN, 4096, 64)}

#: The scale of an e4m3 cache: numbers up to 7, and products with it are exact in bf16.
FP8_SCALE = 2**-6


def random_parents(nodes: int) -> list[int]:
    """A parent below each node; -1 for the root."""
    generator = torch.Generator().manual_seed(TREE_SEED)
    return [-1] + [int(torch.randint(0, i, (), generator=generator)) for i in range(1, nodes)]


def attention_cases() -> Iterator[Case]:
    """Every model and context with one node and with 64; then 128 nodes, a batch and a cache of 8 bits."""
    for model in (SEVEN, THIRTEEN, GROUPED):
        for context in CONTEXTS:
            for nodes in NODES:
                yield attention_case(
                    model,
                    [context],
                    nodes,
                    compared=(model, context, nodes) in COMPARED,
                    other_cuts=(model, context, nodes) in OTHER_CUTS,
                )
    yield attention_case(SEVEN, [4096], 128, other_cuts=True)
    yield attention_case(SEVEN, [300 + 113 * i for i in range(16)], 16)
    for model in (SEVEN, GROUPED):
        yield attention_case(model, [8192], 64, dtype=torch.float8_e4m3fn)
    yield Case("pack_ancestors", "64 nodes", 64 * (4 + 8), lambda place: packing(place, 64), facts={"nodes": 64})


def attention_case(
    model: Model,
    lengths: list[int],
    nodes: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    compared: bool = False,
    other_cuts: bool = False,
) -> Case:
    """Trees of `nodes` nodes behind prefixes of `lengths` slots.

    Args:
        dtype: of the cache; queries are bf16.
        compared: whether FlexAttention and FlashInfer are tried.
        other_cuts: whether ours is timed under other cuts, too.
    """
    slots = sum(length + nodes for length in lengths)
    cache_bytes = 2 * dtype.itemsize * model.kv_heads * slots * HEAD_DIM
    prefix = f"{lengths[0]} slots"
    if len(lengths) > 1:
        prefix = f"{len(lengths)} answers of {lengths[0]} to {lengths[-1]} slots"
    kept = "" if dtype == torch.bfloat16 else ", e4m3"
    return Case(
        "tree_attention",
        f"{model.name}, {prefix}, {nodes} node{'s' * (nodes > 1)}{kept}",
        cache_bytes + 2 * 2 * len(lengths) * nodes * model.heads * HEAD_DIM,
        lambda place: attention_problem(place, model, lengths, nodes, dtype, compared, other_cuts),
        flops=4 * nodes * model.heads * HEAD_DIM * slots,
        facts={
            "kv": max(lengths),
            "nodes": nodes,
            "batch": len(lengths),
            "group": model.heads // model.kv_heads,
            "cache_bits": 8 * dtype.itemsize,
            "compared": compared,
        },
    )


def attention_problem(
    place: Place,
    model: Model,
    lengths: list[int],
    nodes: int,
    dtype: torch.dtype,
    compared: bool,
    other_cuts: bool,
) -> Problem:
    batch, longest = len(lengths), max(lengths) + nodes
    capacity = -(-(max(lengths) + ROOM) // SLAB_STEP) * SLAB_STEP
    layers = place.turns(2 * dtype.itemsize * batch * model.kv_heads * longest * HEAD_DIM)
    slab = place.randn(layers, 2, batch, model.kv_heads, capacity, HEAD_DIM)
    seen = torch.arange(longest, device=place.device) < place.int32(lengths)[:, None] + nodes
    slab[..., longest:, :] = torch.nan
    slab[..., :longest, :].masked_fill_(~seen[:, None, :, None], torch.nan)  # what nobody may read
    scales: dict[str, Any] = {}
    plain = slab
    if dtype != slab.dtype:
        scale = torch.full((model.kv_heads,), FP8_SCALE, device=place.device)
        scales = {"k_scale": scale, "v_scale": scale}
        slab = torch.stack([(layer / FP8_SCALE).clamp(-448, 448).to(dtype) for layer in slab])
        plain = torch.stack([layer.to(plain.dtype) * FP8_SCALE for layer in slab])
    q = place.randn(batch, nodes, model.heads, HEAD_DIM)
    kv_len = place.int32(lengths)
    words = pack_ancestors(place.int32([random_parents(nodes)]).expand(batch, -1).contiguous())
    bits = ((words[..., None] >> torch.arange(64, device=place.device)) & 1).bool().flatten(2)[..., :nodes]
    mask = torch.zeros(batch, 1, nodes, longest, dtype=torch.bool, device=place.device)
    for row, tree, length in zip(mask, bits, lengths, strict=True):
        row[..., :length] = True
        row[..., length : length + nodes] = tree
    # SDPA reads what it masks.
    clean = plain[..., :longest, :] if batch == 1 else plain[..., :longest, :].nan_to_num(0.0)

    def run(layer: int) -> torch.Tensor:
        return tree_attention(q, slab[layer, 0], slab[layer, 1], kv_len, words, **scales)

    def sdpa(layer: int) -> torch.Tensor:
        rows, grouped = q.transpose(1, 2), model.heads != model.kv_heads
        out = F.scaled_dot_product_attention(rows, clean[layer, 0], clean[layer, 1], mask, enable_gqa=grouped)
        return out.transpose(1, 2)

    def check(name: str, call: Call) -> None:
        exact = reference.tree_attention(q.double(), *clean[0].double(), kv_len, words)
        require_close(name, call(0), sdpa(0), exact)

    def checked(name: str, call: Call) -> Call:
        """A baseline that attends to something else would be no baseline."""
        check(name, call)
        return call

    baselines: dict[str, Callable[[], Call]] = {"SDPA with a mask": lambda: sdpa}
    slow: dict[str, Callable[[], Call]] = {}
    if compared:
        slow[FLEX] = lambda: checked("FlexAttention", flex(place, q, clean, mask, model))
        slow[FLASHINFER] = lambda: checked("FlashInfer", flashinfer(q, clean, mask))
    if other_cuts:
        rows = nodes * model.heads // model.kv_heads
        for name, config in cuts(capacity, model, rows, q.dtype):
            call = cut_call(q, slab, kv_len, words, model, config)
            slow[f"ours, {name}"] = lambda name=name, call=call: checked(name, call)
    return Problem(lambda: check("tree_attention", run), run, layers, baselines, slow)


def cuts(capacity: int, model: Model, rows: int, dtype: torch.dtype) -> Iterator[tuple[str, TreeAttentionConfig]]:
    """Other cuts than the default: what to choose is to be measured."""
    default = default_config(capacity, model.kv_heads, dtype, rows)
    yield "the last arriver merges", replace(default, last_merges=True)
    if capacity <= 4096:
        yield "no split", replace(default, split=capacity, block_n=32)
    yield "half the programs", replace(default, split=2 * default.split)
    yield "twice the programs", replace(default, split=max(default.block_n, default.split // 128 * 64))
    yield "3 stages", replace(default, num_stages=3)
    other = (64, 4) if default.block_m == 128 else (128, 8)
    yield f"tiles of {other[0]} rows", replace(default, block_m=other[0], num_warps=other[1])


def cut_call(
    q: torch.Tensor,
    slab: torch.Tensor,
    kv_len: torch.Tensor,
    words: torch.Tensor,
    model: Model,
    config: TreeAttentionConfig,
) -> Call:
    """Ours under an explicit cut; its counters, where it needs some, are kept from call to call."""
    count = count_arrivals(q, model.kv_heads, config)
    arrivals = torch.zeros(count, dtype=torch.int32, device=q.device) if config.last_merges else None

    def call(layer: int) -> torch.Tensor:
        k, v = slab[layer]
        return launch_tree_attention(q, k, v, kv_len, words, HEAD_DIM**-0.5, config, arrivals=arrivals)

    return call


def flex(place: Place, q: torch.Tensor, clean: torch.Tensor, mask: torch.Tensor, model: Model) -> Call:
    """FlexAttention with a mask that looks up the tree where it is, and nothing where the prefix is."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    nodes, length = mask.shape[2:]
    prefix, tree = length - nodes, mask[0, 0, :, length - nodes :].contiguous()

    def visible(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        return (slot < prefix) | tree[i, (slot - prefix).clamp(min=0)]

    blocks = create_block_mask(visible, None, None, nodes, length, device=str(q.device))
    attend = place.compiled(flex_attention, mode="max-autotune-no-cudagraphs", dynamic=False)
    rows, grouped = q.transpose(1, 2), model.heads != model.kv_heads
    return lambda layer: attend(
        rows, clean[layer, 0], clean[layer, 1], block_mask=blocks, enable_gqa=grouped
    ).transpose(1, 2)


def flashinfer(q: torch.Tensor, clean: torch.Tensor, mask: torch.Tensor) -> Call:
    """FlashInfer's prefill of one prompt under a custom mask."""
    try:
        from flashinfer import single_prefill_with_kv_cache
    except ImportError as error:
        raise UnavailableError(f"cannot be imported: {error}") from error
    return lambda layer: single_prefill_with_kv_cache(
        q[0], clean[layer, 0, 0], clean[layer, 1, 0], custom_mask=mask[0, 0], kv_layout="HND"
    )[None]


def packing(place: Place, nodes: int) -> Problem:
    parents = place.int32([random_parents(nodes)])

    def check() -> None:
        require(torch.equal(pack_ancestors(parents), reference.pack_ancestors(parents)), "pack_ancestors is wrong")

    return Problem(check, lambda _: pack_ancestors(parents), 16, {})
