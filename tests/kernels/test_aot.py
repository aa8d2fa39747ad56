"""Every kernel compiles for GPUs that are not there, spills nothing and fits the shared memory."""

import importlib
import pkgutil
from unittest import mock

import pytest
import torch
from triton.runtime.jit import JITFunction

import specvlm_kernels
from specvlm_kernels.tree_attention import default_config, launch_tree_attention
from tests.kernels.aot import SHARED_LIMIT, Case, cases, compile_case, compiling, meta

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


def test_the_cases_start_every_kernel():
    names = [f"specvlm_kernels.{module.name}" for module in pkgutil.iter_modules(specvlm_kernels.__path__)]
    members = [x for name in names for x in vars(importlib.import_module(name)).values()]
    kernels = {x.__name__ for x in members if isinstance(x, JITFunction) and x.__name__.endswith("_kernel")}
    started = set()
    with mock.patch.object(JITFunction, "run", lambda kernel, *args, **options: started.add(kernel.__name__)):
        for case in cases():
            case.launch()
    assert started == kernels


@pytest.mark.parametrize("head_dim", [72, 128])
def test_one_binary_serves_every_number_of_rows(head_dim):
    """Why a row's bits cannot depend on its company: there is no other code for it to run through.

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
