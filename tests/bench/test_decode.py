"""The benchmark of whole decoding: all of it on a tiny model, its logic on invented figures and traces."""

import json
import time
from collections import Counter
from itertools import islice

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.decode import __main__ as command
from bench.decode import host, memory, replay, report, rounds, speeds, targets
from bench.decode.figures import Found, Kind, Teller
from bench.decode.models import FULL_HEAD, HEADS, REDUCED_HEAD, SIZES, prompt_for, random_llava, random_subject
from bench.decode.run import PARTS, WHOLE, timed_rounds
from bench.decode.targets import TARGETS, Standing, Target, Verdict, standings
from bench.floors import Sizes, step_bytes
from specvlm.tree import BUCKETS
from tests.test_graphs import Recorder

SEVEN = SIZES["7b"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[int, list[dict]]:
    """The exit status of a whole run on the tiny model, and its lines."""
    out = tmp_path_factory.mktemp("out")
    status = command.main(["--model", "tiny", "--out", str(out), "--profiles", str(out / "profiles")])
    assert (out / "decode-tiny.png").stat().st_size > 0
    profiles = {host.file_of("tiny", name) for name in (rounds.STEP, *HEADS)}
    assert {path.name for path in (out / "profiles").iterdir()} == profiles
    return status, [json.loads(line) for line in (out / "decode-tiny.jsonl").read_text().splitlines()]


def test_a_run_tells_everything_and_fails_at_nothing(ran):
    status, (about, *figures, last) = ran
    assert status == 0
    assert {"gpu", "torch", "transformers", "commit", "bandwidth"} <= about.keys()
    assert last == {"targets": [], "failed": []}, "a tiny model has no targets"
    told = {(figure["section"], figure["name"]): figure for figure in figures}
    assert len(told) == len(figures)
    assert {figure["model"] for figure in figures} == {"tiny"}
    assert {figure["kind"] for figure in figures} == {*Kind}
    for name in (speeds.OURS, speeds.HF_EAGER, speeds.HF_STATIC):
        figure = told[speeds.SECTION, name]
        assert figure["p10"] <= figure["value"] <= figure["p90"]
    for nodes in BUCKETS:
        assert told[rounds.VERIFY, rounds.name_of(nodes)]["value"] > 0
    for target in TARGETS:
        for name in target.figures:
            figure = told[target.section, name]
            absent = (memory.SECTION, memory.REST), (speeds.PREFILL, speeds.OVER_FLOOR)
            assert (figure["value"] is None) == ((target.section, name) in absent), "every target has its figure"


def test_parts_of_a_round_are_its_whole():
    subject = random_subject(SIZES["tiny"], torch.device("cpu"))
    seconds = timed_rounds(subject, subject.drafts[REDUCED_HEAD], 3)
    assert {part: len(times) for part, times in seconds.items()} == dict.fromkeys((*PARTS, WHOLE), 3)
    for whole, *parts in zip(seconds[WHOLE], *(seconds[part] for part in PARTS), strict=True):
        assert whole == sum(parts)
        assert min(parts) > 0


@pytest.mark.parametrize("tau", [1.0, 2.5, 4.8, 7.0])
def test_lengths_have_the_average_asked_for(tau):
    lengths = list(islice(replay.accepted(tau, 6), 50))
    assert sum(lengths) / 50 + 1 == pytest.approx(tau, abs=0.05)
    assert 0 <= min(lengths) <= max(lengths) <= 6
    rate = replay.rate_for(tau, 6)
    for depth in range(1, 7):
        assert sum(length >= depth for length in lengths) / 50 == pytest.approx(rate**depth, abs=0.05)


@pytest.mark.parametrize("tau", [0.9, 7.1])
def test_a_tau_that_no_rate_gives_is_refused(tau):
    with pytest.raises(ValueError, match=f"tau: expected 1 to 7, got {tau}"):
        replay.rate_for(tau, 6)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("tau", [3.2, 5.0])
def test_a_replay_accepts_what_its_script_says_and_changes_no_answer(tau, recorded):
    recorder = Recorder() if recorded else None
    subject = random_subject(SIZES["tiny"], torch.device("cpu"), recorder)
    answer = subject.model.generate(**subject.asked, draft=None).tokens
    assert len(set(answer)) > len(answer) // 2, "a lie about an answer that repeats itself may be true"
    script = replay.script_of(answer, tau, subject)
    draft = replay.ReplayDraft(subject.drafts[REDUCED_HEAD], script)
    for _ in range(3):
        found = subject.model.generate(**subject.asked, draft=draft)
        assert found.tokens == answer
        counts = Counter(script.lengths)
        assert found.stats.accepted_histogram == tuple(counts[n] for n in range(max(counts) + 1))
    if recorded:
        recordings, replays = recorder.recordings, recorder.replays
        rounds = subject.model.generate(**subject.asked, draft=None).stats.rounds
        before_rounds = recorder.replays - replays - 4 * rounds
        replays = recorder.replays
        subject.model.generate(**subject.asked, draft=draft)
        assert recorder.replays - replays == before_rounds + 5 * found.stats.rounds, "one more, which replaces the tree"
        assert recorder.recordings == recordings


def invented(model: str, **values: float) -> Found:
    """Figures by section and name, with a comma between them."""
    found = Found()
    for where, value in values.items():
        section, name = where.split(", ", 1)
        found.figures.append(Teller(Kind.RANDOM, model, section).one(name, "x", value))
    return found


def standing_of(name: str, found: Found) -> Standing:
    (standing,) = (each for each in standings([SEVEN], found) if each.target.name == name)
    return standing


@pytest.mark.parametrize(("value", "verdict"), [(0.851, Verdict.MET), (0.849, Verdict.MISSED)])
def test_a_share_of_the_bandwidth_is_bounded_from_below(value, verdict):
    found = invented(SEVEN.name, **{f"{speeds.SECTION}, {speeds.BANDWIDTH}": value})
    assert standing_of("AR: share of the copy bandwidth", found).verdict == verdict


def test_the_best_of_several_heads_counts_for_speed_and_the_worst_for_the_host(monkeypatch):
    name = "host synchronisations a round"
    once = {f"{host.SECTION}, {host.synchronisations(head)}": 1.0 for head in HEADS}
    one = f"{host.SECTION}, {host.synchronisations(FULL_HEAD)}"
    assert standing_of(name, invented(SEVEN.name, **once | {one: 2.0})).verdict == Verdict.MISSED
    assert standing_of(name, invented(SEVEN.name, **once)).verdict == Verdict.MET
    assert standing_of(name, invented(SEVEN.name, **{one: 1.0})).verdict == Verdict.OPEN
    either = Target("either", rounds.ROUND, ("a", "b"), 1.45, False, "times")
    monkeypatch.setattr(targets, "TARGETS", (either,))
    assert standing_of("either", invented(SEVEN.name, **{"round, a": 1.6, "round, b": 1.4})).figure == "b"
    assert standing_of("either", invented(SEVEN.name, **{"round, a": 1.6})).verdict == Verdict.MISSED


def test_what_nobody_measured_is_said_to_be():
    assert {each.verdict for each in standings([SEVEN], Found())} == {Verdict.UNMEASURED}
    assert standings([SIZES["tiny"]], Found()) == []


def test_a_step_reads_what_the_floor_counts():
    sizes = Sizes("x", hidden=8, inner=16, layers=3, heads=4, kv_heads=2, vocabulary=100, head_dim=6)
    attention, mlp = 8 * (4 + 2 + 2 + 4) * 6, 3 * 8 * 16
    assert step_bytes(sizes, 10, itemsize=4) == 4 * (3 * (attention + mlp + 2 * 8 + 2 * 2 * 6 * 10) + 8 * 101)


def test_a_prefill_has_the_operations_of_its_products():
    """Those that torch counts in transformers' modules, but for what the floor leaves out of attention."""
    size = SIZES["tiny"]
    model = random_llava(size, torch.device("cpu"), torch.float32)
    prompt = prompt_for(model, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(**prompt, logits_to_keep=1)
    products = {op: count for op, count in counted.get_flop_counts()["Global"].items() if "attention" not in str(op)}
    attention = 2 * size.language.layers * size.prompt_tokens**2 * size.language.heads * size.language.head_dim
    patches, vision = size.image_tokens + 1, size.vision
    attention += 4 * (vision["num_hidden_layers"] - 1) * patches**2 * vision["hidden_size"]
    layer = 2 * patches * (4 * vision["hidden_size"] ** 2 + 2 * vision["hidden_size"] * vision["intermediate_size"])
    expected = speeds.prefill_operations(size) - attention + layer  # transformers computes the last layer as well
    assert sum(products.values()) == expected


def call(name: str, start: float, duration: float, category: str = "cuda_runtime", **args: int) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": 1, "args": args}


def test_the_hosts_time_is_a_round_without_its_waiting():
    """A copy to the host and the synchronisation behind it are one wait; one more synchronisation is another."""
    events = [
        call(host.ROUND, 0.0, 100.0, "user_annotation"),
        call("cudaGraphLaunch", 5.0, 7.0),
        call("cudaMemcpyAsync", 20.0, 3.0, correlation=1),  # on the device
        call("cudaMemcpyAsync", 30.0, 40.0, correlation=2),
        call("cudaStreamGetCaptureInfo_v2", 70.5, 0.1),
        call("cudaStreamSynchronize", 71.0, 10.0),
        {"ph": "i", "cat": "x", "name": "no span", "ts": 4.0},
        call("Memcpy DtoD (Device -> Device)", 25.0, 1.0, "gpu_memcpy", correlation=1),
        call("Memcpy DtoH (Device -> Pageable)", 60.0, 1.0, "gpu_memcpy", correlation=2),
        call("cudaStreamSynchronize", 110.0, 10.0),  # between rounds
        call(host.ROUND, 200.0, 90.0, "user_annotation"),
        call(host.ROUND, 200.0, 90.0, "gpu_user_annotation"),
        call("cudaLaunchKernel", 210.0, 5.0),
        call("cudaStreamSynchronize", 220.0, 20.0),
        call("cudaMemcpyAsync", 245.0, 4.0, correlation=3),
        call("Memcpy DtoH (Device -> Pinned)", 247.0, 1.0, "gpu_memcpy", correlation=3),
        call("cudaEventSynchronize", 250.0, 6.0),
    ]
    events += [call("linear_kernel(int)", 60.0, 30.0, "kernel"), call("linear_kernel(int)", 230.0, 10.0, "kernel")]
    events += [call("other", 240.0, 50.0, "kernel")]
    assert host.longest_kernels(events, 2) == "other 25, linear_kernel 20"
    first, second = host.read_rounds(events)
    assert (first.seconds, first.waits, first.launches) == (pytest.approx(50e-6), 1, 1)
    assert (second.seconds, second.waits, second.launches) == (pytest.approx(64e-6), 2, 1)


def test_a_section_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def broken(run):
        yield Teller(Kind.RANDOM, "tiny", "broken").one("before", "x", 1.0)
        raise RuntimeError("it broke")

    def whole(run):
        yield Teller(Kind.RANDOM, "tiny", "whole").one("after", "x", 2.0)

    monkeypatch.setattr(report, "plot", lambda *args: False)
    monkeypatch.setattr(command, "limits_of", lambda device: (1e10, None))
    assert command.measure([SIZES["tiny"]], (broken, whole), tmp_path / "new" / "decode", 60.0, None) == 1
    said = capsys.readouterr()
    assert "RuntimeError: it broke" in said.err
    assert "tiny: broken" in said.out
    assert "No plot" in said.out
    _, before, after, last = map(json.loads, (tmp_path / "new" / "decode.jsonl").read_text().splitlines())
    assert (before["name"], after["name"], last["failed"]) == ("before", "after", ["tiny: broken"])


def test_a_run_stops_in_time_and_says_so(tmp_path, monkeypatch, capsys):
    def endless(run):
        while True:
            time.sleep(1.1)
            yield Teller(Kind.RANDOM, "tiny", "endless").one("again", "x", 1.0)

    monkeypatch.setattr(report, "plot", lambda *args: True)
    monkeypatch.setattr(command, "limits_of", lambda device: (1e10, None))
    monkeypatch.setattr(command, "random_subject", lambda size, device: None)
    for seconds, figures in ((1.0, 1), (0.0, 0)):
        assert command.measure([SIZES["tiny"]], (endless,), tmp_path / "new" / "decode", seconds, None) == 0
        assert "the time is over" in capsys.readouterr().out
        assert len((tmp_path / "new" / "decode.jsonl").read_text().splitlines()) == 2 + figures


def test_what_cannot_be_had_says_why():
    line = report.row(Teller(Kind.RANDOM, "tiny", "AR").none("HF", "tokens/s", "RuntimeError: no compiler"))
    assert line == "| random weights | tiny | AR | HF | none |  | tokens/s | why: RuntimeError: no compiler |"
    found = Teller(Kind.RANDOM, "tiny", "AR").many("ours", "ms", [1.0, 2.0, 3.0], nodes=64, share=0.12345)
    line = "| random weights | tiny | AR | ours | 2 | 1.2 to 2.8 | ms | nodes: 64; share: 0.1235 |"
    assert report.row(found) == line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_computes_and_writes_nothing(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "nothing is measured" in said
    assert "| LLaVA-1.5-7B | 8 |" in said
    assert said.count("unmeasured: ") == 2 * len(TARGETS) - 1, "one is of one model alone"
    assert not list(tmp_path.iterdir())


def test_weights_are_random_repeatable_and_of_the_dtype_asked_for():
    one, again = (random_llava(SIZES["tiny"], torch.device("cpu"), torch.bfloat16) for _ in range(2))
    assert {weight.dtype for weight in one.parameters()} == {torch.bfloat16}
    for weight, other in zip(one.parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, other)
    assert torch.get_default_dtype() == torch.float32


def test_full_sizes_have_the_parameters_of_llava():
    """Made nowhere: on the meta device they take no memory."""
    model = random_llava(SEVEN, torch.device("meta"), torch.bfloat16)
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(7.06e9, rel=2e-3)


def test_a_level_reads_a_heads_weights_and_the_rows_it_proposes_by():
    drafts = random_subject(SIZES["tiny"], torch.device("cpu")).drafts
    layer = 4 * 64 * 64 + 3 * 64 * 96 + 64  # without the norm before attention
    fc = 2 * 64 * 64 + 64
    assert rounds.level_bytes(drafts[FULL_HEAD], 4) == 4 * (layer + fc + 256 * 64)
    assert rounds.level_bytes(drafts[REDUCED_HEAD], 2) == 2 * (layer + fc + 100 * 64)


def test_what_stands_behind_several_tensors_is_counted_once():
    whole = torch.zeros(10, 4)
    assert memory.stored([whole[:5], whole[5:], torch.zeros(3)]) == 160 + 12
