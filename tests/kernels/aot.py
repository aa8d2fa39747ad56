"""Compiles the kernels for GPUs that are not there, through the launchers that serve real ones.

A launcher gets meta tensors of a model's shapes, on a driver that names an architecture and launches nothing. So the
signature, the constants and what Triton specialises on are the launcher's own, and cannot drift from it. What comes
back is the binary, whose registers, spills and shared memory are read here.

    python -m tests.kernels.aot [FILE [PATTERN]]      prints, or writes, the table of all cases on all architectures;
                                                      with a pattern, only cases whose names match are compiled anew
"""

import contextlib
import functools
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from specvlm_kernels.acceptance import launch_keys, launch_merge, launch_walk
from specvlm_kernels.ancestors import launch_pack_ancestors
from specvlm_kernels.attention_config import TreeAttentionConfig, default_config
from specvlm_kernels.decoder_linear import (
    launch_gated_linear,
    launch_linear,
    linear_config,
    parts_config,
    parts_of,
)
from specvlm_kernels.decoder_ops import launch_add_rms_norm, launch_gated_silu
from specvlm_kernels.distillation import SOFT_CROSS_ENTROPY, TOTAL_VARIATION, LossKernels, launch_grad, launch_loss
from specvlm_kernels.drafting import launch_draft_topk
from specvlm_kernels.kv_cache import launch_compact_kv, launch_write_kv
from specvlm_kernels.noise import launch_noise
from specvlm_kernels.ratio_acceptance import launch_accept_ratio
from specvlm_kernels.relaxed_acceptance import launch_accept_typical
from specvlm_kernels.rotary import launch_rotary_linear, launch_rotary_write_kv
from specvlm_kernels.token_pooling import (
    launch_conv_tokens,
    launch_conv_tokens_backward_tokens,
    launch_conv_tokens_backward_weight,
    launch_pool_tokens,
    launch_pool_tokens_backward,
)
from specvlm_kernels.token_pruning import launch_prune_tokens, launch_prune_tokens_backward
from specvlm_kernels.token_resampling import launch_resample_tokens, launch_resample_tokens_backward
from specvlm_kernels.tree_attention import launch_tree_attention
from specvlm_kernels.tree_growth import launch_rerank_tree, launch_select_beam

ARCHITECTURES = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

#: Bytes of shared memory (LDS) that one block may have.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model the kernels see."""

    name: str
    heads: int
    kv_heads: int
    layers: int
    vocab: int
    inner: int
    head_dim: int = 128

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


MODELS = (
    Shape("LLaVA-1.5-7B", 32, 32, 32, 32064, 11008),
    Shape("LLaVA-1.5-13B", 40, 40, 40, 32064, 13824),
    Shape("GQA 32/8", 32, 8, 32, 128256, 14336),
)
CAPACITY, NODES, TAUGHT = 1024, 64, 512


@dataclass(frozen=True, slots=True)
class Case:
    """A launch to compile: one family of kernels at one model's shapes."""

    name: str
    launch: Callable[[], object]
    quick: bool = True  # whether the fast tests compile it


