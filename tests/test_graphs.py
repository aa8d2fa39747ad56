"""Steps of a round that are recorded once and replayed: the same answers, and none disturbs another."""

import gc
import warnings

import pytest
import torch

from specvlm import SpecVLM
from specvlm.drafts import EagleDraft, VLMDraft
from specvlm.drafts.base import Rehearsal
from specvlm.graphs import CudaRecorder, RecordingDesk
from specvlm.policies import Eagle2, FixedShape, Sage
from specvlm.state import Limits, Sampling
from specvlm.targets.hf import HFTarget
from specvlm.targets.llama import LlamaTarget
from specvlm.tree import BUCKETS, Plan
from tests.drafts.test_eagle3 import random_draft as eagle3
from tests.fakes import ScriptedDraft, prompt_for, tiny_llava, tiny_lm
from tests.test_kernels_in_decoder import eagle, vlm


class Recorder:
    """Runs nothing when it records, and the recorded call at each replay, as a graph does."""

    def __init__(self):
        self.recordings = self.replays = 0

    def __call__(self, call):
        self.recordings += 1

        def replay():
            self.replays += 1
            call()

        return replay


def test_a_step_runs_once_a_call_and_is_recorded_the_second_time():
    recorder = Recorder()
    desk = RecordingDesk(recorder)
    (number,) = desk.keep("number", torch.tensor([3.0]))
    calls = []

    def step():
        calls.append(1)
        number.add_(1)
        return 2 * number, "told"

    for round_ in range(1, 5):
        doubled, told = desk.run("step", step, (number,), into="doubled")
        assert (doubled.tolist(), told, len(calls)) == ([2.0 * (3 + round_)], "told", round_)
    assert (recorder.recordings, recorder.replays) == (1, 3)


def test_what_is_kept_lies_where_it_lay_and_shapes_have_places_of_their_own():
    desk = RecordingDesk(Recorder())
    (first,) = desk.keep("x", torch.ones(2, 3))
    (other,) = desk.keep("x", torch.ones(2, 4))
    (second,) = desk.keep("x", torch.full((3, 2), 5.0).T)
    assert second is first
    assert other is not first
    assert first.tolist() == [[5.0] * 3] * 2


def test_a_step_that_reads_elsewhere_is_another_one():
    recorder = Recorder()
    desk = RecordingDesk(recorder)
    here, there = torch.tensor([1.0]), torch.tensor([2.0])
    for _ in range(3):
        for each in (here, there):
            (found,) = desk.run("step", lambda each=each: (each + 1,), (each,), into="more")
            assert found.tolist() == [each.item() + 1]
    assert recorder.recordings == 2


@pytest.fixture
def recorded():
    model = tiny_llava(num_key_value_heads=2)
    recorder = Recorder()
    return SpecVLM.from_target(LlamaTarget(model, recorder=recorder)), recorder


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replayed_answers_are_those_that_are_not(recorded, temperature):
    specvlm, recorder = recorded
    options = prompt_for(specvlm.target.model) | {"temperature": temperature, "max_new_tokens": 64}
    plain = SpecVLM.from_target(LlamaTarget(specvlm.target.model))
    longer = plain.generate(**options | {"max_new_tokens": 90}).tokens
    for draft in (None, ScriptedDraft(longer, depth=6, decoys=2), ScriptedDraft(longer, depth=3), "ngram"):
        assert specvlm.generate(**options, draft=draft).tokens == longer[:64]
    assert recorder.replays > recorder.recordings


def test_answers_under_way_at_once_do_not_disturb_each_other(recorded):
    specvlm, _ = recorded
    prompts = [prompt_for(specvlm.target.model, seed=seed) for seed in range(2)]
    alone = [specvlm.generate(**prompt, max_new_tokens=30).tokens for prompt in prompts]
    streams = [specvlm.stream(**prompt, max_new_tokens=30) for prompt in prompts]
    said = [[], []]
    for _ in range(30):
        for tokens, stream in zip(said, streams, strict=True):
            tokens += next(stream).tokens[0]
    assert said == alone


def drafts_of(specvlm):
    """A head under a policy of one shape, under one of many that looks back, and under the usual noise."""
    head = eagle(specvlm, Plan(16, 3, 4)).head
    return (
        EagleDraft(head, Eagle2(Plan(16, 3, 4))),
        EagleDraft(head, Sage(depths=(1, 3), widths=(2, 4), nodes=16)),
        EagleDraft(head, Eagle2(Plan(8, 2, 3)), shared_noise=False),
    )


def others_of(specvlm):
    """A head of 8 bits, and small models that see, and that read text alone."""
    return (
        eagle(specvlm, Plan(8, 2, 3)).quantized(),
        vlm(Plan(8, 2, 3)),
        VLMDraft(tiny_lm("qwen2", num_hidden_layers=1), Eagle2(Plan(8, 2, 3))),
    )


