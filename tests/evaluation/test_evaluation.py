"""What is drawn, what is left out, and what does not depend on how the work was cut."""

import numpy as np
import pytest
import torch

from flowbp.config import load
from flowbp.evaluation.scores import (
    BALANCED,
    Samples,
    Scores,
    compare,
    draw_samples,
    join,
    score_chunk,
    scorers,
    split,
    summarise,
)
from flowbp.evaluation.templates import number, words
from flowbp.rewards import load_reward
from flowbp.runtime.data import Prompt
from flowbp.shapes.recipe.scenes import render, sample_scene
from flowbp.shapes.world import parse

PROMPTS = [Prompt(f"prompt {i}", "even" if i % 2 == 0 else "odd") for i in range(8)]


def scores(values, prompts=PROMPTS, metric="reward"):
    return Scores(list(prompts), list(range(len(prompts))), {metric: np.array(values, dtype=float)})


def config(**fields):
    return load("demo", [f"evaluation.{key}={value}" for key, value in fields.items()]).evaluation


def test_prompts_are_drawn_in_order_and_again_or_several_images_at_a_time():
    names = "abc"
    prompts = [Prompt(name) for name in names]
    assert "".join(p.text for p in draw_samples(prompts, config(samples=7)).prompts) == "abcabca"
    assert "".join(p.text for p in draw_samples(prompts, config(samples=8), of_each=2).prompts) == "aabbccaa"
    assert (
        draw_samples(prompts, config(samples=7)).seeds == draw_samples(prompts, config(samples=8), of_each=2).seeds[:7]
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_left_out_of_both_sides_and_said(bad):
    before, after = scores([0, 1, 0, 1, 0, 1, 0, 1]), scores([2, 2, bad, 2, 2, 2, 2, 2])
    row, even, odd = compare(before, after)
    assert (row["count"], row["missing"], even["missing"], odd["missing"]) == (7, 1, 1, 0)
    assert row["before"] == pytest.approx(4 / 7) and row["change"] == pytest.approx(10 / 7) and even["before"] == 0
    (said,) = [note for note in words("notes", rows=[row]) if "finite" in note]
    assert said == "reward: 1 of 8 images have no finite score, and are left out."
    nothing = summarise(scores([bad] * 8))[0]
    assert (nothing["count"], nothing["missing"]) == (0, 8) and number(nothing["mean"]) == "–"


def test_the_category_mean_takes_each_category_alike():
    (_, _, _, row) = summarise(
        scores([1, 0, 1, 0, 1, 0], PROMPTS[:5:2] + PROMPTS[1:2] + [Prompt("x", "odd"), Prompt("y", "third")])
    )[1:]
    assert row["category"] == BALANCED and row["mean"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_prompts_without_a_category_count_among_all_images_alone():
    rows = summarise(scores([1, 0, 1], [Prompt("a", "even"), Prompt("b", "odd"), Prompt("c")]))
    assert [(row["category"], row["count"]) for row in rows] == [("all", 3), ("even", 1), ("odd", 1)]


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_diversity_does_not_depend_on_the_chunks(chunk):
    prompts = [Prompt(name) for name in "abcabcad"]
    embeddings, images = (
        torch.randn(8, 4, generator=torch.Generator().manual_seed(0)),
        torch.zeros(0, 3, 2, 2, dtype=torch.uint8),
    )
    parts = [
        {"embedding": embeddings[c], "reward": torch.zeros(c.stop - c.start), "images": images} for c in split(8, chunk)
    ]
    found = join(Samples(prompts, list(range(8)), split(8, chunk)), parts).values["diversity"]
    assert found[1] == pytest.approx((embeddings[1] - embeddings[4]).square().sum().item() / 2) and np.isnan(found[7])
    alone = join(Samples(PROMPTS, list(range(8)), split(8, chunk)), parts).values
    assert list(alone) == ["reward"], "one image a prompt has no diversity"


def test_the_first_images_are_kept_however_they_are_cut_into_chunks(monkeypatch):
    drawn = lambda backbone, texts, *_: torch.tensor([int(text) / 255 for text in texts]).view(-1, 1, 1, 1)  # noqa: E731
    monkeypatch.setattr("flowbp.evaluation.scores.generate", drawn)
    prompts, scored_by = [Prompt(str(i)) for i in range(7)], {"embedding": lambda images, texts: images}
    for largest in (1, 3, 7):
        samples = Samples(prompts, list(range(7)), split(7, largest), kept_images=4)
        parts = [score_chunk(None, samples, load("demo"), scored_by, chunk) for chunk in samples.chunks]
        assert join(samples, parts).images.flatten().tolist() == [0, 1, 2, 3]


def test_diversity_is_seen_by_a_held_out_encoder_before_the_one_that_is_trained_on():
    reward, monitor = load_reward("clip", "shapes"), load_reward("clip", "shapes-monitor")
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def blind(images, prompts):
        return images.mean(dim=(1, 2, 3))

    def embedded(rewards, monitors):
        return scorers(config(), rewards, monitors)["embedding"](images, ["a"] * 3)

    torch.testing.assert_close(embedded({"reward": reward}, {"monitor": monitor}), monitor.embed(images))
    torch.testing.assert_close(embedded({"reward": reward}, {"blind": blind}), reward.embed(images))
    assert embedded({"blind": blind}, {}).shape == (3, 3 * 32 * 32)
    torch.testing.assert_close(monitor.embed(images).norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("checker", ["shapes", "flowbp.shapes.checker:load_checker"])
def test_a_checker_is_loaded_by_name_and_judges_its_own_captions_alone(checker, tmp_path):
    options, rng = config().model_copy(update={"checker": checker}), np.random.default_rng(0)
    scene = sample_scene(parse("a red circle"), rng)
    image = torch.from_numpy(render(scene, rng)).permute(2, 0, 1) / 255
    judge = scorers(options, {}, {})["checker"]
    verdicts = judge(torch.stack([image, image]), ["a red circle", "a blue circle"])
    assert verdicts.tolist() == [1.0, 0.0] and verdicts.dtype == torch.float32
    (tmp_path / "prompts.txt").write_text("a red circle\na red dog\n")
    with pytest.raises(ValueError, match="captions of its world alone, others take null: 'red dog' in caption"):
        scorers(options.model_copy(update={"prompts": str(tmp_path / "prompts.txt")}), {}, {})
