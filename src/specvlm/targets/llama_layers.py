"""One layer of a Llama-like decoder over kernels, with the weights of transformers' modules: a target's, or a draft's.

q, k and v become one tensor, gate and up another, and the modules' parameters become views of its rows: the modules go
on working, and nothing is held twice.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specvlm.targets.hf_attention import AttentionStep, attend
from specvlm_kernels import (
    add_rms_norm,
    gated_linear,
    gated_silu,
    linear,
    linear_parts,
    rotary_linear,
    rotary_write_kv,
)
from specvlm_kernels.decoder_linear import FEW_ROWS
from specvlm_kernels.fp8 import dequantized_rows, quantize_rows

#: Whose hooks look on and change nothing: transformers leaves them where it was once asked for hidden states.
CAPTURING: Final = "transformers.utils.output_capturing"

#: Cosines and sines [P, D / 2] fp32, a row a position, and the rows' positions [B, T] int32.
Rotation = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix [N, K] as products read it.

    Attributes:
        values: in the dtype of what they are multiplied with, or e4m3.
        scale: [N] fp32 what a row of e4m3 is to be multiplied by; None: the values are not e4m3.
    """

    values: Tensor
    scale: Tensor | None = None

    def quantized(self) -> "Weight":
        """The same in e4m3, with a scale a row; itself, if it is."""
        return Weight(*quantize_rows(self.values)) if self.scale is None else self

    def read(self, dtype: torch.dtype) -> Tensor:
        """The numbers that it stands for: of e4m3 a copy in `dtype`, which is worth it for many rows alone."""
        return self.values if self.scale is None else dequantized_rows(self.values, self.scale, dtype)


@dataclass(frozen=True, slots=True)
class LlamaLayer:
    """One layer's weights, but for the norm that its attention is entered through.

    Attributes:
        qkv: [(Hq + 2 Hkv) * D, K], K the width of what enters attention, and its bias, or None.
        out: [H, Hq * D].
        norm: [H] between attention and feed-forward.
        gate_up: [2 * I, H].
        down: [H, I].
        eps: of the norm.
        scaling: of the scores.
    """

    qkv: Weight
    qkv_bias: Tensor | None
    out: Weight
    norm: Tensor
    gate_up: Weight
    down: Weight
    eps: float
    scaling: float

    def __call__(
        self, normed: Tensor, stream: Tensor, keys: Tensor, values: Tensor, rotation: Rotation, step: AttentionStep
    ) -> tuple[Tensor, Tensor]:
        """What the layer adds to the stream, for `add_rms_norm` to add, and the stream [B, T, H] behind its attention.

        Args:
            normed: [B, T, K] what enters attention.
            stream: [B, T, H] what its output is added to.
            keys, values: [B, Hkv, S, D] the layer's cache, to which the rows' KV is written.
            step: where the rows go in it, and what they see.
        """
        cache = keys, values, step.kv_len if step.first_slot is None else step.first_slot
        few = is_few(normed)
        dtype, qkv = normed.dtype, self.qkv
        if few:
            q = rotary_linear(normed, qkv.values, self.qkv_bias, *rotation, *cache, weight_scale=qkv.scale)
            attended = attend(q, keys, values, step, self.scaling).flatten(2)
            x = linear_parts(attended, self.out.values, weight_scale=self.out.scale)
        else:
            q = rotary_write_kv(F.linear(normed, qkv.read(dtype), self.qkv_bias), *rotation, *cache)
            x = F.linear(attend(q, keys, values, step, self.scaling).flatten(2), self.out.read(dtype))
        normed, stream = add_rms_norm(x, stream, self.norm, eps=self.eps)
        if few:
            inner = gated_linear(normed, self.gate_up.values, weight_scale=self.gate_up.scale)
            return linear_parts(inner, self.down.values, weight_scale=self.down.scale), stream
        return F.linear(gated_silu(F.linear(normed, self.gate_up.read(dtype))), self.down.read(dtype)), stream

    def weights(self) -> tuple[Weight, ...]:
        """What its products read."""
        return self.qkv, self.out, self.gate_up, self.down

    def quantized(self) -> "LlamaLayer":
        """The same layer, whose products read e4m3 with a scale a row."""
        qkv, out, gate_up, down = (weight.quantized() for weight in self.weights())
        return replace(self, qkv=qkv, out=out, gate_up=gate_up, down=down)

    def added(self, more: Tensor, stream: Tensor) -> Tensor:
        """The stream with what the layer adds to it, in one launch; its norm, which comes along, nobody reads."""
        return add_rms_norm(more, stream, self.norm, eps=self.eps)[1]


