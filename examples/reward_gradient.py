"""A step of reward fine-tuning on a diffusers flow-matching transformer, in plain PyTorch.

The network sees detached latents; the graphs of all trained steps are alive until backward.
"""

import torch


def training_step(transformer, scheduler, decode, reward, noise, prompt, negative, guidance=4.5, trained=(1, 3, 4)):
    """Leaves the gradient of -mean reward on the parameters and returns it. prompt, negative: the transformer's keyword
    arguments.
    """

    def velocity(x, t, condition):
        return transformer(hidden_states=x, timestep=t.expand(len(x)), **condition, return_dict=False)[0]

    x, steps = noise, scheduler.sigmas.diff().tolist()
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            v_uncond = velocity(x.detach(), t, negative)
        with torch.set_grad_enabled(i in trained):
            v_cond = velocity(x.detach(), t, prompt)
        x = x + steps[i] * (v_uncond + guidance * (v_cond - v_uncond))

    loss = -reward(decode(x)).mean()
    loss.backward()
    return loss.detach()
