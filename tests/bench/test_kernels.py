"""The benchmark of the kernels, dry: cases are prepared and checked small on the CPU; its logic on invented times."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import specvlm_kernels
from bench import gpu_check
from bench.floors import Sizes
from bench.kernels import __main__ as command
from bench.kernels import attention, cache, draws, growth, layers, losses, report, targets, tokens
from bench.kernels.attention import Model, attention_case
from bench.kernels.registry import (
    Call,
    Case,
    Ceilings,
    Measurement,
    Place,
    Problem,
    Timing,
    UnavailableError,
    WrongError,
    require,
    require_close,
)
from bench.kernels.targets import TARGETS, Standing, Verdict, standings
from bench.kernels.timing import repeats, spread

RESULTS = Path(__file__).parents[2] / "bench" / "results"
LIMITS = Ceilings(bandwidth=1e12, rate=1e15, launch=1e-6)
TINY_SIZES = Sizes("tiny", hidden=64, inner=96, layers=1, heads=4, kv_heads=2, vocabulary=70, head_dim=16)
TINY, TINY_GROUPED = Model("tiny", 2, 2), Model("grouped", 4, 2)


def small_place() -> Place:
    """Two sets of tensors a problem; functions stay as they are."""
    return Place(torch.device("cpu"), rotation_bytes=1, compiled=lambda function, **options: function)


SMALL = [
    attention_case(TINY, [20], 1),
    attention_case(TINY, [20], 5, compared=True, other_cuts=True),
    attention_case(TINY_GROUPED, [30], 70, compared=True),
    attention_case(TINY_GROUPED, [9, 20, 31], 5),
    attention_case(TINY, [20], 5, dtype=torch.float8_e4m3fn),
    Case("pack_ancestors", "9 nodes", 0, lambda place: attention.packing(place, 9)),
    *[draws.draw_case(op, 5, 300, *settings) for op in ("draw", "accept") for settings in draws.SETTINGS],
    *[draws.rule_case(op, 5, 300) for op in draws.RULES],
    draws.reduced_topk_case(3, 4, 70, 300),
    *[draws.topk_case(3, 4, 300, temperature) for temperature in (0.0, 1.0)],
    cache.compact_case(TINY, 2),
    cache.write_case(TINY, 5),
    *layers.product_cases(TINY_SIZES, 5),
    *layers.product_cases(TINY_SIZES, 5, e4m3=True),
    *layers.between_cases(TINY_SIZES, 5),
    growth.beam_case(3),
    growth.tree_case(3, 3, 9),
    tokens.pool_case(TINY, (5, 4)),
    tokens.conv_case(TINY, (5, 4)),
    *[tokens.prune_case(TINY, (5, 4), by_query) for by_query in (False, True)],
    tokens.resample_case(TINY, (5, 4)),
    losses.loss_case("soft_cross_entropy", specvlm_kernels.soft_cross_entropy, losses.plain_cross_entropy, 70, 300),
    losses.loss_case("total_variation", specvlm_kernels.total_variation, losses.plain_variation, 70, 300),
]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_case_is_right_and_so_is_what_it_is_compared_with(case):
    problem = case.prepare(small_place())
    problem.check()
    for turn in range(problem.turns):
        problem.run(turn)
    for name, make in {**problem.baselines, **problem.slow}.items():
        if name in (attention.FLEX, attention.FLASHINFER) or name.startswith("ours"):
            continue  # below; on a GPU only
        call = make()
        for turn in range(problem.turns):
            call(turn)


@pytest.mark.slow
@pytest.mark.parametrize("case", [SMALL[1], SMALL[2]], ids=lambda case: case.name)
def test_flex_attention_is_given_the_same_tree(case):
    """Making it checks it against the reference: one with another mask would be no baseline."""
    problem = case.prepare(small_place())
    assert problem.slow[attention.FLEX]()(1).shape == problem.run(1).shape


def test_every_op_has_a_case_here_and_there():
    ops = {name for name in specvlm_kernels.__all__ if name != "Accepted"}
    assert {case.op for case in command.cases()} == ops
    assert {case.op for case in SMALL} == ops


def test_names_tell_cases_apart():
    names = [case.name for case in command.cases()]
    assert len(set(names)) == len(names)


def spoilt(op: Callable[..., object]) -> Callable[..., object]:
    """The op, returning what is nearly right."""

    def run(*args: object, **options: object) -> object:
        found = op(*args, **options)
        if found is None:  # in place: the last argument but the lengths
            args[0].flatten()[:1].add_(1.0)
            return None
        if isinstance(found, torch.Tensor):
            return found + 1
        if isinstance(found, tuple):
            return (found[0] + 1, *found[1:])
        return replace(found, next_token=found.next_token + 1)

    return run


@pytest.mark.parametrize("module", [attention, draws, cache, growth, tokens, losses])
def test_a_wrong_op_is_found(module, monkeypatch):
    """Each kernel in turn."""
    ours = [name for name in specvlm_kernels.__all__ if hasattr(module, name) and name != "Accepted"]
    assert ours
    for name in ours:
        case = next(case for case in SMALL if case.op == name)
        with monkeypatch.context() as patch:
            if module is losses:
                plain = {"soft_cross_entropy": losses.plain_cross_entropy, "total_variation": losses.plain_variation}
                case = losses.loss_case(name, spoilt(getattr(module, name)), plain[name], 70, 300)
            patch.setattr(module, name, spoilt(getattr(module, name)))
            with pytest.raises((WrongError, RuntimeError, IndexError)):
                case.prepare(small_place()).check()


@pytest.mark.parametrize("name", layers.PLAIN)
def test_a_wrong_op_of_a_layer_is_found(name, monkeypatch):
    case = next(case for case in SMALL if case.op == name)
    monkeypatch.setattr(specvlm_kernels, name, spoilt(getattr(specvlm_kernels, name)))
    with pytest.raises(WrongError):
        case.prepare(small_place()).check()


@pytest.mark.parametrize("name", ["rotary_linear", "rotary_write_kv"])
@pytest.mark.parametrize("cache", layers.CACHES)
def test_what_a_layers_op_writes_wrongly_is_found(name, cache, monkeypatch):
    op = getattr(specvlm_kernels, name)

    def wrong(**given: torch.Tensor) -> torch.Tensor:
        found = op(**given)
        given[cache][0, 0, given["kv_len"], 0] += 1
        return found

    case = next(case for case in SMALL if case.op == name)
    monkeypatch.setattr(specvlm_kernels, name, wrong)
    with pytest.raises(WrongError):
        case.prepare(small_place()).check()


@pytest.mark.parametrize(
    ("out", "message"), [([1.0, 1.0, 1.4], "off by 0.398$"), ([1.02, 1.02, 1.02], "off by 0.02.* of its norm")]
)
def test_close_is_in_the_worst_number_and_in_all_together(out, message):
    exact = torch.ones(3, dtype=torch.float64)
    require_close("op", torch.ones(3).bfloat16(), torch.ones(3).bfloat16(), exact)
    with pytest.raises(WrongError, match=message):
        require_close("op", torch.tensor(out).bfloat16(), torch.ones(3).bfloat16(), exact)


@pytest.mark.parametrize(
    ("case", "bytes_", "flops"),
    [
        # Keys and values of 110 slots, queries and results of 10 rows.
        (attention_case(TINY_GROUPED, [100], 10), 8 * 110 * 128 + 2 * 2 * 10 * 4 * 128, 4 * 10 * 4 * 110 * 128),
        (attention_case(TINY_GROUPED, [100], 10, dtype=torch.float8_e4m3fn), 4 * 110 * 128 + 4 * 10 * 4 * 128, None),
        (attention_case(TINY, [10, 20], 5), 8 * 40 * 128 + 2 * 2 * 10 * 2 * 128, 4 * 5 * 2 * 40 * 128),
        (draws.draw_case("draw", 64, 32000, 0.0, 0, 1.0), 2 * 64 * 32000, 0),
        (cache.compact_case(Model("", 2, 2), 3), 3 * 2 * 2 * 4 * 128 * 2 * 2, 0),
        (cache.write_case(Model("", 2, 2), 7), 2 * 2 * 7 * 128 * 2 * 2, 0),
        # 20 tokens of 256 become 6; windows of 3 by 2 see all 5 rows and 3 of 4 columns, and are 2 by 1.
        # A weight, 5 rows of x and of what comes of them: in fp32 where they are parts.
        (layers.product_case("linear", "", TINY_SIZES, 5, 64, 70, 140), 2 * 64 * 70 + 5 * (128 + 140), 2 * 5 * 64 * 70),
        (
            layers.product_case("linear", "", TINY_SIZES, 5, 64, 70, 140, e4m3=True),
            64 * 70 + 4 * 70 + 5 * (128 + 140),
            2 * 5 * 64 * 70,
        ),
        (list(layers.product_cases(TINY_SIZES, 5))[1], 2 * 64 * 64 + 5 * (2 + 4) * 64, 2 * 5 * 64 * 64),
        # A token, a parent, a score and a depth each; of a tree 20 bytes a node.
        (growth.tree_case(3, 3, 9), 21 * 24 + 9 * 20, 0),
        (tokens.pool_case(TINY, (5, 4)), 2 * 256 * (20 + 6), 0),
        (tokens.conv_case(TINY, (5, 4)), 2 * 256 * (15 + 2) + 2 * 256 * 10, 0),
        (tokens.prune_case(TINY, (5, 4), False), 2 * 256 * (5 + 5) + 8 * 5 + 4 * 20, 0),
        (tokens.prune_case(TINY, (5, 4), True), 2 * 256 * (20 + 5) + 8 * 5, 0),
        (tokens.resample_case(TINY, (5, 4)), 2 * (20 * 256 + 2 * 256 * 256 + 2 * 2 * 256), None),
        (losses.loss_case("total_variation", None, None, 3, 7), 2 * 5 * 21, 0),
    ],
    ids=lambda x: x.name if isinstance(x, Case) else "",
)  # fmt: skip
def test_bytes_and_operations_follow_from_the_shape(case, bytes_, flops):
    assert case.bytes == bytes_
    assert flops is None or case.flops == flops


def test_a_floor_is_the_larger_of_bytes_and_operations():
    case = Case("x", "", bytes=10**6, prepare=None, flops=10**8)
    assert LIMITS.floor(case) == 1e-6
    assert LIMITS.floor(replace(case, flops=10**10)) == 1e-5


def test_walking_through_memory_takes_two_turns_at_least():
    place = Place(torch.device("cpu"), rotation_bytes=1000, most_turns=5)
    assert [place.turns(size) for size in (10**9, 1000, 400, 1)] == [2, 2, 3, 5]


def test_the_spread_is_a_median_with_its_neighbours():
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0]) == Timing(3.0, pytest.approx(1.4), pytest.approx(4.6))


def test_what_is_slow_is_repeated_less_often():
    assert [repeats(seconds) for seconds in (1e-4, 0.01, 0.02, 0.1, 3.0)] == [50, 30, 15, 7, 7]


# Targets.


def at(case: Case, seconds: float, **baselines: float | str) -> Measurement:
    times = {name: time if isinstance(time, str) else Timing(time, time, time) for name, time in baselines.items()}
    return Measurement(case, Timing(seconds, seconds, seconds), times)


def standing_of(start: str, measured: list[Measurement], cases: list[Case] | None = None) -> Standing:
    found = standings(cases or command.cases(), measured, LIMITS)
    return next(each for each in found if each.target.name.startswith(start))


def tree_case(kv: int, nodes: int, model: Model = attention.SEVEN, **options: object) -> Case:
    return attention_case(model, [kv], nodes, **options)


def test_every_target_has_cases():
    for each in standings(command.cases(), [], None):
        assert each.cases > 0, each.target.name
        assert each.verdict == Verdict.UNMEASURED
        assert each.line().startswith("unmeasured: ")


@pytest.mark.parametrize(
    ("share", "verdict"), [(0.9, Verdict.MET), (0.8, Verdict.MET), (0.79, Verdict.MISSED), (0.5, Verdict.MISSED)]
)
def test_a_share_of_the_bandwidth_is_bounded_from_below(share, verdict):
    cases = [tree_case(4096, 64), tree_case(8192, 1)]
    measured = [at(cases[0], cases[0].bytes / 1e12), at(cases[1], cases[1].bytes / 1e12 / share * (1 - 1e-9))]
    found = standing_of("tree_attention, KV >= 4096, N <= 64", measured, cases)
    assert found.verdict == verdict
    assert found.worst == pytest.approx(share)
    assert found.where == cases[1].name
    assert (found.measured, found.cases) == (2, 2)


def test_a_target_is_open_while_cases_are_unmeasured_and_missed_by_one():
    cases = [tree_case(4096, 64), tree_case(8192, 1)]
    fast, slow = at(cases[0], cases[0].bytes / 1e12), at(cases[0], cases[0].bytes / 1e11)
    assert standing_of("tree_attention, KV >= 4096, N <= 64", [fast], cases).verdict == Verdict.OPEN
    assert standing_of("tree_attention, KV >= 4096, N <= 64", [slow], cases).verdict == Verdict.MISSED


def test_which_cases_a_target_takes():
    wide, grouped, short = TARGETS[0], TARGETS[1], TARGETS[2]
    assert wide.applies(tree_case(4096, 64))
    assert wide.applies(tree_case(4096, 1, attention.GROUPED))
    assert not wide.applies(tree_case(4096, 64, attention.GROUPED))
    assert grouped.applies(tree_case(4096, 64, attention.GROUPED))
    for other in (tree_case(2048, 64), tree_case(4096, 128), tree_case(4096, 64, dtype=torch.float8_e4m3fn)):
        assert not wide.applies(other)
    assert not wide.applies(attention_case(attention.SEVEN, [4096, 4096], 64))
    assert short.applies(tree_case(600, 64))
    assert short.applies(tree_case(2048, 1))
    assert not short.applies(tree_case(4096, 1))
    assert not short.applies(draws.draw_case("draw", 64, 32000, 0.0, 0, 1.0))


def test_short_contexts_are_given_one_launch():
    case = tree_case(600, 64)
    floor = LIMITS.floor(case)
    found = standing_of("tree_attention, KV 600 to 2048", [at(case, 1.5 * floor + LIMITS.launch - 1e-12)], [case])
    assert (found.verdict, round(found.worst, 3)) == (Verdict.MET, 1.5)
    found = standing_of("tree_attention, KV 600 to 2048", [at(case, 1.51 * floor + LIMITS.launch)], [case])
    assert found.verdict == Verdict.MISSED


def test_the_fastest_of_the_baselines_that_there_are_counts():
    case = tree_case(4096, 64, compared=True)
    quick = {attention.FLEX: 3.0, attention.FLASHINFER: 2.0}
    assert standing_of("tree_attention: never slower", [at(case, 2.5, **quick)], [case]).verdict == Verdict.MISSED
    lacking = {attention.FLEX: 3.0, attention.FLASHINFER: "not available"}
    assert standing_of("tree_attention: never slower", [at(case, 2.5, **lacking)], [case]).verdict == Verdict.MET
    nothing = {attention.FLEX: "failed: x", attention.FLASHINFER: "not available"}
    assert standing_of("tree_attention: never slower", [at(case, 2.5, **nothing)], [case]).verdict == Verdict.UNMEASURED
    twice = {"SDPA with a mask": 5.0}
    assert standing_of("tree_attention: speedup over SDPA", [at(case, 2.5, **twice)], [case]).verdict == Verdict.MET


def test_draws_are_timed_by_the_microsecond():
    plain, filtered = (draws.draw_case("accept", 64, 32000, 1.0, 0, top_p) for top_p in (1.0, 0.9))
    start = "draw and accept, 64 x 32000"
    assert standing_of(f"{start}, greedy", [at(plain, 15.1e-6)], [plain, filtered]).verdict == Verdict.MISSED
    assert standing_of(f"{start}, greedy", [at(plain, 14.9e-6)], [plain, filtered]).verdict == Verdict.MET
    assert standing_of(f"{start}, with top-p", [at(filtered, 39e-6)], [plain, filtered]).verdict == Verdict.MET


# The report and the whole run.


def test_a_row_says_what_was_measured():
    case = Case("op", "a shape", bytes=10**6, prepare=None)
    measured = Measurement(
        case, Timing(2e-6, 1e-6, 3e-6), {"torch": Timing(6e-6, 6e-6, 6e-6), "other": "not available"}
    )
    told = "| op | a shape | 2.0 | 1.0 to 3.0 | 500 | 50% | 2.00 | torch: 6.0 (3.00x); other: not available |"
    assert report.row(measured, LIMITS) == told


def toy(op: str, *, fine: bool = True, slow: bool = False) -> Case:
    """A case whose time is told by its name's length."""

    def unavailable() -> Call:
        raise UnavailableError("it is not here")

    def prepare(place: Place) -> Problem:
        baselines = {"plain": lambda: lambda turn: turn, "absent": unavailable, "broken": lambda: 1 / 0}
        return Problem(
            lambda: require(fine, "is off by 3"),
            lambda turn: turn,
            2,
            baselines,
            {"compiled": lambda: lambda turn: turn} if slow else {},
        )

    return Case(op, "toy", 10**6, prepare)


