"""Every kernel compiles for GPUs that are not there, spills nothing and fits the shared memory."""

import re
from unittest import mock

import pytest
import torch
from triton.runtime.jit import JITFunction

from specvlm_kernels.attention_config import default_config
from specvlm_kernels.tree_attention import launch_tree_attention
from tests.kernels.aot import SHARED_LIMIT, TABLE, Case, cases, compile_case, compiling, meta, read_table, versions
from tests.kernels.watch import package_kernels

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(
    "architecture",
    ["sm_90", "gfx942", pytest.param("sm_80", marks=pytest.mark.slow), pytest.param("sm_100", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case.quick else pytest.mark.slow, id=case.name) for case in cases()]
)
def test_compiles_without_spills(case: Case, architecture: str):
    used = compile_case(case, architecture)
    assert used, "the launcher started no kernel"
    for usage in used:
        assert usage.spills == 0, usage
        assert usage.stack == 0, usage
        assert usage.shared <= SHARED_LIMIT[architecture], usage
    if f"{versions()}." not in TABLE.read_text():
        pytest.skip(f"nothing spills; registers are not compared, as another compiler than {versions()} made the table")
    recorded = read_table(TABLE.read_text()).get((case.name, architecture))
    assert recorded, f"python -m tests.kernels.aot bench/results/aot.md '^{case.name}$'"
    assert [usage.kernel for usage in used] == [usage.kernel for usage in recorded]
    for usage, before in zip(used, recorded, strict=True):
        assert usage.registers <= before.registers, f"it took {before.registers}: {usage}"
        assert usage.shared <= before.shared, f"it took {before.shared}: {usage}"


def test_the_cases_start_every_kernel():
    started = set()
    with (
        compiling("sm_90"),
        mock.patch.object(JITFunction, "run", lambda kernel, *_, **__: started.add(kernel.__name__)),
    ):
        for case in cases():
            case.launch()
    assert started == package_kernels()


@pytest.mark.parametrize("head_dim", [72, 128])
def test_one_binary_serves_every_number_of_rows(head_dim):
    """Why a row's bits cannot depend on its company: under one cut there is no other code for it to run through.

    Once the company told by where kv_len and the ancestors began, and by the strides of q where D is no multiple of 16.
    """
    slab, config = meta(2, 3, 4, 1024, head_dim), default_config(1024, 4, torch.bfloat16)
    with compiling("sm_90") as binaries:
        for batch, queries, words in ((1, 1, 1), (1, 2, 1), (1, 16, 1), (3, 17, 1), (2, 64, 1), (1, 128, 2), (1, 3, 2)):
            k, v = slab[0, :batch], slab[1, :batch]
            for first in (0, 1):  # the second: not aligned to 16 bytes
                kv_len = meta(first + batch, dtype=torch.int32)[first:]
                ancestors = meta(first + batch * queries * words, dtype=torch.int64)[first:].view(batch, queries, words)
                for q in (meta(batch, queries, 8, head_dim), meta(batch, 8, queries, head_dim).transpose(1, 2)):
                    launch_tree_attention(q, k, v, kv_len, ancestors, head_dim**-0.5, config)
    assert len(set(binaries)) == 2, "one for the splits, one to merge them"


#: An instruction in PTX that may round, or compares, or hands on to another thread. What a tile of keys is converted by
#: is left out: it is exact, and every key is converted once by whichever thread.
ARITHMETIC = re.compile(r"^\s*(?:@!?%p\d+\s+)?((?:wgmma|fma|mul|add|sub|div|max|ex2|lg2|shfl)[.:][\w.:]+)", re.M)


@pytest.mark.parametrize("capacity", [4096, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float8_e4m3fn, marks=pytest.mark.slow)])
@pytest.mark.parametrize("heads", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_a_tall_tile_computes_a_row_as_a_low_one_does(capacity, dtype, heads):
    """Why more than 64 rows may take another binary: floating-point instructions come in the same order, on the same
    tile of the tensor cores; what is added finds out which warp runs, and tells one half which slots the other sees."""
    slab = meta(2, 1, 4, capacity, 128, dtype=dtype)
    scale = meta(4, dtype=torch.float32) if dtype == torch.float8_e4m3fn else None
    kv_len, words = meta(1, dtype=torch.int32), meta(1, 64, 1, dtype=torch.int64)
    sequences, tiles = [], []
    for rows in (64, 65):
        with compiling("sm_90") as binaries:
            cut = default_config(capacity, 4, torch.bfloat16, rows, cache_dtype=dtype)
            launch_tree_attention(
                meta(1, 64, heads, 128), slab[0], slab[1], kv_len, words, 0.1, cut, k_scale=scale, v_scale=scale
            )
        found = ARITHMETIC.findall(binaries[0].asm["ptx"])
        shuffles = [name for name in found if name.startswith("shfl")]
        floats = [name for name in found if "f32" in name or "wgmma" in name]
        sequences.append((floats, len([name for name in shuffles if "bfly" in name])))
        tiles.append(cut.block_m)
    (low, low_shuffles), (tall, tall_shuffles) = sequences
    assert tiles == [64, 128]
    assert any("m64" in name for name in low)
    assert low == tall
    assert tall_shuffles - low_shuffles == 2, "one of each half of the 64 bits, between twice as many warps"


def test_other_architectures_have_one_tile():
    for architecture in ("sm_80", "sm_100", "gfx942"):
        with compiling(architecture):
            cuts = {default_config(4096, 8, torch.bfloat16, rows) for rows in (1, 64, 65, 512)}
        assert len(cuts) == 1
