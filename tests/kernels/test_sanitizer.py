"""compute-sanitizer over one run of every kernel: no access out of bounds, no race in shared memory."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from specvlm_kernels.kv_cache import _compact_kv_kernel, _write_kv_kernel
from specvlm_kernels.noise import _noise_kernel
from specvlm_kernels.rotary import _rotary_linear_kernel, _rotary_write_kv_kernel
from specvlm_kernels.tree_attention import _tree_attention_kernel
from tests.kernels.run_once import others
from tests.kernels.watch import launched

TOOL = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed: memory accesses and races are unchecked")
@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
def test_every_kernel_runs_clean(check):
    """Without torch's pool of memory, which would hide an access behind the end of a tensor."""
    command = [TOOL, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "tests.kernels.run_once"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=220, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    clean = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards"}
    assert clean[check] in done.stdout, done.stdout[-2000:]


@pytest.mark.interpreter
def test_what_it_is_given_runs():
    """Without a GPU: in the interpreter."""
    caches = _write_kv_kernel, _rotary_write_kv_kernel, _rotary_linear_kernel, _compact_kv_kernel
    with launched(_noise_kernel, _tree_attention_kernel, *caches):
        others(torch.device("cpu"))
