"""`reward.dtype=tf32`: the reward's own products take TF32, in its score and in its gradient, and no others do."""

import pytest
import torch
from tiny_rewards import PROMPTS, images

from flowbp.config import ConfigError, load
from flowbp.objective import Objective, reward_gradient
from flowbp.rewards import ImageEncoder, load_reward


def switch():
    return torch.backends.cuda.matmul.fp32_precision


@pytest.fixture
def noted(monkeypatch):
    """Switch at every linear layer that runs, and at every gradient of one that is taken."""
    seen, plain = [], torch.nn.Linear.forward

    def forward(self, x):
        seen.append(("forward", switch()))
        y = plain(self, x)
        if y.requires_grad:
            y.register_hook(lambda g: seen.append(("backward", switch())))
        return y

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    return seen


def test_the_score_and_its_gradient_take_tf32_and_the_decoder_does_not(folders, noted):
    rewards = [load_reward("pickscore", str(folders["pickscore"]), dtype=dtype) for dtype in ("float32", "tf32")]
    before, decoder = switch(), torch.nn.Linear(3, 3)
    found = []
    for reward in rewards:
        noted.clear()

        def score(z, part, reward=reward):
            return reward(decoder(z.movedim(1, 3)).movedim(3, 1).sigmoid(), PROMPTS[part])

        found.append(reward_gradient(Objective(), score, images(), torch.full((2,), 0.5)))
        by_pass = {kind: [state for each, state in noted if each == kind] for kind in ("forward", "backward")}
        own = {"tf32"} if reward is rewards[1] else {before}
        assert by_pass["forward"][0] == before and set(by_pass["forward"][1:]) == own  # the decoder's comes first,
        assert by_pass["backward"][-1] == before and set(by_pass["backward"][:-1]) == own  # and its gradient last
        assert switch() == before
    for plain, tf32 in zip(*found, strict=True):  # on a CPU the switch has no effect
        assert torch.equal(plain, tf32) and plain.isfinite().all()


def test_it_is_float32_that_embeds_where_the_reward_does(folders):
    clip, other = (load_reward(name, str(folders[name]), dtype="tf32") for name in ("clip", "imagereward"))
    assert isinstance(clip, ImageEncoder) and not isinstance(other, ImageEncoder)
    plain = load_reward("clip", str(folders["clip"]), dtype="float32")
    assert torch.equal(clip.embed(images()), plain.embed(images()))
    with torch.no_grad():
        assert clip(images(), PROMPTS).dtype == torch.float32


def test_a_config_takes_it_for_rewards_and_monitors_and_no_other_word(tmp_path):
    config = load("demo", ["reward.dtype=tf32"])
    assert config.reward["reward"].dtype == "tf32"
    with pytest.raises(ConfigError, match="reward.*dtype.*'float32', 'bfloat16' or 'tf32'"):
        load("demo", ["reward.dtype=tf16"])