@dataclass(frozen=True, slots=True)
class Usage:
    """What one binary takes of a multiprocessor."""

    kernel: str
    registers: int
    spills: int
    stack: int
    shared: int


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without memory; Triton sees an aligned pointer."""
    return torch.empty(shape, dtype=dtype, device="meta")


def attention_case(
    name: str,
    model: Shape,
    dtype: torch.dtype = torch.bfloat16,
    capacity: int = CAPACITY,
    *,
    nodes: int = NODES,
    cache_dtype: torch.dtype | None = None,
    config: TreeAttentionConfig | None = None,
    with_lse: bool = False,
) -> Case:
    """Under the cut that the architecture has by default, where none is given."""
    q = meta(1, nodes, model.heads, model.head_dim, dtype=dtype)
    slab = meta(model.layers, 2, 1, model.kv_heads, capacity, model.head_dim, dtype=cache_dtype or dtype)
    kv_len, words = meta(1, dtype=torch.int32), meta(1, nodes, -(-nodes // 64), dtype=torch.int64)
    lse = meta(1, nodes, model.heads, dtype=torch.float32) if with_lse else None
    scale = None if cache_dtype is None else meta(model.kv_heads, dtype=torch.float32)
    rows = nodes * model.heads // model.kv_heads

    def launch() -> None:
        cut = config or default_config(capacity, model.kv_heads, dtype, rows, cache_dtype=cache_dtype)
        keys, values = slab[0, 0], slab[0, 1]
        launch_tree_attention(q, keys, values, kv_len, words, 0.1, cut, k_scale=scale, v_scale=scale, lse=lse)

    return Case(name, launch)


def other_attention_cases() -> Iterator[Case]:
    """Dtypes, 128 nodes, a slab of one split, a cache of 8 bits, cuts that are not the default."""
    model, grouped, fp8 = MODELS[0], MODELS[2], torch.float8_e4m3fn
    yield attention_case("tree_attention fp32", model, torch.float32)
    yield attention_case("tree_attention fp16, one split", model, torch.float16, capacity=128)
    yield attention_case("tree_attention 128 nodes", model, nodes=128, with_lse=True)
    yield replace(attention_case("tree_attention fp16, 128 nodes", model, torch.float16, nodes=128), quick=False)
    yield replace(attention_case("tree_attention 128 nodes, one split", model, capacity=128, nodes=128), quick=False)
    yield attention_case("tree_attention e4m3", model, cache_dtype=fp8, with_lse=True)
    yield replace(
        attention_case("tree_attention e4m3, fp16, GQA", grouped, torch.float16, cache_dtype=fp8), quick=False
    )
    yield replace(attention_case("tree_attention e4m3, one split", model, capacity=128, cache_dtype=fp8), quick=False)
    yield replace(attention_case("tree_attention e4m3, fp32", model, torch.float32, cache_dtype=fp8), quick=False)
    last = TreeAttentionConfig(split=128, block_n=32, last_merges=True)
    yield replace(attention_case("tree_attention, the last arriver merges", model, config=last), quick=False)
    whole = TreeAttentionConfig(split=CAPACITY, block_n=32)
    yield replace(attention_case("tree_attention, no split", model, config=whole), quick=False)


def growth_cases() -> Iterator[Case]:
    """A beam of the usual width and of the widest, and the tree of what has grown."""
    for width in (10, 64):
        tokens, scores = meta(1, width * width, dtype=torch.int64), meta(1, width * width, dtype=torch.float32)
        ancestors = meta(1, width, 1, dtype=torch.int64)
        beam = functools.partial(launch_select_beam, tokens, scores, ancestors, width, 0)
        yield Case(f"select_beam of {width}", beam, quick=width == 10)
    for count in (510, 2048):
        tokens, scores = meta(1, count, dtype=torch.int64), meta(1, count, dtype=torch.float32)
        root, depths = meta(1, dtype=torch.int64), meta(count, dtype=torch.int32)
        tree = functools.partial(launch_rerank_tree, root, tokens, tokens, scores, depths, NODES, NODES)
        yield Case(f"rerank_tree of {count}", tree, quick=count == 510)


def fp8_cache_cases() -> Iterator[Case]:
    """What goes into a cache of 8 bits, and moves there."""
    model = MODELS[0]
    slab = meta(model.layers, 2, 1, model.kv_heads, CAPACITY, model.head_dim, dtype=torch.float8_e4m3fn)
    new, scale = (
        meta(1, NODES, model.kv_heads, model.head_dim).transpose(1, 2),
        meta(model.kv_heads, dtype=torch.float32),
    )
    kv_len, path = meta(1, dtype=torch.int32), meta(1, NODES, dtype=torch.int32)
    yield Case("write_kv e4m3", lambda: launch_write_kv(slab[0, 0], slab[0, 1], new, new, kv_len, scale, scale))
    columns, rotation = 3 * model.heads * model.head_dim, meta(4096, model.head_dim // 2, dtype=torch.float32)
    rest, cut = (rotation, rotation, path, *slab[0], kv_len, scale, scale), linear_config(columns // 2, torch.bfloat16)
    yield Case("rotary_write_kv e4m3", lambda: launch_rotary_write_kv(meta(1, NODES, columns), *rest))
    x, qkv = meta(1, NODES, model.width), meta(columns, model.width)
    yield Case("rotary_linear e4m3", lambda: launch_rotary_linear(x, qkv, None, *rest, config=cut))
    yield Case("compact_kv e4m3", lambda: launch_compact_kv(slab, kv_len, path, kv_len))


def attention_cases(model: Shape) -> Iterator[Case]:
    yield attention_case(f"tree_attention {model.name}", model)


def cache_cases(model: Shape) -> Iterator[Case]:
    slab = meta(model.layers, 2, 1, model.kv_heads, CAPACITY, model.head_dim)
    new = meta(1, NODES, model.kv_heads, model.head_dim).transpose(1, 2)
    kv_len, path = meta(1, dtype=torch.int32), meta(1, NODES, dtype=torch.int32)
    yield Case(f"write_kv {model.name}", lambda: launch_write_kv(slab[0, 0], slab[0, 1], new, new, kv_len))
    yield Case(f"compact_kv {model.name}", lambda: launch_compact_kv(slab, kv_len, path, kv_len))


def decoder_cases(model: Shape) -> Iterator[Case]:
    """What lies between a layer's products, and the products; the fast tests compile them at one model's shapes."""
    for case in (*between_cases(model), *linear_cases(model)):
        yield replace(case, quick=model is MODELS[0])


def between_cases(model: Shape) -> Iterator[Case]:
    columns = (model.heads + 2 * model.kv_heads) * model.head_dim
    slab = meta(model.layers, 2, 1, model.kv_heads, CAPACITY, model.head_dim)
    table = meta(4096, model.head_dim // 2, dtype=torch.float32)
    kv_len, positions = meta(1, dtype=torch.int32), meta(1, NODES, dtype=torch.int32)
    x, weight = meta(1, NODES, model.width), meta(model.width)
    parts = meta(4, 1, NODES, model.width, dtype=torch.float32)
    yield Case(f"add_rms_norm {model.name}", lambda: launch_add_rms_norm(x, x, weight, 1e-5))
    yield Case(f"add_rms_norm of parts {model.name}", lambda: launch_add_rms_norm(parts, x, weight, 1e-5))
    yield Case(
        f"rotary_write_kv {model.name}",
        lambda: launch_rotary_write_kv(
            meta(1, NODES, columns), table, table, positions, slab[0, 0], slab[0, 1], kv_len
        ),
    )
    yield Case(f"gated_silu {model.name}", lambda: launch_gated_silu(meta(1, NODES, 2 * model.inner)))


def linear_cases(
    model: Shape, dtype: torch.dtype = torch.bfloat16, bias: bool = False, weight_dtype: torch.dtype | None = None
) -> Iterator[Case]:
    """A layer's products and the head's, with the cut that the ops choose; no `weight_dtype`: the dtype."""
    held = weight_dtype or dtype
    columns = (model.heads + 2 * model.kv_heads) * model.head_dim
    slab = meta(model.layers, 2, 1, model.kv_heads, CAPACITY, model.head_dim, dtype=dtype)
    table = meta(4096, model.head_dim // 2, dtype=torch.float32)
    kv_len, positions = meta(1, dtype=torch.int32), meta(1, NODES, dtype=torch.int32)
    x, inner = meta(1, NODES, model.width, dtype=dtype), meta(1, NODES, model.inner, dtype=dtype)

    def scale(rows: int) -> torch.Tensor | None:
        return None if weight_dtype is None else meta(rows, dtype=torch.float32)

    def rotary() -> None:
        cut = linear_config(columns // 2, dtype, held)
        qkv, qkv_bias = meta(columns, model.width, dtype=held), meta(columns, dtype=dtype) if bias else None
        cache = slab[0, 0], slab[0, 1], kv_len
        launch_rotary_linear(x, qkv, qkv_bias, table, table, positions, *cache, config=cut, scale=scale(columns))

    def parts() -> None:
        down, cut = meta(model.width, model.inner, dtype=held), parts_config(dtype, held)
        launch_linear(inner, down, None, cut, parts_of(*down.shape, cut), scale(model.width))

    def gated() -> None:
        gate_up, cut = meta(2 * model.inner, model.width, dtype=held), linear_config(model.inner, dtype, held)
        launch_gated_linear(x, gate_up, cut, scale(2 * model.inner))

    def head() -> None:
        weight, cut = meta(model.vocab, model.width, dtype=held), linear_config(model.vocab // 2, dtype, held)
        launch_linear(x, weight, meta(model.vocab, dtype=dtype) if bias else None, cut, None, scale(model.vocab))

    for name, launch in (("rotary_linear", rotary), ("linear_parts", parts), ("gated_linear", gated), ("linear", head)):
        yield Case(f"{name} {model.name}", launch)


def draw_cases(model: Shape) -> Iterator[Case]:
    logits = meta(1, NODES, model.vocab)
    positions = meta(1, NODES, dtype=torch.int32)
    tokens, parents = meta(1, NODES, dtype=torch.int64), meta(1, NODES, dtype=torch.int32)
    settings = {
        "greedy": (0.0, 0, 1.0, None),
        "sampled": (1.0, 0, 1.0, meta(1, dtype=torch.int64)),
        "filtered": (
            meta(1, dtype=torch.float32),
            meta(1, dtype=torch.int64),
            meta(1, dtype=torch.float32),
            meta(1, dtype=torch.int64),
        ),
    }
    for name, (temperature, top_k, top_p, seed) in settings.items():

        def keys(temperature: Any = temperature, top_k: Any = top_k, top_p: Any = top_p, seed: Any = seed) -> Any:
            return launch_keys(logits, positions, temperature, top_k, top_p, seed)

        yield Case(f"draw {name} {model.name}", lambda keys=keys: launch_merge(keys()))
    yield Case(f"accept {model.name}", lambda: launch_walk(keys(), tokens, parents))
    yield Case(
        f"accept_typical {model.name}",
        lambda: launch_accept_typical(logits, tokens, parents, positions, 0.09, 0.3, temperature, top_k, top_p, seed),
    )
    for replacement in (False, True):

        def ratio(replacement: bool = replacement) -> Any:
            return launch_accept_ratio(
                logits, logits, tokens, parents, positions, temperature, top_k, top_p, seed, replacement
            )

        kind = "with replacement " if replacement else ""
        yield Case(f"accept_ratio {kind}{model.name}", ratio, quick=not replacement)


def draft_cases(model: Shape) -> Iterator[Case]:
    logits, positions, seed = meta(1, 8, model.vocab), meta(1, 8, dtype=torch.int32), meta(1, dtype=torch.int64)
    exclude, ids = meta(1, dtype=torch.int64), meta(model.vocab // 4, dtype=torch.int64)
    reduced = meta(1, 8, model.vocab // 4)
    yield Case(f"draft_topk greedy {model.name}", lambda: launch_draft_topk(logits, 8, positions, 0.0, None, exclude))
    yield Case(f"draft_topk sampled {model.name}", lambda: launch_draft_topk(logits, 8, positions, 1.0, seed, exclude))
    yield Case(
        f"draft_topk of a quarter of the vocabulary {model.name}",
        lambda: launch_draft_topk(reduced, 8, positions, 1.0, seed, exclude, ids),
    )


def loss_cases(name: str, logits: torch.Tensor, teacher_logits: torch.Tensor) -> Iterator[Case]:
    """Both losses of a draft's distributions, forward and backward."""
    grad = meta(len(logits), dtype=torch.float32)
    for loss, kernels in (("soft_cross_entropy", SOFT_CROSS_ENTROPY), ("total_variation", TOTAL_VARIATION)):

        def both(kernels: LossKernels = kernels) -> None:
            _, kept = launch_loss(kernels, logits, teacher_logits)
            launch_grad(kernels, grad, logits, teacher_logits, kept)

        yield Case(f"{loss} {name}", both)


