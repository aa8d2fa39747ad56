"""Cache writes and compaction in plain torch."""

import torch

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def write_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_len: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """k, v [B, Hkv, T, D] -> slots kv_len + i of the [B, Hkv, S, D] slabs; see `specvlm_kernels`."""
    if k_scale is not None and v_scale is not None:
        k, v = (
            (x.float() / scale[..., None, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
            for x, scale in ((k, k_scale), (v, v_scale))
        )
    starts, rows = kv_len.tolist(), k.shape[2]
    if len(starts) == 1 and starts[0] + rows <= k_cache.shape[2]:  # one answer with room: two copies
        k_cache.narrow(2, starts[0], rows).copy_(k)
        v_cache.narrow(2, starts[0], rows).copy_(v)
        return
    for i_b, start in enumerate(starts):
        fits = min(rows, k_cache.shape[2] - start)
        k_cache[i_b].narrow(1, start, fits).copy_(k[i_b, :, :fits])
        v_cache[i_b].narrow(1, start, fits).copy_(v[i_b, :, :fits])


def compact_kv(cache: torch.Tensor, kv_len: torch.Tensor, path: torch.Tensor, length: torch.Tensor) -> None:
    """Slot kv_len + path[i] of the [L, 2, B, Hkv, S, D] cache -> slot kv_len + 1 + i; see `specvlm_kernels`."""
    capacity = cache.shape[4]
    if cache.dtype == torch.float8_e4m3fn:  # torch indexes bytes, and no fp8
        cache = cache.view(torch.uint8)
    for i_b, (start, nodes, count) in enumerate(zip(kv_len.tolist(), path.tolist(), length.tolist(), strict=True)):
        moves = [
            (start + node, start + 1 + i)
            for i, node in enumerate(nodes[:count])
            if node > i + 1 and start + node < capacity
        ]
        if moves:
            source, target = torch.tensor(moves, device=cache.device).unbind(1)
            cache[:, :, i_b, :, target] = cache[:, :, i_b, :, source]