def toy_timer(call: Call, turns: int) -> Timing:
    for turn in range(turns):
        call(turn)
    return Timing(2e-6, 1e-6, 3e-6)


def test_a_run_writes_lines_and_a_plot(tmp_path, capsys):
    status = command.run([toy("one", slow=True), toy("two")], small_place(), tmp_path, 60.0, toy_timer, lambda: LIMITS)
    assert status == 0
    lines = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    assert lines[0]["ceilings"] == {"bandwidth": 1e12, "rate": 1e15, "launch": 1e-6}
    assert {"gpu", "torch", "triton", "commit"} <= lines[0].keys()
    assert [line["op"] for line in lines[1:-1]] == ["one", "two", "one"]
    assert "compiled" not in lines[1]["baselines"]
    assert lines[3]["baselines"]["compiled"]["median"] == 2e-6
    assert lines[3]["baselines"]["absent"] == "not available: it is not here"
    assert lines[3]["baselines"]["broken"] == "failed: ZeroDivisionError: division by zero"
    assert [line["verdict"] for line in lines[-1]["targets"]] == ["unmeasured"] * len(TARGETS)
    assert (tmp_path / "kernels.png").stat().st_size > 0
    assert "Stopped" not in capsys.readouterr().out


def test_a_wrong_op_ends_a_run_before_anything_is_timed(tmp_path, capsys):
    def never(call: Call, turns: int) -> Timing:
        raise AssertionError("timed")

    assert command.run([toy("one"), toy("two", fine=False)], small_place(), tmp_path, 60.0, never, lambda: LIMITS) == 1
    assert "two, toy: is off by 3" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_run_stops_in_time_and_says_so(tmp_path, capsys, monkeypatch):
    moments = iter([0.0, 1.0, *[99.0] * 9])
    monkeypatch.setattr(time, "monotonic", lambda: next(moments))
    command.run([toy("one", slow=True), toy("two")], small_place(), tmp_path, 60.0, toy_timer, lambda: LIMITS)
    assert "of 2 cases 1 are not measured, 1 lack their slow baselines" in capsys.readouterr().out


