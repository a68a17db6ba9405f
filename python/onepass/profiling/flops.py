"""What torch's ``FlopCounterMode`` counts of the ops, of any sizes and devices, "meta" too: as it counts the layers that they replace."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from onepass._calls import call_of
from onepass._library import NAMESPACES
from onepass.profiling.floors import SLOTS

# Multiply-adds of matrix products for one (b, h, t, s), seen or not: so many per channel of A and of D. The tanh of an additive element
# counts nothing, as in torch; one product with v, and two in its gradient.
PRODUCTS = {
    **SLOTS,
    "additive_forward": (1, 1),
    "additive_scores": (1, 0),
    "additive_step": (1, 1),
    "additive_step_scores": (1, 0),
    "additive_backward": (2, 2),
    "additive_scores_backward": (2, 0),
    "additive_step_backward": (1, 1),
}


def _formula(op: str) -> Callable[..., int]:
    """Two for a multiply-add. Weights that a backward computes again count again, as in torch's own fused attention."""
    names = [argument.name for argument in getattr(torch.ops.onepass, op).default._schema.arguments]

    def formula(*arguments: Any, out_val: object = None) -> int:
        given, call = dict(zip(names, arguments, strict=True)), call_of(op, arguments)
        of_A, of_D = PRODUCTS[op]
        if op == "additive_scores_backward" and not given["of_query"]:
            of_A -= 1  # a step's backward had it
        if op == "multiplicative_backward" and given["weights"].dim() == 1:
            of_A += 1
        if "grad_context" in given and given["grad_context"] is None:
            of_D = 0
        return 2 * call.B * call.H * call.T * call.S * (of_A * call.A + of_D * call.D)

    return formula


for op in PRODUCTS:
    register_flop_formula([getattr(getattr(torch.ops, namespace), op) for namespace in NAMESPACES], get_raw=True)(_formula(op))
