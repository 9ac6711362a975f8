"""Truths of the world of `shapes`: captions, scenes, checker and splits. No model is loaded."""

import subprocess
import sys

import numpy as np
import pytest

from flowbp.shapes import check, check_batch, prompts
from flowbp.shapes.checker import find_objects
from flowbp.shapes.prompts import splits
from flowbp.shapes.recipe.captions import CATEGORIES, SPLITS, caption, category_of, pools, served
from flowbp.shapes.recipe.scenes import render, sample_negative, sample_scene, sample_spec, texts, true_specs
from flowbp.shapes.world import NUMBERS, RELATIONS, Object, Spec, parse, satisfies


def drawn(n, seed=0):
    rng = np.random.default_rng(seed)
    specs = [sample_spec(rng) for _ in range(n)]
    scenes = [sample_scene(spec, rng) for spec in specs]
    return specs, scenes, np.stack([render(scene, rng) for scene in scenes]), rng


def test_checker_accepts_renderings_of_the_caption():
    specs, _, images, _ = drawn(600)
    assert check_batch(images, [caption(spec) for spec in specs]).mean() > 0.99


def test_checker_rejects_hard_negatives():
    specs, scenes, images, rng = drawn(600, seed=1)
    true = [frozenset(caption(s) for s in true_specs(scene)) for scene in scenes]
    wrong = [caption(sample_negative(spec, rng, t, known=False)) for spec, t in zip(specs, true, strict=True)]
    assert check_batch(images, wrong).mean() < 0.01


def test_checker_survives_noise_and_blur_of_a_decoder():
    specs, _, images, rng = drawn(200, seed=2)
    x = images / 255.0
    x = 0.9 * x + 0.1 * np.roll(x, 1, axis=1) + rng.normal(0, 0.02, x.shape)
    assert check_batch(x.transpose(0, 3, 1, 2), [caption(spec) for spec in specs]).mean() > 0.97


def test_checker_rejects_objects_of_two_colours_and_merged_objects():
    _, _, images, _ = drawn(300, seed=3)
    one = [image for image in images if len(find_objects(image)) == 1]
    for image in one[:20]:
        (found,) = find_objects(image)
        halved, doubled = image.copy(), np.minimum(image, np.roll(image, 5, axis=1))
        halved[:, : int(found.x)] = halved[:, : int(found.x), [1, 2, 0]]
        assert find_objects(halved) is None
        assert find_objects(doubled) is None


def test_checker_is_blind_to_the_form_of_the_image():
    torch = pytest.importorskip("torch")
    specs, _, images, _ = drawn(5, seed=4)
    for spec, image in zip(specs, images, strict=True):
        tensor = torch.from_numpy(image).permute(2, 0, 1) / 255
        assert check(image, caption(spec)) and check(tensor, caption(spec)) and check(tensor.double(), caption(spec))
    with pytest.raises(ValueError, match="resize"):
        check(np.zeros((64, 64, 3), np.uint8), "a circle")


def test_every_true_caption_of_a_scene_passes_its_rendering():
    _, scenes, images, _ = drawn(100, seed=5)
    for scene, image in zip(scenes, images, strict=True):
        assert all(check(image, caption(spec)) for spec in true_specs(scene, margin=2.0))


def test_parse_inverts_the_words_of_every_caption():
    every = [spec for split in SPLITS for lists in pools(split).values() for pool in lists for spec in pool]
    assert all(parse(caption(spec)) == spec for spec in every)
    assert all(len(caption(spec).split()) <= 10 for spec in every)


def test_parse_names_what_is_not_a_caption():
    with pytest.raises(ValueError, match="dog"):
        parse("a red dog")


def test_relations_have_direction():
    scene = sample_scene(parse("a red circle left of a blue square"), np.random.default_rng(0))
    assert satisfies(scene, parse("a blue square right of a red circle"))
    assert not satisfies(scene, parse("a blue square left of a red circle"))
    assert not satisfies(scene, parse("a red circle above a blue square"))


def test_the_file_of_prompts_is_what_the_recipe_serves():
    assert splits() == {split: served(split) for split in SPLITS}


def test_a_relation_dominates_the_other_axis_and_a_diagonal_has_none():
    square = Object("square", "blue", 20.0, 20.0, 4.0)
    for x, y, holds in ((8.0, 9.0, {"left of"}), (9.0, 8.0, {"above"}), (8.0, 8.0, set())):
        objects = [Object("circle", "red", x, y, 4.0), square]
        assert {r for r in RELATIONS if satisfies(objects, parse(f"a red circle {r} a blue square"))} == holds


def test_splits_are_deterministic_balanced_and_disjoint_where_large():
    for split in SPLITS:
        listed = prompts(split)
        assert listed == prompts(split)
        assert [p.category for p in listed[:6]] == list(CATEGORIES)
        assert all(category_of(parse(p.text)) == p.category for p in listed)
    for category, lists in pools("train").items():
        for i, pool in enumerate(lists):
            others = {caption(spec) for split in ("dev", "test") for spec in pools(split)[category][i]}
            own, shared = {caption(spec) for spec in pool}, len(pool) < 34
            assert others == own if shared else not others & own
    assert not {caption(spec) for p in pools("dev")["position"] for spec in p} & {
        caption(spec) for p in pools("test")["position"] for spec in p
    }


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="validation"):
        prompts("validation")


def test_known_negatives_are_train_captions():
    rng = np.random.default_rng(0)
    assert all(caption(sample_negative(sample_spec(rng), rng)) in texts("train") for _ in range(300))
    assert caption(Spec(((None, "cross"),) * NUMBERS["two"])) == "two crosses"


def test_import_is_light():
    heavy = ("torch", "diffusers", "transformers", "scipy")
    code = f"import sys, flowbp.shapes; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