def is_few(x: Tensor) -> bool:
    """Whether rows [B, T, K] are so few that reading a weight costs more than its product with them."""
    return x.dim() == 3 and x.shape[0] * x.shape[1] <= FEW_ROWS


def product(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x W^T + b [..., N] of [..., K]; for few rows, where no gradient is asked for, by a row's own arithmetic."""
    if torch.is_grad_enabled() or not is_few(x):
        return F.linear(x, weight.read(x.dtype), bias)
    return linear(x, weight.values, bias, weight_scale=weight.scale)


def through(module: nn.Module, x: Tensor) -> Tensor:
    """A module's output [..., N] of [..., K]; of a linear layer that is no more than its weights, for few rows, as
    `product` makes it."""
    if torch.is_grad_enabled() or not is_few(x) or type(module) is not nn.Linear or hooks_why_not(module, "it"):
        return module(x)
    return linear(x, module.weight, module.bias)


def layer_of(layer: Any) -> LlamaLayer:
    """The weights of a decoder layer of transformers', whose projections become views of fused tensors."""
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [one.bias for one in projections]
    return LlamaLayer(
        qkv=Weight(fused([one.weight for one in projections])),
        qkv_bias=None if biases[0] is None else fused(biases),
        out=Weight(attention.o_proj.weight.detach()),
        norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=Weight(fused([mlp.gate_proj.weight, mlp.up_proj.weight])),
        down=Weight(mlp.down_proj.weight.detach()),
        eps=float(layer.post_attention_layernorm.variance_epsilon),
        scaling=float(attention.scaling),
    )


def layer_why_not(layer: Any) -> str | None:
    """What keeps `layer_of` from a layer of transformers', as "name: expected X, got Y"; None: nothing."""
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    others = [attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    for one in (*projections, *others):
        if type(one) is not nn.Linear:  # an adapter, a quantised weight
            return f"projections: expected Linear, got {type(one).__name__}"
    if any(one.bias is not None for one in others):
        return "bias: expected none but of q, k and v, got one"
    if len({one.bias is None for one in projections}) > 1:
        return "bias: expected one for each of q, k and v, or none, got some"
    return None


def hooks_why_not(module: nn.Module, itself: str) -> str | None:
    """What of a module's forward, called `itself`, its weights do not tell, as in `layer_why_not`; None: nothing."""
    for name, part in module.named_modules():
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        if any(getattr(hook, "__module__", None) != CAPTURING for hook in hooks) or "forward" in vars(part):
            return f"hooks: expected none, got one on {name or itself}"
    return None


@torch.no_grad()
def rotary_tables(rotary: nn.Module, count: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [count, head_dim / 2] in fp32 of a rotary module of transformers', a row a position.

    Raises:
        ValueError: the module does not turn a head's two halves by the same angles.
    """
    buffer = next(rotary.buffers())
    tables = rotary(buffer.new_empty(0, dtype=torch.float32), torch.arange(count, device=buffer.device)[None])
    half = head_dim // 2
    for table in tables:
        if table.shape[-1] != 2 * half or not torch.equal(table[..., :half], table[..., half:]):
            raise ValueError(
                f"own decoder: expected rotations of a head's {2 * half} elements in two halves of equal angles, got a "
                f"table {list(table.shape)}"
            )
    cos, sin = (table[0, :, :half].contiguous() for table in tables)
    return cos, sin


#: Answers of several threads may fuse the same weights: the second must find what the first has made.
_FUSING: Final = threading.Lock()


def fused(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One tensor with the rows of all parameters, which become views of it; if they are already, that tensor."""
    with _FUSING, torch.inference_mode(False), torch.no_grad():
        return _fused(parameters)


def _fused(parameters: Sequence[nn.Parameter]) -> Tensor:
    first, sizes = parameters[0].detach(), [len(parameter) for parameter in parameters]
    places = [parameter.data_ptr() - first.data_ptr() for parameter in parameters]
    row = first[0].nbytes
    if (
        all(parameter.is_contiguous() for parameter in parameters)
        and len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == 1
        and places == [row * sum(sizes[:i]) for i in range(len(sizes))]
    ):
        return first.as_strided((sum(sizes), *first.shape[1:]), first.stride())
    whole = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, view in zip(parameters, whole.split(sizes), strict=True):
        parameter.data = view
    return whole
