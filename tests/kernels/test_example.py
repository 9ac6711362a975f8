"""The examples that bring flowbp_kernels to a plain diffusers loop: few changed lines, the same gradient or losses."""

import difflib
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = "reward_gradient.py", "reward_gradient_flowbp.py"
LORA_FILES = "sd3_lora.py", "sd3_lora_flowbp.py"


@pytest.mark.parametrize(("files", "most"), [(FILES, 15), (LORA_FILES, 2)], ids=["gradient", "LoRA"])
def test_it_changes_few_lines(files, most):
    without_docstring = [(EXAMPLES / name).read_text().split('"""', 2)[2] for name in files]
    before, after = map(str.splitlines, without_docstring)
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-" and line[2:].strip()]
    assert max(sum(line[0] == sign for line in changed) for sign in "+-") <= most


def tiny_transformer(**options):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=8, **options,
    )  # fmt: skip


def test_both_give_the_same_gradient():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    gradients = []
    for name in FILES:
        transformer = tiny_transformer()
        prompt, negative = (
            {"encoder_hidden_states": torch.randn(2, 5, 16), "pooled_projections": torch.randn(2, 16)} for _ in range(2)
        )
        step = runpy.run_path(str(EXAMPLES / name))["training_step"]
        loss = step(
            transformer,
            scheduler,
            torch.tanh,
            lambda z: z.flatten(1).mean(1),
            torch.randn(2, 4, 8, 8),
            prompt,
            negative,
        )
        gradients.append((loss, torch.cat([p.grad.flatten() for p in transformer.parameters()])))
    (loss, gradient), (other_loss, other_gradient) = gradients
    torch.testing.assert_close(loss, other_loss)
    assert gradient.norm() > 0 and (gradient - other_gradient).norm() <= 1e-5 * gradient.norm()


def test_both_give_the_same_losses(monkeypatch):
    """20 steps. The bound is 1e-5 of a loss: a hundred roundings of float32."""
    pytest.importorskip("peft")
    monkeypatch.setenv("FLOWBP_KERNELS", "reference")
    losses = []
    for name in LORA_FILES:
        transformer = tiny_transformer(dual_attention_layers=(0,), qk_norm="rms_norm")
        batch = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 16), torch.randn(4, 16)
        train = runpy.run_path(str(EXAMPLES / name))["train"]
        losses.append(train(transformer, [batch] * 20, learning_rate=0.03))
    before, after = losses
    assert before[-5:].mean() < before[:5].mean() and not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0)
