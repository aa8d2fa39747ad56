"""Forwards that are recorded once and replayed: the same answers, and who is answered owns what came back."""

import gc

import pytest
import torch

from specvlm import SpecVLM
from specvlm.graphs import CudaRecorder, Recorded
from specvlm.targets.llama import LlamaTarget
from specvlm.tree import BUCKETS, Plan
from tests.fakes import ScriptedDraft, prompt_for, tiny_llava
from tests.test_kernels_in_decoder import eagle


class Recorder:
    """Replays by calling again, into the outputs of the first call, as a graph does."""

    def __init__(self):
        self.recordings = self.replays = 0

    def __call__(self, call):
        self.recordings += 1
        outputs = tuple(torch.full_like(one, torch.nan) for one in call())

        def replay():
            self.replays += 1
            for mine, new in zip(outputs, call(), strict=True):
                mine.copy_(new)

        return replay, outputs


def test_what_comes_back_stays():
    recorder = Recorder()
    doubled = Recorded(lambda x, y: (2 * x, x + y), (torch.zeros(3), torch.zeros(3)), recorder)
    first = doubled(torch.ones(3), torch.ones(3))
    second = doubled(torch.arange(3.0), torch.ones(3))
    assert [one.tolist() for one in first] == [[2, 2, 2], [2, 2, 2]]
    assert [one.tolist() for one in second] == [[0, 2, 4], [1, 2, 3]]
    assert (recorder.recordings, recorder.replays) == (1, 2)


def test_inputs_that_were_given_are_read_at_each_call_and_not_kept():
    given = torch.ones(1, 4).expand(3, -1)
    doubled = Recorded(lambda x: (2 * x,), (given,), Recorder())
    assert doubled(given + 1)[0].tolist() == [[4.0] * 4] * 3
    assert given.tolist() == [[1.0] * 4] * 3


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


def test_an_answer_that_grows_is_not_recorded_anew_nor_is_the_next(recorded):
    specvlm, recorder = recorded
    prompt = prompt_for(specvlm.target.model)
    specvlm.generate(**prompt, max_new_tokens=40)
    assert recorder.recordings == 1
    for new in (90, 7, 60):
        specvlm.generate(**prompt, max_new_tokens=new)
    assert recorder.recordings == 1


def test_after_a_warm_up_nothing_is_left_to_record(recorded):
    specvlm, recorder = recorded
    prompt = prompt_for(specvlm.target.model)
    idle = len(specvlm.target._pool._idle)
    assert list(specvlm.target.warm_up(prompt["input_ids"].shape[1] + 40)) == list(BUCKETS)
    assert recorder.recordings == len(BUCKETS)
    assert len(specvlm.target._pool._idle) == idle
    answer = specvlm.generate(**prompt, max_new_tokens=40).tokens
    for decoys in (0, 1, 4, 9):
        draft = ScriptedDraft(answer, depth=6, decoys=decoys)
        assert specvlm.generate(**prompt, max_new_tokens=40, draft=draft).tokens == answer
    assert recorder.recordings == len(BUCKETS)
    assert list(LlamaTarget(specvlm.target.model).warm_up(60)) == []


def test_what_was_recorded_for_a_slab_goes_with_it(recorded):
    specvlm, _ = recorded
    specvlm.generate(**prompt_for(specvlm.target.model), max_new_tokens=10)
    target = specvlm.target
    assert len(target._recorded) == 1
    # The stand-in for a graph holds the function, and with it the slab; a graph holds addresses alone.
    for of_slab in target._recorded.values():
        of_slab.clear()
    target._pool._idle.clear()
    gc.collect()
    assert len(target._recorded) == 0


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
                recordings = sum(map(len, specvlm.target._recorded.values()))
    assert sum(map(len, specvlm.target._recorded.values())) == recordings
    assert max(memory[10:]) <= memory[9] + 2**20
    assert recorder.bytes < 2**30
