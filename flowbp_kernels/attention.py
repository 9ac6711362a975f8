"""Which attention kernel a diffusers transformer runs: PyTorch's choice, cuDNN's first, or one that is named.

FLUX.1, FLUX.2 and Z-Image hand queries, keys and values to a dispatcher of diffusers, which knows many kernels by name.
SD3 calls PyTorch's scaled_dot_product_attention itself, which has four kernels and an order in which it tries them.
That order and the dispatcher's active kernel are the whole process's. So nothing here sets either of them for longer
than one attention takes, and other models keep their own.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# PyTorch's kernels by the names of diffusers. Under its name each runs alone, and what it cannot run is an error.
OF_PYTORCH = {
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
CHOICES = ("auto", "native")


def check_attention(name: str, dispatched: bool = True) -> None:
    """Raise ValueError, which names the choices, unless `name` is "auto", "native" or a kernel that is installed here.

    dispatched: whether the transformer takes every kernel of diffusers' `AttentionBackendName`, or PyTorch's alone.
    A kernel of the Hub, such as "flash_hub", is fetched if the environment says DIFFUSERS_TRUST_REMOTE_KERNELS=true:
    it is code, and a name in the config of a stranger must not run any.
    """
    if name in CHOICES:
        return
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
    from diffusers.utils.constants import DIFFUSERS_TRUST_REMOTE_KERNELS

    known = [*CHOICES, *(sorted(kind.value for kind in AttentionBackendName) if dispatched else OF_PYTORCH)]
    choices = f"there are {', '.join(known)}"
    if name not in known:
        elsewhere = name in {kind.value for kind in AttentionBackendName}
        why = "is not for a transformer that calls PyTorch's attention itself, as SD3's" if elsewhere else "is unknown"
        raise ValueError(f"attention={name[:80]!r} {why}; {choices}")
    if name.endswith("_hub") and not DIFFUSERS_TRUST_REMOTE_KERNELS:
        way_out = "set DIFFUSERS_TRUST_REMOTE_KERNELS=true in the environment to run it here"
        raise ValueError(f"attention={name!r} is code from the Hub: {way_out}, or take another; {choices}")
    try:
        with attention_backend(name):
            pass
    except Exception as error:  # of whatever library it is made of
        cause = str(error).rstrip(".")
        raise ValueError(f"attention={name!r} is not to be had here: {cause}; {choices}") from error


def try_attention(name: str, device: torch.device | str, dtype: torch.dtype, gradient: bool) -> None:
    """Raise ValueError unless the kernel `name` runs on `device` in `dtype`, for queries [1, 128, 2, 64], and with
    `gradient` has a gradient to queries, keys and values: sageattention returns a result without a graph, from which a
    network would learn through its other layers alone, and wrongly. Nothing is tried for "auto" and "native".
    """
    if name in CHOICES:
        return
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    x = torch.linspace(-1, 1, 128 * 2 * 64, device=device).view(1, 128, 2, 64).to(dtype)
    q, k, v = (x.clone().requires_grad_(gradient) for _ in range(3))
    try:
        with torch.set_grad_enabled(gradient):
            y = dispatch_attention_fn(q, k, v, backend=AttentionBackendName(name))
        if gradient:
            torch.autograd.grad(y.float().sum(), (q, k, v))
    except Exception as error:
        fault = "gives no gradient to train with" if gradient else "does not run"
        where = f"on {device} in {str(dtype).removeprefix('torch.')}"
        raise ValueError(f"attention={name!r} {fault} {where} ({error}): take auto or native") from error


def set_attention(transformer: nn.Module, name: str) -> None:
    """Let the attentions of a diffusers transformer run the kernel `name`, forward and backward, also where gradient
    checkpointing computes them again.

    name: "auto"    cuDNN's kernel before PyTorch's others, where `prefers_cudnn`; each call takes the first that can
                    run it. Elsewhere nothing is changed
          "native"  PyTorch's choice, whatever DIFFUSERS_ATTN_BACKEND says
          another   that kernel alone; see `check_attention`
    A later call takes the place of an earlier one. Call it after `flowbp_kernels.apply`, which refuses forwards that
    are not of their class, and before compilation; before the `undo` of that, call it with "native".
    """
    attentions: list[Any] = [module for module in transformer.modules() if hasattr(module, "processor")]
    _release(attentions)
    if name == "auto":
        if prefers_cudnn():
            settle_order()
            _surround(attentions, CUDNN_FIRST)
        return
    from diffusers.models.attention_dispatch import AttentionBackendName

    for module in attentions:
        if hasattr(module.processor, "_attention_backend"):
            module.processor._attention_backend = AttentionBackendName(name)
        elif name != "native":
            _surround([module], [OF_PYTORCH[name]])


def prefers_cudnn() -> bool:
    """Whether this GPU has compute capability 9.0 and a cuDNN above 9.15.0. Before, its kernel reads beyond sequences
    whose length is no multiple of 128, and PyTorch does not prefer it either (pytorch/pytorch issue 169849).
    """
    if not torch.cuda.is_available() or torch.version.hip or torch.cuda.get_device_capability() != (9, 0):
        return False
    return (torch.backends.cudnn.version() or 0) > 91500


def settle_order() -> None:
    """Let PyTorch decide on its own order, which it does in the first attention on a GPU. If that were one of ours, the
    end of `sdpa_kernel` would put the order from before the decision in its place, for other models too.
    """
    x = torch.zeros(1, 1, 8, 8, dtype=torch.float16, device="cuda")
    nn.functional.scaled_dot_product_attention(x, x, x)


def _surround(attentions: list[Any], kernels: list[SDPBackend]) -> None:
    for module in attentions:
        inner = vars(module).get("forward") or partial(type(module).forward, module)
        module.forward = partial(_attend, inner, kernels)  # which a deep copy of the module takes along


def _release(attentions: list[Any]) -> None:
    """Undo `_surround`."""
    for module in attentions:
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _attend:
            inner = module.forward = forward.args[0]
            if isinstance(inner, partial) and inner.func is type(module).forward:
                del module.forward


def _attend(inner, kernels, *arguments, **options):
    with sdpa_kernel(kernels, set_priority=True):
        return inner(*arguments, **options)
