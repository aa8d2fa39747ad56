"""Every kernel compiles for GPUs that are not there, spills nothing and fits the shared memory."""

import pytest
import torch

from specvlm_kernels.tree_attention import default_config, launch_tree_attention
from tests.kernels.aot import SHARED_LIMIT, Case, cases, compile_case, compiling, meta

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(
    "architecture",
    ["sm_90", "gfx942", pytest.param("sm_80", marks=pytest.mark.slow), pytest.param("sm_100", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_compiles_without_spills(case: Case, architecture: str):
    used = compile_case(case, architecture)
    assert used, "the launcher started no kernel"
    for usage in used:
        assert usage.spills == 0, usage
        assert usage.stack == 0, usage
        assert usage.shared <= SHARED_LIMIT[architecture], usage


def test_one_binary_serves_every_number_of_rows():
    """Why a row's bits cannot depend on its company: there is no other code for it to run through."""
    slab, config = meta(2, 3, 4, 1024, 128), default_config(1024, 4, torch.bfloat16)
    with compiling("sm_90") as binaries:
        for batch, queries, words in ((1, 1, 1), (1, 2, 1), (1, 16, 1), (3, 17, 1), (2, 64, 1), (1, 128, 2), (1, 3, 2)):
            for q in (meta(batch, queries, 8, 128), meta(batch, 8, queries, 128).transpose(1, 2)):
                kv_len, ancestors = meta(batch, dtype=torch.int32), meta(batch, queries, words, dtype=torch.int64)
                k, v = slab[0, :batch], slab[1, :batch]
                launch_tree_attention(q, k, v, kv_len, ancestors, 128**-0.5, config)
    assert len(set(binaries)) == 2, "one for the splits, one to merge them"
