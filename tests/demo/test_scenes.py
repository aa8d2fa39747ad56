"""Scenes: what is drawn, what the picture shows, and the split by layout."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specvlm.demo.scenes import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    GRID,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    held_out,
    random_scene,
    render,
    split_scene,
)

seeds = st.integers(0, 2**32)
properties = settings(deadline=None)


@properties
@given(seeds)
def test_objects_stand_in_distinct_cells_in_reading_order(seed):
    scene = random_scene(Random(seed))
    cells = [item.cell for item in scene.objects]
    assert 1 <= len(cells) <= MAX_OBJECTS
    assert cells == sorted(set(cells))
    assert set(cells) <= set(range(CELLS))


def test_all_attributes_occur():
    rng = Random(0)
    scenes = [random_scene(rng) for _ in range(400)]
    for name, values in (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES), ("cell", range(CELLS))):
        assert {getattr(item, name) for scene in scenes for item in scene.objects} == set(values)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)


@properties
@given(seeds, st.sampled_from([72, 144, 432]))
def test_cells_show_an_object_where_the_scene_has_one(seed, size):
    scene = random_scene(Random(seed))
    drawn = np.asarray(render(scene, size), dtype=int)
    assert drawn.shape == (size, size, 3)
    side, margin = size // GRID, size // GRID // 10
    for cell in range(CELLS):
        row, column = divmod(cell, GRID)
        patch = drawn[row * side : (row + 1) * side, column * side : (column + 1) * side]
        patch = patch[margin:-margin, margin:-margin]
        changed = np.abs(patch - BACKGROUNDS[scene.background]).max(axis=-1) > 8
        assert changed.any() == (cell in [item.cell for item in scene.objects])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_the_middle_of_a_shape_has_its_colour_and_large_is_larger(shape, colour):
    def area(size):
        picture = np.asarray(render(Scene((Object(size, colour, shape, 4),), "black")), dtype=int)
        assert np.abs(picture[36, 36] - COLOURS[colour]).max() <= 2
        return (np.abs(picture - COLOURS[colour]).max(axis=-1) <= 8).sum()

    assert area("large") > 2 * area("small")


@properties
@given(seeds)
def test_the_split_follows_the_layout_alone(seed):
    scene = random_scene(Random(seed))
    moved = tuple(replace(item, shift=(0.01, -0.02)) for item in scene.objects)
    twin = Scene(moved, next(name for name in BACKGROUNDS if name != scene.background))
    assert twin.layout == scene.layout
    assert held_out(twin) == held_out(scene)


def test_a_tenth_of_the_layouts_is_held_out_and_the_two_sides_never_meet():
    rng = Random(1)
    share = np.mean([held_out(random_scene(rng)) for _ in range(4000)])
    assert 0.08 < share < 0.12
    assert all(held_out(split_scene(rng, for_evaluation=True)) for _ in range(50))
    assert not any(held_out(split_scene(rng, for_evaluation=False)) for _ in range(50))
