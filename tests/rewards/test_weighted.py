"""Several rewards at once, the running scale, rewards of one's own, and what a config may say of them."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny_rewards import images

from flowbp.config import ConfigError, RunConfig, dump, load
from flowbp.objective import Objective, loss_factors, reward_gradient
from flowbp.rewards import Relative, Smoothing, load_reward
from flowbp.rewards.weighted import RunningScale, Term, WeightedRewards, smoothed

X, PROMPTS = images(8, 8, batch=4), ["a"] * 4


def bright(x, prompts):
    return x.mean(dim=(1, 2, 3))


def contrast(x, prompts):
    return 100 * x.var(dim=(1, 2, 3))


def no_batch(x, prompts):
    return x.mean()


def detached(x, prompts):
    return bright(x.detach(), prompts)


class Darkness:
    def __init__(self, device):
        self.device = device

    def __call__(self, x, prompts):
        return -bright(x, prompts)


def gradient(weighted, factors=None):
    x = X.clone().requires_grad_()
    return torch.autograd.grad(weighted.loss(weighted.score(x, PROMPTS, [0] * 4), factors), x)[0]


def test_the_loss_is_the_weighted_sum_of_each_rewards_loss():
    weighted = WeightedRewards({"a": Term(bright, Objective(0.55), 2.0), "b": Term(contrast, Objective(), 0.5)})
    factors = loss_factors(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([True, True, False, True]))
    x = X.clone().requires_grad_()
    loss = 2 * Objective(0.55).loss(bright(x, PROMPTS), factors) + 0.5 * Objective().loss(contrast(x, PROMPTS), factors)
    torch.testing.assert_close(gradient(weighted, factors), torch.autograd.grad(loss, x)[0])
    scores = weighted.score(X, PROMPTS, [0] * 4)
    logged = weighted.update(scores)
    assert (logged["a"], logged["b"]) == pytest.approx((bright(X, PROMPTS).mean().item(), scores[:, 1].mean().item()))


def test_one_reward_of_weight_one_is_the_plain_objective():
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(Objective(20.0).loss(contrast(x, PROMPTS)), x)[0]
    torch.testing.assert_close(
        gradient(WeightedRewards({"reward": Term(contrast, Objective(20.0))})), expected, rtol=0, atol=0
    )


def test_a_reward_that_met_its_hinge_leaves_the_gradient_to_the_others():
    both = WeightedRewards({"met": Term(contrast, Objective(-1.0)), "b": Term(bright)})
    assert torch.equal(gradient(both), gradient(WeightedRewards({"b": Term(bright)})))


def test_normalised_rewards_pull_alike_whatever_their_units():
    def normalised(factor):
        weighted = WeightedRewards({"r": Term(lambda x, p: factor * contrast(x, p), scale=RunningScale())})
        weighted.update(weighted.score(X, PROMPTS, [0] * 4))
        return gradient(weighted)

    torch.testing.assert_close(normalised(1e4), normalised(1.0), rtol=1e-4, atol=0)


def test_a_relative_reward_is_the_difference_of_two_wordings():
    def by_words(x, prompts):
        return torch.tensor([float(len(prompt)) for prompt in prompts]) * bright(x, prompts)

    relative = Relative(positive="photo. {prompt}", negative="{prompt}", scale=0.5)
    term = Term(by_words, Objective(9.0), smoothing=Smoothing(copies=2, shift=0, noise=0.0), relative=relative)
    weighted = WeightedRewards({"r": term})
    prompts = ["a", "bb", "{prompt}", ""]
    lengths = torch.tensor([1.5 * (7 + len(prompt)) - len(prompt) for prompt in prompts])
    scores = weighted.score(X, prompts, [0] * 4)
    torch.testing.assert_close(scores[:, 0], lengths * bright(X, prompts))
    assert weighted.rewards == {"r": by_words}, "an evaluation scores the reward itself"


@pytest.mark.parametrize(
    "settings",
    [
        "positive: photo, negative: ''",
        "positive: '{prompt}', negative: '{prompt}'",
        "positive: '{prompt}', negative: '', scale: -1",
        "positive: '{prompt}'",
        "",
    ],
    ids=["no prompt", "twice the same", "scale", "no negative", "nothing"],
)
def test_a_relative_reward_that_compares_nothing_is_refused(settings):
    with pytest.raises(ConfigError, match="[Rr]elative needs"):
        load("demo", [f"reward.relative={{{settings}}}"])


def test_a_relative_reward_survives_the_config_of_its_run(tmp_path):
    config = load("demo", ["reward.relative={positive: '{prompt}', negative: ''}"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config and config.reward["reward"].relative == Relative("{prompt}", "")


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_logged_shares_are_those_of_each_rewards_own_gradient(rows):
    terms = {"a": Term(bright), "b": Term(contrast, Objective(20.0), 0.5), "met": Term(contrast, Objective(-1.0))}
    norms = torch.stack([gradient(WeightedRewards({name: term})).norm() for name, term in terms.items()])
    weighted, factors = WeightedRewards(terms), torch.full((4,), 0.25)
    for _ in range(2):  # a step's shares are its own
        scores, _, _ = reward_gradient(weighted, lambda x, p: weighted.score(x, PROMPTS[p], [0] * 4), X, factors, rows)
        logged = weighted.update(scores)
        shares = torch.tensor([logged[f"{name}_share"] for name in terms])
        torch.testing.assert_close(shares, norms / norms.sum())
    assert shares[2] == 0 and WeightedRewards({"a": Term(bright)}).update(scores[:, :1]).keys() == {"a"}


def test_rewards_of_which_some_are_normalised_are_told_apart(caplog):
    scaled = Term(bright, scale=RunningScale())
    WeightedRewards({"a": scaled, "b": Term(contrast, scale=RunningScale())}).warn_of_mixtures()
    WeightedRewards({"a": scaled}).warn_of_mixtures()
    assert not caplog.messages
    WeightedRewards({"a": scaled, "b": Term(contrast)}).warn_of_mixtures()
    assert "normalise is true of a alone" in caplog.text


@pytest.mark.parametrize("rows", [1, 3])
def test_a_mixture_in_parts_has_the_gradient_of_the_whole(rows):
    smooth = Smoothing(copies=2)
    weighted = WeightedRewards(
        {"a": Term(bright, smoothing=smooth), "b": Term(contrast, Objective(4.0), 0.5, smooth, RunningScale())}
    )
    weighted.update(weighted.score(X, PROMPTS, [0] * 4))
    factors, seeds = torch.full((4,), 0.25), [3, 1, 4, 1]

    def score(x, part):
        return weighted.score(x, PROMPTS[part], seeds[part])

    whole, parts = (reward_gradient(weighted, score, X, factors, n) for n in (4, rows))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)
    scores = weighted.score(X, PROMPTS, seeds)  # an image's perturbation is its seed's
    same = X[:1].expand_as(X)
    assert (weighted.score(same, PROMPTS, seeds)[1] == weighted.score(same, PROMPTS, seeds)[3]).all()
    assert not torch.equal(scores, weighted.score(X, PROMPTS, seeds[::-1]))


def test_smoothing_shifts_an_image_by_every_offset_up_to_its_shift():
    image, seen = torch.zeros(1, 3, 5, 5), set()
    image[..., 2, 2] = 1.0

    def look(images, prompts):
        seen.update(map(tuple, images[0, 0].nonzero().tolist()))
        return bright(images, prompts)

    smoothed(look, Smoothing(copies=100, shift=1, noise=0.0), image, ["a"], [0])
    assert seen == {(row, column) for row in (1, 2, 3) for column in (1, 2, 3)}


def test_the_running_scale_is_the_deviation_of_recent_scores():
    scale, rng = RunningScale(), torch.Generator().manual_seed(0)
    assert scale.value == 1.0
    first = 3 + 2 * torch.randn(8, generator=rng)
    scale.update(first)
    assert scale.value == pytest.approx(first.std(correction=0).item(), rel=1e-5)
    for _ in range(1000):
        scale.update(5 + 0.5 * torch.randn(64, generator=rng))
    assert scale.value == pytest.approx(0.5, rel=0.05)


def test_the_running_scale_survives_equal_scores_and_broken_ones():
    scale = RunningScale()
    scale.update(torch.full((4,), 20.0))
    assert scale.value == pytest.approx(0.02)  # a thousandth of the root mean square: no division by nothing
    before = scale.moments.clone()
    scale.update(torch.tensor([1.0, float("nan")]))
    assert torch.equal(scale.moments, before)


@pytest.mark.parametrize("place", [0, 1, 100])
@pytest.mark.parametrize("outlier", [30.0, 1e6])
def test_one_outlier_hardly_moves_the_running_scale_and_a_new_scale_does(outlier, place):
    scale, rng = RunningScale(), torch.Generator().manual_seed(0)
    for step in range(200):
        scores = 0.5 + 0.1 * torch.randn(8, generator=rng)
        scores[0] = outlier if step == place else scores[0]
        scale.update(scores)
        # Widest where the first batch of 8 holds the outlier: (1 + BOUND^2 / 8)^(1/2) = 3.7 times its own deviation.
        assert step < place or 0.05 < scale.value < 0.5
    for _ in range(50):
        scale.update(500 + 100 * torch.randn(8, generator=rng))
    assert scale.value > 50


def test_a_resumed_mixture_goes_on_with_its_scales():
    def build():
        return WeightedRewards(
            {"a": Term(bright, scale=RunningScale()), "b": Term(contrast, scale=RunningScale()), "c": Term(bright)}
        )

    first, second = build(), build()
    first.update(first.score(X, PROMPTS, [0] * 4))
    second.load_state_dict(first.state_dict())
    assert torch.equal(gradient(first), gradient(second)) and not torch.equal(gradient(first), gradient(build()))
    with pytest.raises(ValueError, match=r"holds running scales of \['a', 'b'\], this config normalises \[\]"):
        WeightedRewards({"a": Term(bright)}).load_state_dict(first.state_dict())


# -- rewards of one's own ----------------------------------------------------------------------------------------------


def test_a_function_or_a_class_of_ones_own_is_named_by_its_module():
    assert torch.equal(load_reward(f"{__name__}:bright")(X, PROMPTS), bright(X, PROMPTS))
    assert torch.equal(load_reward(f"{__name__}:Darkness")(X, PROMPTS), -bright(X, PROMPTS))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_batch", r"must return one score an image, \[4\], not \[\]"),
        ("detached", "is not differentiable in the images"),
        ("nothing", "cannot import the reward"),
    ],
)
def test_a_function_that_is_no_reward_is_refused(name, says):
    with pytest.raises(ValueError, match=says):
        load_reward(f"{__name__}:{name}")(X.clone().requires_grad_(), PROMPTS)


def test_the_rewards_and_configs_of_the_documentation_work():
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    namespace = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, namespace)
    for reward in (namespace["warmth"], namespace["Sharpness"]("cpu")):
        x = X.clone().requires_grad_()
        scores = reward(x, PROMPTS)
        assert scores.shape == (4,) and torch.autograd.grad(scores.sum(), x)[0].abs().sum() > 0
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    for block in blocks:
        values = yaml.safe_load(dump(load("demo")))
        assert RunConfig.model_validate(values | {"evaluation": None, "reward": yaml.safe_load(block)["reward"]})
    assert len(blocks) == 4


def test_settings_of_a_published_reward_are_refused_for_ones_own():
    with pytest.raises(ValueError, match="model, dtype, revision and sha256 are not for it"):
        load_reward(f"{__name__}:bright", model="shapes")


# -- configuration -----------------------------------------------------------------------------------------------------


def test_one_reward_is_short_for_a_mapping_of_one():
    config = load("demo")
    assert list(config.reward) == ["reward"] and config.reward["reward"].hinge == 0.8
    assert "reward:\n  name: clip" in dump(config)


def test_another_reward_does_not_inherit_the_hinge_of_the_preset_one():
    assert load("demo", ["reward.name=hpsv2"]).reward["reward"].hinge is None
    assert load("demo", ["reward.weight=2"]).reward["reward"].hinge == 0.8
    assert list(load("demo", ["reward.a.model=shapes"]).reward) == ["a"]


def test_several_rewards_have_names_weights_hinges_and_scales(tmp_path):
    first = "a: {model: shapes, weight: 2, smooth: {copies: 3}}"
    rewards = f"reward={{{first}, b: {{model: shapes-monitor, hinge: 0.5, normalise: true}}}}"
    config = load("demo", ["evaluation=null", rewards])
    assert (
        config.reward["a"].weight == 2
        and config.reward["a"].smooth == Smoothing(copies=3)
        and config.reward["b"].normalise
    )
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("reward={a: {model: shapes, wight: 2}}", r"unknown key 'wight'; did you mean 'weight'"),
        ("reward={loss: {model: shapes}}", "'loss' names two metrics"),
        ("reward={monitor: {model: shapes}}", "'monitor' names two metrics"),
        ("reward={a_share: {model: shapes}}", "'a_share' names two metrics"),
        ("reward.weight=0", "greater than 0"),
        ("reward.smooth.copies=0", "smoothing needs 1 to 1000 copies"),
        ("evaluation.monitors.monitor.hinge=1", "unknown key 'hinge'"),
    ],
)
def test_a_bad_reward_is_named(override, says):
    with pytest.raises(ConfigError, match=says):
        load("demo", [override])