def test_an_interrupted_run_reports_what_it_has(tmp_path, capsys):
    def interrupted(call: Call, turns: int) -> Timing:
        if done:
            raise KeyboardInterrupt
        done.append(call)
        return Timing(1e-6, 1e-6, 1e-6)

    done: list[Call] = []
    one = replace(toy("one"), prepare=lambda place: Problem(lambda: None, lambda turn: turn, 2, {}))
    command.run([one, toy("two")], small_place(), tmp_path, math.inf, interrupted, lambda: LIMITS)
    assert "of 2 cases 1 are not measured" in capsys.readouterr().out
    assert '"targets"' in (tmp_path / "kernels.jsonl").read_text()


def test_a_missed_target_is_the_exit_status(tmp_path):
    case = replace(tree_case(4096, 64), prepare=toy("x").prepare)
    slow = lambda call, turns: Timing(1.0, 1.0, 1.0)  # noqa: E731
    assert command.run([case], small_place(), tmp_path, 60.0, slow, lambda: LIMITS) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_computes_and_writes_nothing(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path), "--only", "tree_attention", "draw"]) == 0
    said = capsys.readouterr().out
    assert "nothing is measured. COMPUTED from shapes alone" in said
    case = tree_case(4096, 64)
    assert f"| {case.op} | {case.shape} | {case.bytes} | {case.flops} | {1e6 * case.bytes / 4.3e12:.2f} |" in said
    assert "pool_tokens" not in said.split("unmeasured")[0]
    assert "TB/s copy" not in said
    assert not list(tmp_path.iterdir())


