"""How far a quantised base is from the plain one, on the embedded model, whose weights are trained: the velocity, and
the gradient of a LoRA. 64 captions, rollouts of 12 steps, float32.

    weights     |W - W'| / |W| of the layers that are quantised
    velocity    |v - u| / |u| with the plain model's velocities u, at the latents of its rollout, over all noise levels
    all layers  the same where the layers before and after the blocks are quantised too, as in no run of flowbp
    cosine      of the gradients of the reward by a fresh LoRA of rank 16 (FlowBP-Sparse, every step active), both swept
                over the latents and from the reward's gradient of the plain model's rollout
    own         the same where each model rolls out, and the reward looks at its own images

    python benchmarks/quantised.py --json docs/quantised.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from flowbp.backbones import load_backbone
from flowbp.backbones.base import Backbone, bind_velocity
from flowbp.backbones.quantise import quantise_blocks
from flowbp.config.schema import TuningConfig
from flowbp.guidance import Guidance
from flowbp.methods import FlowBPSparse
from flowbp.rewards import load_reward
from flowbp.runtime.data import load_prompts, sample_seeds
from flowbp.runtime.environment import environment, versions
from flowbp.runtime.tuning import trainable_parameters
from flowbp.surrogate import backward, reward_input
from flowbp.trajectory import Trajectory, rollout

STEPS, SAMPLES = 12, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    options = {"device": arguments.device, "max_sequence_length": 1}
    texts = [prompt.text for prompt in load_prompts("shapes:train")[:SAMPLES]]
    reward = load_reward("clip", "shapes", arguments.device)

    def velocities(backbone: Backbone, latents: dict[int, Tensor]) -> Tensor:
        velocity = bind_velocity(backbone, texts, Guidance())
        with torch.no_grad():
            return torch.stack([velocity(x, sigmas[node]) for node, x in latents.items()])

    def roll_out(backbone: Backbone) -> tuple[Trajectory, Tensor]:
        """The trajectory, and the gradient of minus the mean reward."""
        seeds = sample_seeds(0, 0, count=SAMPLES)
        noise = backbone.noise(32, 32, [torch.Generator().manual_seed(seed) for seed in seeds])
        trajectory = rollout(bind_velocity(backbone, texts, Guidance()), noise, sigmas, plan)
        z = reward_input(plan, trajectory).requires_grad_()
        return trajectory, torch.autograd.grad(-reward(backbone.decode(z), texts).mean(), z)[0]

    def lora_gradient(backbone: Backbone, parameters: dict[str, Tensor], trajectory: Trajectory, g: Tensor) -> Tensor:
        for p in parameters.values():
            p.grad = None
        backward(plan, trajectory, bind_velocity(backbone, texts, Guidance()).replay, g)
        return torch.cat([p.grad.flatten() for p in parameters.values()])

    def with_lora(backbone: Backbone) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return trainable_parameters(backbone, TuningConfig(rank=16))

    plain = load_backbone("shapes", **options)
    sigmas = plain.sigmas(STEPS, 32, 32)
    plan = FlowBPSparse(num_active=STEPS).at(sigmas.double().numpy(), list(range(STEPS)))
    weights = {name: p.detach().clone() for name, p in plain.denoiser.named_parameters()}
    trained = with_lora(plain)
    trajectory, g = roll_out(plain)
    gradient = lora_gradient(plain, trained, trajectory, g)
    latents = {node: trajectory.latents[node] for node in range(STEPS)}
    expected, rows = velocities(plain, latents), []
    for kind in ("nf4", "int8", "float8"):
        everywhere = load_backbone("shapes", **options)
        everywhere.denoiser._no_split_modules = [type(everywhere.denoiser).__name__]
        quantise_blocks(everywhere.denoiser, kind)
        backbone = load_backbone("shapes", **options, quantise={"weights": kind})
        layers = {name: dequantised(layer) for name, layer in backbone.denoiser.named_modules()}
        pairs = [(value, weights[f"{name}.weight"]) for name, value in layers.items() if value is not None]
        row = {
            "format": kind,
            "share": sum(w.numel() for w, _ in pairs) / sum(w.numel() for w in weights.values()),
            "weights": distance(*(torch.cat([w.flatten() for w in side]) for side in zip(*pairs, strict=True))),
            "velocity": distance(velocities(backbone, latents), expected),
            "all layers": distance(velocities(everywhere, latents), expected),
        }
        trained = with_lora(backbone)
        for name, given in {"cosine": (trajectory, g), "own": roll_out(backbone)}.items():
            found = lora_gradient(backbone, trained, *given)
            row[name] = torch.cosine_similarity(found, gradient, dim=0).item()
        rows.append(row)
        print("  ".join(f"{key} {value if key == 'format' else f'{value:.5f}'}" for key, value in row.items()))
    if arguments.json:
        about = environment() | versions("bitsandbytes", "torchao", "peft")
        arguments.json.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")


def dequantised(layer: nn.Module) -> Tensor | None:
    """The weight with which a quantised layer computes; None for any other module."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    weight = getattr(layer, "weight", None)
    if isinstance(weight, Params4bit):
        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize() if type(weight).__module__.startswith("torchao") else None


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    main()
