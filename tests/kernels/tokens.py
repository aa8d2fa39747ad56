"""What the tests of the token kernels share: tokens, gradients beside results, and how far off they may be."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from tests.kernels.watch import launched


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moved(arguments: dict[str, Any], to: torch.device | torch.dtype | str) -> dict[str, Any]:
    """The arguments, tensors on another device or floats in another dtype."""
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    return arguments | {name: x.to(to) for name, x in tensors.items()}


def with_gradients(op: Callable[..., Any], wants: Iterable[str], **arguments: Any) -> list[torch.Tensor]:
    """What `op` returns, then the gradients of the arguments `wants` from a random one of its (first) result."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in wants}
    returned = op(**(arguments | leaves))
    outs = [returned] if isinstance(returned, torch.Tensor) else list(returned)
    grad = normal(*outs[0].shape, seed=99).to(outs[0])
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs[0], list(leaves.values()), grad)]


def assert_close(got: list[torch.Tensor], exact: list[torch.Tensor], plain: list[torch.Tensor]) -> None:
    """At most twice the error of plain torch in the same dtype against float64, and a few roundings; integers equal."""
    for one, true, other in zip(got, exact, plain, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        one, true, other = one.cpu(), true.cpu(), other.cpu()
        if not one.is_floating_point():
            assert torch.equal(one, true)
        elif one.numel():
            floor = 4 * torch.finfo(one.dtype).eps * (1 + true.abs().max())
            assert (one - true).abs().max() <= 2 * (other - true).abs().max() + floor


def check_kernels(
    kernels: Iterable[Any],
    op: Callable[..., Any],
    twin: Callable[..., Any],
    device: str,
    wants: tuple[str, ...],
    arguments: dict[str, Any],
    plain: Callable[..., Any] | None = None,
) -> None:
    """Runs an op and its gradients on a device, all `kernels` in it, against its twin in float64.

    `plain`: what plain torch would compute in the dtype of the arguments; None: the twin.
    """
    with launched(*kernels):
        got = with_gradients(op, wants, **moved(arguments, device))
    exact = with_gradients(twin, wants, **moved(arguments, torch.float64))
    assert_close(got, exact, with_gradients(plain or twin, wants, **arguments))


def far_apart(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [1, 3, C] in a view whose third starts 2^31 elements behind the first; what lies between is untouched."""
    storage = torch.empty(2**31 + tokens.shape[2], dtype=tokens.dtype, device=tokens.device)
    return storage.as_strided(tokens.shape, (storage.numel(), 2**30, 1)).copy_(tokens)


def check_compiled(kernels: Iterable[Any], op: Callable[..., Any], wants: tuple[str, ...], **arguments: Any) -> None:
    """An op traced whole, with its gradients, gives what it gives alone."""
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    with_gradients(compiled, wants, **arguments)
    with launched(*kernels):
        got = with_gradients(compiled, wants, **arguments)
    for one, other in zip(got, with_gradients(op, wants, **arguments), strict=True):
        assert torch.equal(one, other)
