"""How an op is registered with torch: once for a rule that travels by value, once for a rule that lies on the device.

Both compute the same. A CUDA graph that captured the operator by value would replay the first plan's numbers for every
later plan. So that operator carries the tag which keeps torch.compile(mode="reduce-overhead") from capturing it. The
operator on the device reads its rule anew at each replay.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, library


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
