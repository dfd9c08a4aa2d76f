"""Adding a product or a quotient to a tensor in place, in the form that a backend runs best.

Eager PyTorch has one kernel for each, which rounds once as upstream's optimizers do. Through torch_xla the same call takes 0.1 ms of Python's time
where the two plain operators take 0.025: 14 parameters of the Kaggle model, 1.5 ms or 0.35 of a step of 9.7.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class InPlace(NamedTuple):
    """add_product(target, a, b): target += a * b;  add_quotient(target, a, b): target += a / b."""

    add_product: Callable[[Tensor, Tensor, Tensor], object]
    add_quotient: Callable[[Tensor, Tensor, Tensor], object]


ONE_KERNEL = InPlace(Tensor.addcmul_, Tensor.addcdiv_)
PLAIN_OPERATORS = InPlace(lambda target, a, b: target.add_(a * b), lambda target, a, b: target.add_(a / b))
