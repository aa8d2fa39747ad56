"""The demo's questions and drafts."""

import pytest

from specvlm.demo.run import PICTURE_SIDE, demo_drafts, tasks
from specvlm.demo.scenes import held_out


def test_questions_are_the_same_each_time_and_about_scenes_held_out():
    assert tasks(3) == tasks(3)
    assert tasks(3) != tasks(3, seed=1)
    assert len(tasks(3)) == 3
    assert all(held_out(task.scene) for task in tasks(3))
    assert tasks(1)[0].picture.size == (PICTURE_SIDE, PICTURE_SIDE)


def test_contents_name_every_object_and_its_place():
    task = tasks(1)[0]
    assert task.contents.count("(") == len(task.scene.objects)
    assert task.contents.endswith(f", on {task.scene.background}")


def test_answers_are_judged():
    assert not tasks(1)[0].is_answered_by("There are nine purple stars.")


def test_autoregressive_decoding_comes_first_among_the_drafts():
    assert next(iter(demo_drafts())) is None
    assert demo_drafts()[None] is None


@pytest.mark.parametrize("cell", range(9))
def test_places_differ(cell):
    from specvlm.demo.run import _place

    assert [_place(other) for other in range(9)].count(_place(cell)) == 1