def token_cases() -> Iterator[Case]:
    """Visual tokens of a picture and of five, as wide as LLaVA's language models, forward and backward."""
    width = 24
    for model, height in itertools.product(MODELS[:2], (24, 120)):
        name, quick = f"{height * width} tokens {model.name}", (model, height) == (MODELS[0], 24)
        for case in (*grid_cases(model, height, width), *selection_cases(model, height * width)):
            yield Case(f"{case.name} {name}", case.launch, quick and case.quick)


def grid_cases(model: Shape, height: int, width: int) -> Iterator[Case]:
    channels = model.heads * model.head_dim
    x, weight, bias = meta(1, height * width, channels), meta(channels, 3, 3), meta(channels)
    pooled, seen = meta(1, height * width // 4, channels), meta(1, (height // 2 - 1) * (width // 2 - 1), channels)
    yield Case("pool_tokens", lambda: launch_pool_tokens(x, height, width, 2))
    yield Case("pool_tokens backward", lambda: launch_pool_tokens_backward(pooled, height, width, 2))
    yield Case("conv_tokens", lambda: launch_conv_tokens(x, height, width, weight, bias, 2))
    yield Case(
        "conv_tokens backward, tokens", lambda: launch_conv_tokens_backward_tokens(seen, height, width, weight, 2)
    )
    yield Case("conv_tokens backward, weight", lambda: launch_conv_tokens_backward_weight(seen, x, width, 3, 2))


def selection_cases(model: Shape, tokens: int) -> Iterator[Case]:
    channels, keep = model.heads * model.head_dim, tokens // 4
    x, scores, query = meta(1, tokens, channels), meta(1, tokens), meta(1, channels)
    kept, indices = meta(1, keep, channels), meta(1, keep, dtype=torch.int64)
    yield Case("prune_tokens", lambda: launch_prune_tokens(x, scores, None, keep), quick=False)
    yield Case("prune_tokens by a query", lambda: launch_prune_tokens(x, None, query, keep))
    yield Case("prune_tokens backward", lambda: launch_prune_tokens_backward(kept, indices, tokens))
    yield resample_case("resample_tokens and backward", model, tokens)


def resample_case(name: str, model: Shape, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Forward and backward: most of their products are the same."""
    channels, count = model.heads * model.head_dim, 2
    queries = meta(count, model.heads, model.head_dim, dtype=dtype)
    x, out = meta(1, tokens, channels, dtype=dtype), meta(1, count, channels, dtype=dtype)
    weight = meta(channels, channels, dtype=dtype)

    def launch() -> None:
        _, *saved = launch_resample_tokens(x, queries, weight, weight, 0.1)
        launch_resample_tokens_backward(out, x, queries, weight, weight, *saved, 0.1, True)

    return Case(name, launch)


def shared_cases() -> Iterator[Case]:
    """What sees nothing of a model, or its vocabulary alone."""
    parents, positions = meta(1, NODES, dtype=torch.int32), meta(1, NODES, dtype=torch.int32)
    seed = meta(1, dtype=torch.int64)
    yield Case("pack_ancestors", lambda: launch_pack_ancestors(parents))
    for name, dtype in (("race_noise", torch.float32), ("philox_integers", torch.int64)):
        out = meta(1, NODES, 32064, dtype=dtype)
        yield Case(name, lambda out=out: launch_noise(positions, seed, out, 0, 0))
    for vocabulary in (32000, 152064):
        yield from loss_cases(f"V {vocabulary}", meta(TAUGHT, vocabulary), meta(TAUGHT, vocabulary))


def other_cases() -> Iterator[Case]:
    """What the cases above leave out: other dtypes, the largest tree, settings by row, strides."""
    model = MODELS[0]
    for dtype in (torch.float32, torch.float16):
        for case in linear_cases(model, dtype, bias=True):
            yield replace(case, name=f"{case.name}, {str(dtype).removeprefix('torch.')}, biased", quick=False)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for case in linear_cases(model, dtype, bias=True, weight_dtype=torch.float8_e4m3fn):
            yield Case(f"{case.name}, {name}, biased, e4m3 weight", case.launch, quick=False)
    for case in linear_cases(MODELS[2], weight_dtype=torch.float8_e4m3fn):
        yield Case(f"{case.name}, e4m3 weight", case.launch, quick=case.name.startswith("linear_parts"))
    yield replace(resample_case("resample_tokens and backward, fp32", model, 576, torch.float32), quick=False)
    keys, tokens = meta(1, 128, 32, dtype=torch.int64), meta(1, 128, dtype=torch.int64)
    parents = meta(1, 128, dtype=torch.int32)
    yield Case("walk of 128 nodes", lambda: launch_walk(keys, tokens, parents))
    logits, positions, seed = meta(1, 8, model.vocab), meta(1, 8, dtype=torch.int32), meta(1, dtype=torch.int64)
    temperature = meta(1, dtype=torch.float32)
    yield Case(
        "draft_topk by row, nothing excluded", lambda: launch_draft_topk(logits, 8, positions, temperature, seed, None)
    )
    turned = meta(8193, TAUGHT, dtype=torch.float16).T
    yield from loss_cases("fp32, teacher fp16 and turned, V 8193", meta(TAUGHT, 8193, dtype=torch.float32), turned)


#: A family of kernels: what it launches at a model's shapes. A new kernel file adds a line.
FAMILIES = (attention_cases, cache_cases, decoder_cases, draw_cases, draft_cases)


def cases() -> list[Case]:
    """Every kernel of the package at every model's shapes, and what these leave out."""
    of_models = [case for model in MODELS for family in FAMILIES for case in family(model)]
    return [
        *of_models,
        *shared_cases(),
        *token_cases(),
        *other_attention_cases(),
        *fp8_cache_cases(),
        *growth_cases(),
        *other_cases(),
    ]


class _OfflineDriver:
    """Stands where Triton's driver does: names the target, has nothing to launch on."""

    def __init__(self, architecture: str):
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return ARCHITECTURES[self.architecture]

    def get_current_device(self) -> str:
        return self.architecture  # the key of a kernel's cache of binaries

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def compiling(architecture: str) -> Iterator[list[Any]]:
    """Within it a launch compiles for `architecture` and appends the binary to the list that it yields."""
    binaries: list[Any] = []
    run, active = JITFunction.run, driver._active

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        binaries.append(run(self, *args, grid=grid, warmup=True, **options))
        return binaries[-1]

    driver.set_active(_OfflineDriver(architecture))
    JITFunction.run = compile_only
    try:
        yield binaries
    finally:
        JITFunction.run = run
        driver._active = active


def compile_case(case: Case, architecture: str) -> list[Usage]:
    """Compiles all kernels that a launch starts and reads what they use."""
    with compiling(architecture) as binaries:
        case.launch()
    return [
        _amd_usage(binary.metadata.name, binary.metadata.shared, binary.asm["amdgcn"])
        if architecture.startswith("gfx")
        else _nvidia_usage(binary.metadata.name, binary.metadata.shared, binary.asm["cubin"])
        for binary in binaries
    ]


@lru_cache
def _nvidia_usage(kernel: str, shared: int, cubin: bytes) -> Usage:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tools / "cuobjdump", "-res-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        command = [tools / "nvdisasm", "-c", file.name]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    stack = numbers["STACK"] + numbers["LOCAL"]
    return Usage(kernel, numbers["REG"], spills, stack, shared)


def _amd_usage(kernel: str, shared: int, assembly: str) -> Usage:
    numbers = {name: int(number) for name, number in re.findall(r"\.(\w+): +(\d+)\n", assembly)}
    registers = numbers["vgpr_count"]
    spills = numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]
    stack = numbers["private_segment_fixed_size"]
    return Usage(kernel, registers, spills, stack, shared)


#: The table in the repository, which the tests hold what they compile against.
TABLE = Path(__file__).parents[2] / "bench" / "results" / "aot.md"

#: By case and architecture: what each binary of a launch takes, in the order of the launches.
Usages = dict[tuple[str, str], list[Usage]]


def versions() -> str:
    """What compiled: another compiler's registers are no regression."""
    return f"triton {triton.__version__}"


def read_table(text: str) -> Usages:
    """What a table says."""
    usages: Usages = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[2] in ARCHITECTURES:
            numbers = [int(cell) for cell in cells[3:]]
            usages.setdefault((cells[0], cells[2]), []).append(Usage(cells[1].strip("`"), *numbers))
    return usages


def table(usages: Usages) -> str:
    """A Markdown table with a line a binary."""
    lines = [
        "| case | kernel | architecture | registers | spills | stack bytes | shared bytes |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for (case, architecture), used in usages.items():
        for use in used:
            numbers = f"{use.registers} | {use.spills} | {use.stack} | {use.shared}"
            lines.append(f"| {case} | `{use.kernel}` | {architecture} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints the table, or writes it to the file named on the command line."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    pattern = sys.argv[2] if len(sys.argv) > 2 else ""
    known = read_table(file.read_text()) if file and pattern else {}
    usages: Usages = {}
    for case in cases():
        for architecture in ARCHITECTURES:
            key = case.name, architecture
            fresh = key not in known or re.search(pattern, case.name)
            usages[key] = compile_case(case, architecture) if fresh else known[key]
    text = (
        "# Kernels compiled ahead of time\n\n"
        f"bf16, slab of {CAPACITY} slots, {NODES} nodes where a case does not say otherwise, batch 1; {versions()}. "
        "Compiled without a GPU: resources, not speed.\n"
        "Spills: NVIDIA, local-memory instructions in the binary; AMD, spilled vector and scalar registers.\n\n"
        + table(usages)
    )
    if file:
        file.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