@pytest.mark.parametrize(
    ("made", "settings"),
    [
        (drafts_of, {}),
        (drafts_of, {"temperature": 1.0}),
        (drafts_of, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}),
        (others_of, {"temperature": 1.0}),
    ],
)
def test_trees_that_are_grown_by_replays_are_those_that_are_not(recorded, made, settings):
    specvlm, recorder = recorded
    plain = SpecVLM.from_target(LlamaTarget(specvlm.target.model))
    for draft, same in zip(made(specvlm), made(plain), strict=True):
        for seed in range(2):
            options = prompt_for(specvlm.target.model, seed=seed) | settings | {"seed": seed, "max_new_tokens": 40}
            got, expected = specvlm.generate(**options, draft=draft), plain.generate(**options, draft=same)
            assert got.tokens == expected.tokens == plain.generate(**options, draft=None).tokens
            assert got.stats.accepted_histogram == expected.stats.accepted_histogram
    keys = [key for desk in specvlm.target._desks.values() for key, *_ in desk._replays]
    kinds = {kind for _, (kind, *_), *_ in (key for key in keys if "grow" in key)}
    assert kinds == ({"eagle"} if made is drafts_of else {"eagle", "vlm"})
    assert recorder.replays > recorder.recordings > 0


def test_rounds_of_one_shape_are_replayed_whole(recorded):
    specvlm, recorder = recorded
    draft = drafts_of(specvlm)[0]
    options = prompt_for(specvlm.target.model) | {"max_new_tokens": 60}
    for _ in range(2):
        specvlm.generate(**options, draft=draft)
    recordings, replays = recorder.recordings, recorder.replays
    rounds = specvlm.generate(**options, draft=draft).stats.rounds
    assert recorder.recordings == recordings
    assert recorder.replays - replays == 1 + 4 * rounds  # a look at the picture; grow, verify, accept, commit


@torch.inference_mode()
def test_pictures_of_one_shape_are_seen_by_one_recording(recorded):
    specvlm, recorder = recorded
    plain = HFTarget(specvlm.target.model)
    settings = {"sampling": Sampling(0.0, 0, 1.0, torch.tensor([0])), "limits": Limits(4), "taps": None}
    for seed in range(5):
        prompt = prompt_for(plain.model, seed=seed)
        (state, seen), (_, expected) = (target.prefill(prompt, **settings) for target in (specvlm.target, plain))
        assert torch.equal(seen.embeds, expected.embeds)
        kept, told = ([*filter(torch.is_tensor, one.vision.hidden_states)] for one in (seen, expected))
        assert kept
        assert all(torch.equal(one, other) for one, other in zip(kept, told, strict=True))
        state.close()
    assert (recorder.recordings, recorder.replays) == (1, 4)


def test_trees_of_any_maker_are_laid_where_the_steps_read_them(recorded):
    specvlm, recorder = recorded
    options = prompt_for(specvlm.target.model) | {"max_new_tokens": 40}
    answer = specvlm.generate(**options).tokens
    made = []
    for _ in range(3):
        for depth in (6, 3):  # trees of one size, made on the host anew each round
            assert specvlm.generate(**options, draft=ScriptedDraft(answer, depth=depth)).tokens == answer
        made.append((recorder.recordings, [len(desk._returned) for desk in specvlm.target._desks.values()]))
    assert made[1] == made[2]


def test_a_policy_that_cannot_tell_itself_from_another_is_not_recorded(recorded):
    specvlm, recorder = recorded
    options = prompt_for(specvlm.target.model) | {"max_new_tokens": 40}
    head = drafts_of(specvlm)[0].head
    expected = specvlm.generate(**options).tokens
    before = recorder.recordings
    draft = EagleDraft(head, FixedShape([2, 1]))  # a list has no hash
    assert specvlm.generate(**options, draft=draft).tokens == expected
    assert not any("grow" in where[0] for desk in specvlm.target._desks.values() for where in desk._returned)
    assert recorder.recordings > before


def test_weights_that_move_are_recorded_anew(recorded):
    specvlm, _ = recorded
    draft = drafts_of(specvlm)[0]
    options = prompt_for(specvlm.target.model) | {"max_new_tokens": 60}
    before = [specvlm.generate(**options, draft=draft).stats.tau for _ in range(3)]
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in draft.head.parameters():
            weight.data = torch.randn_like(weight)
    plain = SpecVLM.from_target(LlamaTarget(specvlm.target.model))
    expected = plain.generate(**options, draft=EagleDraft(draft.head, draft.policy)).stats.accepted_histogram
    assert specvlm.generate(**options, draft=draft).stats.accepted_histogram == expected
    assert len(set(before)) == 1


def test_an_answer_that_grows_is_not_recorded_anew_nor_is_the_next(recorded):
    specvlm, recorder = recorded
    prompt = prompt_for(specvlm.target.model)
    for new in (40, 30):
        specvlm.generate(**prompt, max_new_tokens=new)
    assert recorder.recordings == 5  # the picture's rows, the root's tree, verify, accept, commit
    for new in (90, 7, 60):
        specvlm.generate(**prompt, max_new_tokens=new)
    assert recorder.recordings == 5


