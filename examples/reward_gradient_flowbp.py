"""A step of reward fine-tuning on a diffusers flow-matching transformer, with flowbp_kernels.

The same gradient as reward_gradient.py; backward replays the trained steps, so that one step's graph is alive at a
time.
"""

import torch

from flowbp_kernels import cfg_euler_step, selective_recompute


def training_step(transformer, scheduler, decode, reward, noise, prompt, negative, guidance=4.5, trained=(1, 3, 4)):
    """Leaves the gradient of -mean reward on the parameters and returns it. prompt, negative: the transformer's keyword
    arguments.
    """

    def velocity(x, t, condition):
        return transformer(hidden_states=x, timestep=t.expand(len(x)), **condition, return_dict=False)[0]

    x, steps = noise, scheduler.sigmas.diff().tolist()
    latents = []
    for i, t in enumerate(scheduler.timesteps):
        latents.append(x)
        with torch.no_grad():
            v_uncond = velocity(x.detach(), t, negative)
            v_cond = velocity(x.detach(), t, prompt)
        x, _ = cfg_euler_step(x, v_cond, v_uncond, guidance, steps[i])
    nodes = [latents[i] for i in trained], [scheduler.timesteps[i] for i in trained], [steps[i] for i in trained]
    x = selective_recompute(x, lambda x, t: guidance * velocity(x, t, prompt), *nodes, params=transformer.parameters())

    loss = -reward(decode(x)).mean()
    loss.backward()
    return loss.detach()
