"""How an op is registered with torch: an op with a rule twice, an op of a network once.

A rule that travels by value and a rule that lies on the device have an operator each (Operators). Both compute the
same. A CUDA graph that captured the operator by value would replay the first plan's numbers for every later plan. So
that operator carries the tag which keeps torch.compile(mode="reduce-overhead") from capturing it. The operator on the
device reads its rule anew at each replay.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from flowbp_kernels import backend


class Operators(NamedTuple):
    by_value: library.CustomOpDef  # pyright: ignore[reportPrivateImportUsage]
    on_device: library.CustomOpDef  # pyright: ignore[reportPrivateImportUsage]

    def of(self, rule: Tensor) -> library.CustomOpDef:  # pyright: ignore[reportPrivateImportUsage]
        """The operator for a rule of which `rule` is a part."""
        return self.by_value if rule.is_cpu else self.on_device

    def differentiate(self, backward: Callable, setup_context: Callable | None = None) -> None:
        """Register the gradient of both."""
        for operator in self:
            operator.register_autograd(backward, setup_context=setup_context)


def register(
    function: Callable,
    name: str,
    *,
    mutates: tuple[str, ...] = (),
    fake: Callable | None = None,
) -> Operators:
    """flowbp_kernels::NAME and flowbp_kernels::NAME_on_device, which run `function`. The function's annotations are the
    schema of both.
    """
    operators = Operators(
        library.custom_op(
            f"flowbp_kernels::{name}", function, mutates_args=mutates, tags=(torch.Tag.cudagraph_unsafe,)
        ),
        library.custom_op(f"flowbp_kernels::{name}_on_device", function, mutates_args=mutates),
    )
    for operator in operators:
        if fake is not None:
            operator.register_fake(fake)
    return operators


class Recorded:
    """An op that records its gradient in one of two ways: as an operator of torch, which can be traced, compiled, faked
    and watched, or where nothing does that as a torch.autograd.Function, which costs a fraction of the operator's time.

    forward(*arguments) returns a tensor or a tuple in which None takes the place of an output that the arguments do not
    ask for. keep(ctx, inputs, output) saves what backward(ctx, *gradients) needs. An operator cannot return None,
    so that its function, `operator`, returns empty tensors in the place of such outputs.
    """

    def __init__(
        self, name: str, forward: Callable, operator: Callable, fake: Callable, keep: Callable, backward: Callable
    ):
        self.forward = forward
        self.operator = library.custom_op(f"flowbp_kernels::{name}", operator, mutates_args=())
        self.operator.register_fake(fake)
        self.operator.register_autograd(backward, setup_context=keep)

        def recorded(ctx, *arguments):
            outputs = forward(*arguments)
            keep(ctx, arguments, outputs)
            return outputs

        # A setup_context of its own would make torch inspect the signature at every call.
        methods = {"forward": staticmethod(recorded), "backward": staticmethod(backward)}
        self.function = type(name, (torch.autograd.Function,), methods)

    def __call__(self, *arguments) -> Any:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        if backend.needs_operator(*tensors, records=False):
            return self.operator(*arguments)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return self.function.apply(*arguments)
        return self.forward(*arguments)