def test_after_a_warm_up_nothing_is_left_to_record(recorded):
    specvlm, recorder = recorded
    prompt = prompt_for(specvlm.target.model)
    answer = SpecVLM.from_target(LlamaTarget(specvlm.target.model)).generate(**prompt, max_new_tokens=40).tokens
    for draft in (drafts_of(specvlm)[0], eagle3(specvlm, Plan(16, 3, 4))):
        before = recorder.recordings
        specvlm.warm_up(**prompt, max_new_tokens=40, draft=draft)
        recordings = recorder.recordings
        assert recordings >= before + len(BUCKETS), "a draft of other features has verify record those"
        assert specvlm.generate(**prompt, max_new_tokens=40, draft=draft).tokens == answer
        for nodes in BUCKETS:
            rehearsal = Rehearsal(nodes, draft.taps)
            assert specvlm.generate(**prompt, max_new_tokens=40, draft=rehearsal).tokens == answer
        assert recorder.recordings == recordings


def test_what_was_recorded_for_a_slab_goes_with_it(recorded):
    specvlm, _ = recorded
    specvlm.generate(**prompt_for(specvlm.target.model), max_new_tokens=10)
    target = specvlm.target
    assert len(target._desks) == 1
    # The stand-in for a graph holds the function, and with it the slab; a graph holds addresses alone.
    for desk in target._desks.values():
        desk._replays.clear()
    target._pool._idle.clear()
    gc.collect()
    assert len(target._desks) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_graphs_give_the_answers_of_eager_forwards(temperature):
    model = tiny_llava(num_key_value_heads=2).to("cuda", torch.bfloat16)
    prompt = {name: one.to("cuda") for name, one in prompt_for(model).items()}
    options = prompt | {"temperature": temperature, "max_new_tokens": 64}
    eager = SpecVLM.from_target(LlamaTarget(model, recorder=Recorder()))
    longer = eager.generate(**options | {"max_new_tokens": 90}).tokens
    graphs = SpecVLM.from_target(LlamaTarget(model))
    assert isinstance(graphs.target._recorder, CudaRecorder)
    for draft in (None, ScriptedDraft(longer, depth=6, decoys=2), ScriptedDraft(longer, depth=31), "ngram"):
        assert graphs.generate(**options, draft=draft).tokens == longer[:64]


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trees_that_graphs_grow_are_those_of_eager_forwards(temperature):
    model = tiny_llava(num_key_value_heads=2).to("cuda", torch.bfloat16)
    options = {name: one.to("cuda") for name, one in prompt_for(model).items()}
    options |= {"temperature": temperature, "max_new_tokens": 64}
    eager, graphs = (
        SpecVLM.from_target(LlamaTarget(model, recorder=Recorder())),
        SpecVLM.from_target(LlamaTarget(model)),
    )
    for draft in (*drafts_of(graphs), *others_of(graphs), eagle3(graphs, Plan(16, 3, 4))):
        expected = eager.generate(**options, draft=draft)
        for _ in range(3):  # as it comes, recorded, replayed
            got = graphs.generate(**options, draft=draft)
            assert got.tokens == expected.tokens
            assert got.stats.accepted_histogram == expected.stats.accepted_histogram


@pytest.mark.gpu
def test_two_hundred_answers_neither_record_anew_nor_grow():
    model = tiny_llava().to("cuda", torch.bfloat16)
    prompt = {name: one.to("cuda") for name, one in prompt_for(model).items()}
    specvlm = SpecVLM.from_target(LlamaTarget(model))
    drafts = [None, eagle(specvlm, Plan(32, 4, 6))]
    lengths = torch.randint(1, 80, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    lengths[:10] = [80] * 10
    recorder, memory, recordings = specvlm.target._recorder, [], 0
    with torch.no_grad():
        for i, length in enumerate(lengths):
            specvlm.generate(**prompt, max_new_tokens=length, seed=i, temperature=1.0, draft=drafts[i % 2])
            torch.cuda.synchronize()
            memory.append(torch.cuda.memory_allocated())
            if i == 9:
                recordings = sum(desk.recordings for desk in specvlm.target._desks.values())
    assert sum(desk.recordings for desk in specvlm.target._desks.values()) == recordings
    assert max(memory[10:]) <= memory[9] + 2**20
    assert recorder.bytes < 2**30


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_round_waits_for_the_host_once(temperature):
    model = tiny_llava(num_key_value_heads=2).to("cuda", torch.bfloat16)
    specvlm = SpecVLM.from_target(LlamaTarget(model))
    options = prompt_for(model) | {"temperature": temperature, "max_new_tokens": 80}
    for draft in (None, *drafts_of(specvlm)[::2]):
        specvlm.warm_up(**options, draft=draft)
        rounds = specvlm.stream(**options, draft=draft)
        for _ in range(6):  # the prompt is checked, and the first round has a shape of its own
            next(rounds)
        for _ in range(4):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    next(rounds)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            # Not torch's own notice that the mode is a prototype.
            assert len([one for one in told if "called a synchronizing" in str(one.message)]) == 1
