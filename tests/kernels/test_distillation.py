"""The losses of a draft's distributions: their values, their gradients, and what is kept in between."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specvlm_kernels import distillation, reference, soft_cross_entropy, total_variation
from tests.kernels.watch import launched

INF, NAN = math.inf, math.nan
TILE = distillation.TILE
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

KERNELS = {soft_cross_entropy: distillation.SOFT_CROSS_ENTROPY, total_variation: distillation.TOTAL_VARIATION}
TWINS = {soft_cross_entropy: reference.soft_cross_entropy, total_variation: reference.total_variation}

Loss = Callable[[Tensor, Tensor], Tensor]

losses = pytest.mark.parametrize("op", KERNELS, ids=lambda op: op.__name__)


def random_logits(*shape: int, seed: int, dtype: torch.dtype = torch.float32, missing: float = 0.0) -> Tensor:
    """Logits of standard deviation 3, but for a share of -inf; never in a row's first token."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(*shape, generator=generator)
    lacks = torch.rand(*shape, generator=generator) < missing
    lacks[..., 0] = False
    return x.masked_fill(lacks, -INF).to(dtype)


def run(op: Loss, logits: Tensor, teacher_logits: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss of each row, and the gradient of their sum, or of the sum weighted; both on the CPU."""
    logits = logits.detach().requires_grad_()
    loss = op(logits, teacher_logits)
    (grad,) = torch.autograd.grad(loss.sum() if weights is None else loss @ weights, logits)
    return loss.detach().cpu(), grad.cpu()


def run_kernels(op: Loss, *args: Tensor) -> tuple[Tensor, Tensor]:
    with launched(KERNELS[op].forward, KERNELS[op].backward):
        return run(op, *args)


def clear_cut(logits: Tensor, teacher_logits: Tensor) -> bool:
    """Whether no sign of q - p hangs on rounding."""
    q, p = logits.double().softmax(-1), teacher_logits.double().softmax(-1)
    return bool(((q - p).abs() > 1e-5 * q).logical_or((q == 0) & (p == 0)).all())


def assert_close(got: tuple[Tensor, Tensor], op: Loss, logits: Tensor, teacher_logits: Tensor) -> None:
    """At most twice the error of plain torch in the same dtypes, and a few roundings, row by row.

    One of them is of the gradient to its dtype, and not to the nearest: the interpreter cuts bf16 off.
    """
    exact = run(TWINS[op], logits.double(), teacher_logits.double())
    plain = run(TWINS[op], logits, teacher_logits)
    largest = torch.maximum(logits.double().softmax(-1), teacher_logits.double().softmax(-1)).amax(-1, keepdim=True)
    scales = (1 + exact[0].abs().nan_to_num(posinf=0), largest)
    assert [x.dtype for x in got] == [torch.float32, logits.dtype]
    for x, usual, true, scale in zip(got, plain, exact, scales, strict=True):
        assert torch.equal(x.isinf(), true.isinf())
        finite = ~true.isinf()
        error = (x.double() - true).where(finite, 0).abs()
        usual_error = (usual.double() - true).where(finite, 0).abs()
        if x.dim() == 2:
            usual_error = usual_error.amax(-1, keepdim=True)
        floor = 8 * torch.finfo(torch.float32).eps * scale + torch.finfo(x.dtype).eps * true.where(finite, 0).abs()
        assert (error <= 2 * usual_error + floor).all()


# The kernels.


@losses
@settings(max_examples=15, deadline=None)
@given(
    vocabulary=st.sampled_from([1, 2, 17, 100, 333, TILE, 8193]),
    rows=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    teacher_dtype=st.sampled_from(DTYPES),
    missing=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_kernels_give_loss_and_gradient(device, op, vocabulary, rows, dtype, teacher_dtype, missing, seed):
    logits = random_logits(rows, vocabulary, seed=seed, dtype=dtype, missing=missing)
    teacher_logits = random_logits(rows, vocabulary, seed=seed + 100, dtype=teacher_dtype, missing=missing)
    if op is total_variation:
        assume(clear_cut(logits, teacher_logits))
    assert_close(run_kernels(op, logits.to(device), teacher_logits.to(device)), op, logits, teacher_logits)


@losses
@pytest.mark.parametrize("vocabulary", [32000, 152064])
def test_kernels_give_loss_and_gradient_at_large_vocabularies(device, op, vocabulary):
    logits = random_logits(1, vocabulary, seed=1, dtype=torch.bfloat16)
    teacher_logits = random_logits(1, vocabulary, seed=2, dtype=torch.bfloat16)
    assert op is soft_cross_entropy or clear_cut(logits, teacher_logits)
    assert_close(run_kernels(op, logits.to(device), teacher_logits.to(device)), op, logits, teacher_logits)


@losses
def test_kernels_take_strides_and_weights_by_row(device, op):
    logits, teacher_logits = random_logits(3, 100, seed=1), random_logits(3, 100, seed=2)
    weights = torch.tensor([2.0, 0.0, -1.0])
    expected = run(TWINS[op], logits, teacher_logits, weights)
    turned = logits.T.contiguous().to(device).T
    sliced = torch.stack([teacher_logits, torch.full_like(teacher_logits, NAN)], dim=-1).to(device)[..., 0]
    spread = torch.stack([weights, weights], dim=-1).to(device)[:, 1]
    for x, true in zip(run_kernels(op, turned, sliced, spread), expected, strict=True):
        torch.testing.assert_close(x, true)


@losses
def test_kernels_take_one_teacher_for_all_rows(device, op):
    logits, teacher_logits = random_logits(3, 100, seed=1), random_logits(1, 100, seed=2)
    got = run_kernels(op, logits.to(device), teacher_logits.to(device).expand(3, 100))
    assert_close(got, op, logits, teacher_logits.expand(3, 100))


@losses
def test_kernels_read_their_own_row_alone(device, op):
    """Rows of a wider tensor, whose other columns and rows are NaN."""
    around = torch.full((5, 200), NAN, device=device)
    logits, teacher_logits = random_logits(3, 100, seed=1), random_logits(3, 100, seed=2)
    inner = [around.clone()[1:4, 50:150].copy_(x) for x in (logits, teacher_logits)]
    assert_close(run_kernels(op, *inner), op, logits, teacher_logits)


@losses
def test_kernels_take_no_rows(device, op):
    loss, grad = run(op, torch.zeros(0, 9, device=device), torch.zeros(0, 9, device=device))
    assert (loss.shape, grad.shape) == ((0,), (0, 9))


@losses
def test_kernels_lose_nothing_far_from_zero(device, op):
    """The cross-entropy is no difference of large numbers."""
    logits, teacher_logits = random_logits(2, 5000, seed=1) + 1e4, random_logits(2, 5000, seed=2) - 1e4
    assert_close(run_kernels(op, logits.to(device), teacher_logits.to(device)), op, logits, teacher_logits)


def test_kernels_see_no_distance_between_the_same_rows(device):
    logits = random_logits(2, 5000, seed=1, missing=0.2)
    loss, grad = run_kernels(total_variation, logits.to(device), logits.to(device))
    assert not loss.any()
    assert not grad.any()
    loss, grad = run_kernels(soft_cross_entropy, logits.to(device), logits.to(device))
    entropy = torch.distributions.Categorical(logits=logits.clamp(min=-1e30).double()).entropy()
    torch.testing.assert_close(loss.double(), entropy, rtol=1e-6, atol=1e-6)
    assert not grad.any()


@losses
def test_kernels_reach_the_largest_distance(device, op):
    """Distributions that share no token; each half fills more than a tile, and either may come first."""
    first = torch.arange(3 * TILE) < TILE + 5
    logits = random_logits(2, 3 * TILE, seed=1).where(torch.stack([first, ~first]), -INF)
    teacher_logits = random_logits(2, 3 * TILE, seed=2).where(torch.stack([~first, first]), -INF)
    loss, grad = run_kernels(op, logits.to(device), teacher_logits.to(device))
    q, p = logits.softmax(-1), teacher_logits.softmax(-1)
    if op is soft_cross_entropy:
        assert (loss == INF).all()
        torch.testing.assert_close(grad, q - p)
    else:
        torch.testing.assert_close(loss, torch.full((2,), 2.0))
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


def check_infinities(device: str) -> None:
    """A draft without token 1, which matters where the teacher wants it, and nowhere else."""
    draft = torch.tensor([[0.0, -INF, 0.0]] * 4)
    teacher = torch.tensor([[0.0, -INF, 0.0], [0.0, -1000.0, 0.0], [-INF, -1000.0, 0.0], [0.0, 0.0, -INF]])
    half = math.log(2)
    expected = {
        soft_cross_entropy: ([half, half, half, INF], [[0, 0, 0], [0, 0, 0], [0.5, 0, -0.5], [0, -0.5, 0.5]]),
        total_variation: ([0, 0, 1, 1], [[0, 0, 0], [0, 0, 0], [0.5, 0, -0.5], [-0.25, 0, 0.25]]),
    }
    # Neighbours, and three tiles of one lane in either order.
    for places in (torch.arange(3), torch.arange(3) * TILE, (2 - torch.arange(3)) * TILE):
        nothing = torch.full((4, int(places.max()) + 1), -INF)
        logits, teacher_logits = (nothing.index_copy(1, places, x).to(device) for x in (draft, teacher))
        for op, (values, slopes) in expected.items():
            loss, grad = run(op, logits, teacher_logits)
            torch.testing.assert_close(loss, torch.tensor(values, dtype=torch.float32))
            torch.testing.assert_close(grad[:, places], torch.tensor(slopes, dtype=torch.float32))
            assert grad.count_nonzero() == grad[:, places].count_nonzero()


def test_kernels_take_infinities(device):
    check_infinities(device)


def test_reference_takes_infinities():
    check_infinities("cpu")


def check_rows_without_a_distribution(device: str) -> None:
    """They are NaN, and the rows beside them are not."""
    good, other = [0.0, 1.0, 2.0], [1.0, 1.0, 0.0]
    spoiled = [[NAN, 1.0, 2.0], [INF, 1.0, 2.0], [-INF, INF, -INF], [INF, INF, 0.0], [-INF] * 3]
    bad, fine = torch.tensor([good, *spoiled], device=device), torch.tensor([other] * 6, device=device)
    for logits, teacher_logits in ((bad, fine), (fine, bad)):
        for op in KERNELS:
            loss, grad = run(op, logits, teacher_logits)
            assert loss.isnan().tolist() == [False] + [True] * 5
            assert not grad[0].isnan().any()
            if op is total_variation and logits is fine:
                assert not grad[1:].any()
            else:
                assert grad[1:].isnan().all()


def test_kernels_show_rows_without_a_distribution(device):
    check_rows_without_a_distribution(device)


def test_reference_shows_rows_without_a_distribution():
    check_rows_without_a_distribution("cpu")


@losses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_keep_numbers_by_the_row(device, op, dtype):
    """The figure of the module's docstring, against what plain torch keeps."""
    rows, vocabulary = 6, 1000
    logits = random_logits(rows, vocabulary, seed=1, dtype=dtype).to(device).requires_grad_()
    teacher_logits = random_logits(rows, vocabulary, seed=2, dtype=dtype).to(device)

    def plain(logits: Tensor, teacher_logits: Tensor) -> Tensor:
        p = teacher_logits.float().softmax(-1)
        if op is soft_cross_entropy:
            return -(p * logits.float().log_softmax(-1)).sum(-1)
        return (logits.float().softmax(-1) - p).abs().sum(-1)

    def kept(loss: Loss) -> int:
        sizes = {}
        own = {x.untyped_storage().data_ptr() for x in (logits, teacher_logits)}

        def pack(x: Tensor) -> Tensor:
            if x.untyped_storage().data_ptr() not in own:
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = loss(logits, teacher_logits)
        assert result.requires_grad
        return sum(sizes.values())

    assert kept(op) == {soft_cross_entropy: 16, total_variation: 20}[op] * rows
    assert kept(plain) == 8 * rows * vocabulary


@losses
def test_only_the_draft_learns_and_only_once(device, op):
    logits, teacher_logits = random_logits(2, 2, 30, seed=1).to(device).requires_grad_().unbind()
    logits.retain_grad()
    teacher_logits.retain_grad()
    op(logits, teacher_logits).sum().backward()
    assert logits.grad is not None
    assert teacher_logits.grad is None
    assert not op(logits.detach(), teacher_logits).requires_grad
    (grad,) = torch.autograd.grad(op(logits, teacher_logits).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


@losses
def test_operators_keep_torchs_rules(device, op):
    """Of schema, autograd, fake tensors, and compiling with changing shapes."""
    operator = getattr(torch.ops.specvlm_kernels, op.__name__)
    grad_operator = getattr(torch.ops.specvlm_kernels, f"{op.__name__}_grad")
    logits = random_logits(3, 100, seed=1, dtype=torch.bfloat16).to(device)
    turned = random_logits(100, 3, seed=2).to(device).T
    assert clear_cut(logits, turned)
    torch.library.opcheck(operator, (logits.clone().requires_grad_(), turned))
    _, kept = operator(logits, turned)
    torch.library.opcheck(grad_operator, (torch.ones(3, device=device), logits, turned, kept))


def check_compiled(op: Loss, device: str, backend: str) -> None:
    """In one graph, forward and backward, for any number of rows."""
    torch._dynamo.reset()

    def weighed(hidden: Tensor, head: Tensor, teacher_logits: Tensor) -> Tensor:
        return 0.1 * op(hidden @ head, teacher_logits).mean()

    compiled = torch.compile(weighed, fullgraph=True, backend=backend, dynamic=True)
    head = torch.randn(8, 100, generator=torch.Generator().manual_seed(1)).to(device)
    for rows in (3, 5):
        teacher_logits = random_logits(rows, 100, seed=rows).to(device)
        hidden = random_logits(rows, 8, seed=rows + 1).to(device).requires_grad_()
        expected, got = weighed(hidden, head, teacher_logits), compiled(hidden, head, teacher_logits)
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(loss, hidden)[0] for loss in (got, expected)]
        torch.testing.assert_close(*grads)


@losses
def test_kernels_run_under_compile(device, op):
    with launched(KERNELS[op].forward, KERNELS[op].backward):
        check_compiled(op, device, "aot_eager")


@pytest.mark.gpu
@losses
def test_kernels_run_under_inductor(op):
    check_compiled(op, "cuda", "inductor")


@losses
def test_reference_runs_under_compile(op):
    check_compiled(op, "cpu", "aot_eager")


@pytest.mark.gpu
@losses
def test_kernels_never_wait_for_the_host(op):
    logits = random_logits(4, 9000, seed=1).cuda().requires_grad_()
    teacher_logits = random_logits(4, 9000, seed=2).cuda()
    op(logits, teacher_logits).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(logits, teacher_logits).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@losses
def test_kernels_allocate_the_gradient_alone(op):
    rows, vocabulary = 64, 32000
    logits, teacher_logits = random_logits(2, rows, vocabulary, seed=1, dtype=torch.bfloat16).cuda().unbind()
    logits = logits.detach().requires_grad_()
    run(op, logits, teacher_logits)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = op(logits, teacher_logits).sum()
    assert torch.cuda.max_memory_allocated() - before < 64 * 1024
    torch.autograd.grad(loss, logits)
    assert torch.cuda.max_memory_allocated() - before < logits.nbytes + 64 * 1024


@losses
def test_kernels_refuse_fp64(device, op):
    good, double = torch.zeros(2, 5, device=device), torch.zeros(2, 5, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match=r"^logits: expected dtype float32 or float16 or bfloat16, got float64"):
        op(double, good)
    with pytest.raises(ValueError, match="teacher_logits: expected dtype float32 or float16 or bfloat16, got float64"):
        op(good, double)


# The reference.


@losses
def test_reference_gradients_in_float64(op):
    logits, teacher_logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(op, (logits, teacher_logits))
    lacking = teacher_logits.index_fill(1, torch.tensor([2, 5]), -INF)
    assert torch.autograd.gradcheck(op, (logits, lacking))


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_reference_gives_the_formulas(missing):
    """Token by token in Python, gradients as they are documented."""
    logits, teacher_logits = (random_logits(4, 50, seed=i, missing=missing).double() for i in (1, 2))
    teacher_logits = teacher_logits.masked_fill(logits == -INF, -INF)
    cross_entropy, cross_entropy_grad = run(soft_cross_entropy, logits, teacher_logits)
    variation, variation_grad = run(total_variation, logits, teacher_logits)
    for i in range(4):
        z, t = ([math.exp(x) for x in row[i].tolist()] for row in (logits, teacher_logits))
        q, p = [x / sum(z) for x in z], [x / sum(t) for x in t]
        pairs = list(zip(q, p, strict=True))
        assert math.isclose(cross_entropy[i], -sum(b * math.log(a) for a, b in pairs if b))
        assert cross_entropy_grad[i].tolist() == pytest.approx([a - b for a, b in pairs])
        assert math.isclose(variation[i], sum(abs(a - b) for a, b in pairs))
        signs = [(a > b) - (a < b) for a, b in pairs]
        balance = sum(a * s for a, s in zip(q, signs, strict=True))
        assert variation_grad[i].tolist() == pytest.approx([a * (s - balance) for a, s in zip(q, signs, strict=True)])


@losses
def test_reference_computes_in_the_wider_of_its_dtype_and_fp32(op):
    logits, teacher_logits = random_logits(2, 3, 30, seed=1).unbind()
    for dtype in DTYPES:
        loss, grad = run(op, logits.to(dtype), teacher_logits)
        assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
        assert torch.equal(loss, run(op, logits.to(dtype).float(), teacher_logits)[0])
    assert op(logits.double(), teacher_logits).dtype == torch.float64
    assert op(logits, teacher_logits.double()).dtype == torch.float64


@losses
def test_reference_lets_only_the_draft_learn(op):
    logits, teacher_logits = random_logits(2, 2, 30, seed=1).requires_grad_().unbind()
    teacher_logits.retain_grad()
    op(logits, teacher_logits).sum().backward()
    assert teacher_logits.grad is None
    assert not op(logits.detach(), teacher_logits).requires_grad


@losses
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": [0.0]}, "^logits: expected a tensor, got list"),
        ({"logits": torch.zeros(5)}, r"^logits: expected shape \[R, V\], got \[5\]"),
        ({"logits": torch.zeros(2, 5).long()}, "^logits: expected dtype float32 or .*, got int64"),
        ({"logits": torch.zeros(2, 5).to("meta")}, "^logits: expected a tensor on a cuda or cpu device, got meta"),
        (
            {"logits": torch.zeros(2, 0), "teacher_logits": torch.zeros(2, 0)},
            r"^logits: .* one token, got shape \[2, 0\]",
        ),
        ({"teacher_logits": None}, "^teacher_logits: expected a tensor, got NoneType"),
        ({"teacher_logits": torch.zeros(2, 4)}, r"^teacher_logits: expected shape \[2, 5\], got \[2, 4\]"),
        ({"teacher_logits": torch.zeros(1, 5)}, r"^teacher_logits: expected shape \[2, 5\], got \[1, 5\]"),
        ({"teacher_logits": torch.zeros(2, 5).int()}, "^teacher_logits: expected dtype float32 or .*, got int32"),
        ({"teacher_logits": torch.zeros(2, 5).to("meta")}, "^teacher_logits: expected a tensor on cpu, got meta"),
    ],
)
def test_a_bad_argument_is_named(op, change, message):
    good = {"logits": torch.zeros(2, 5), "teacher_logits": torch.zeros(2, 5)}
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})