def test_an_unknown_op_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--only", "attention"])
    assert "--only: expected ops among accept, " in capsys.readouterr().err


# Stages.


@pytest.mark.parametrize("stage", [["memory"], ["decodes"], [""], []])
def test_a_stage_that_does_not_exist_is_refused(stage, capsys):
    assert gpu_check.main(stage) == 2
    assert "STAGE: expected kernels or exact or decode or sanitize, got" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("stage", gpu_check.STAGES)
def test_a_stage_needs_a_gpu(stage, capsys):
    assert gpu_check.main([stage]) == 2
    assert "expected a CUDA device, found none" in capsys.readouterr().err


def test_a_stage_runs_everything_and_fails_if_a_part_does(monkeypatch):
    ran: list[list[str]] = []

    def step(name: str, command: list[str], seconds: float) -> bool:
        ran.append(command[1:])
        assert 0 < seconds < 480
        return name != failing[0]

    failing: list[str | None] = [None]
    monkeypatch.setattr(gpu_check, "step", step)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for failing[0], status in ((None, 0), ("GPU tests", 1), ("benchmark", 1)):
        ran.clear()
        assert gpu_check.main(["kernels", "--only", "draw"]) == status
        assert [command[1] for command in ran] == ["pytest", "bench.kernels"]
        assert "tests/kernels" in ran[0]
        assert ran[1][-2:] == ["--only", "draw"]
    for stage, failing[0] in (("sanitize", "compute-sanitizer"), ("exact", "GPU tests"), ("decode", "benchmark")):
        ran.clear()
        assert gpu_check.main([stage]) == 1
        assert len(ran) == 1
        failing[0] = None
        assert gpu_check.main([stage]) == 0


def test_a_step_ends_in_time(capfd, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.2)
    began = time.monotonic()
    assert not gpu_check.step("sleep", ["sleep", "30"], 1.0)
    assert time.monotonic() - began < 10
    assert "out of time" in capfd.readouterr().out
    assert gpu_check.step("nothing", ["true"], 5.0)
    assert not gpu_check.step("nothing", ["false"], 5.0)


def test_targets_name_baselines_that_exist():
    problem = attention_case(TINY, [20], 5, compared=True).prepare(small_place())
    assert {targets.FLEX, targets.FLASHINFER, "SDPA with a mask"} <= {*problem.baselines, *problem.slow}


def test_what_is_computed_and_what_is_unmeasured_lies_with_the_results(capsys):
    command.compute(command.cases())
    assert capsys.readouterr().out == (RESULTS / "kernels.md").read_text()
