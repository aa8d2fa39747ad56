"""Runs every kernel once on the GPU, on small problems: what compute-sanitizer is given, ``-m tests.kernels.run_once``.

Prints the kernels that it started, and fails if the package has one more.
"""

import sys
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from specvlm.doctor import check_kernels
from specvlm_kernels import compact_kv, rotary_linear, rotary_write_kv, tree_attention, write_kv
from specvlm_kernels.noise import philox_integers, race_noise
from specvlm_kernels.tree_attention import TreeAttentionConfig, launch_tree_attention
from tests.kernels.watch import package_kernels


def others(device: torch.device) -> None:
    """What the doctor's cases leave out: noise by itself, a cache of 8 bits, splits that the last arriver merges."""
    positions, seed = torch.arange(5, dtype=torch.int32, device=device)[None], torch.tensor([7], device=device)
    race_noise(positions, seed, 1003)
    philox_integers(positions, seed, 1003)
    slab = torch.zeros(1, 2, 1, 2, 200, 64, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    new, one = torch.randn(2, 1, 2, 9, 64, device=device).bfloat16(), torch.ones(2, device=device)
    kv_len = torch.tensor([150], dtype=torch.int32, device=device)
    scales = {"k_scale": one, "v_scale": one}
    write_kv(slab[0, 0], slab[0, 1], new[0], new[1], kv_len, **scales)
    turning = torch.ones(200, 32, device=device), torch.ones(200, 32, device=device), positions[:, :3]
    qkv = torch.randn(1, 3, 8 * 64, device=device).bfloat16()
    rotary_write_kv(qkv, *turning, *slab[0], kv_len, **scales)
    rotary_linear(
        qkv, torch.randn(8 * 64, 8 * 64, device=device).bfloat16(), None, *turning, *slab[0], kv_len, **scales
    )
    path = torch.tensor([[2, 3]], dtype=torch.int32, device=device)
    words = torch.ones(1, 9, 1, dtype=torch.int64, device=device)
    q = torch.randn(1, 9, 4, 64, device=device).bfloat16()
    tree_attention(q, slab[0, 0], slab[0, 1], kv_len, words, **scales, return_lse=True)
    compact_kv(slab, kv_len, path, torch.tensor([2], dtype=torch.int32, device=device))
    full = torch.randn(2, 1, 2, 200, 64, device=device).bfloat16()
    launch_tree_attention(q, full[0], full[1], kv_len, words, 0.1, TreeAttentionConfig(split=64, last_merges=True))


def main() -> int:
    started: set[str] = set()
    run = JITFunction.run

    def counted(kernel: JITFunction, *args: object, **options: object) -> object:
        started.add(kernel.__name__)
        return run(kernel, *args, **options)

    device = torch.device("cuda")
    with mock.patch.object(JITFunction, "run", counted):
        wrong = [finding for finding in check_kernels(device, torch.bfloat16) if finding.problem]
        others(device)
    torch.cuda.synchronize()
    missing = sorted(package_kernels() - started)
    print("started:", *sorted(started))
    for finding in wrong:
        print(f"wrong: {finding.op}: {finding.problem}")
    if missing:
        print("not started:", *missing)
    return int(bool(wrong or missing))


if __name__ == "__main__":
    sys.exit(main())
