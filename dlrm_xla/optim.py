"""The optimizers, for rows and for dense parameters, and the learning rate's course.

Each rule equals torch's on sparse and dense gradients (`torch.optim.SGD`, `torch.optim.Adagrad`) or upstream's RWSAdagrad: duplicates of a
row are added up before a rule that is not linear sees them. The learning rate enters as a 0-D tensor, so that a schedule compiles nothing.
"""

import torch
from torch import Tensor, nn

from dlrm_xla.config import TrainConfig
from dlrm_xla.ops.inplace import InPlace
from dlrm_xla.stores import RowStore

EPSILON = 1e-10  # of both Adagrads, as torch and upstream have it


class SGD:
    """
    record           what a row of a store holds for every weight, the weight first;  scalars: one number for every row
    sums_duplicates  the rule is not linear: update_rows wants all gradients of a row at one of its places and zeros at the others
    dense_state      for every dense parameter
    """

    name = "sgd"
    record: tuple[str, ...] = ("weight",)
    scalars: tuple[str, ...] = ()
    sums_duplicates = False
    dense_state: tuple[str, ...] = ()

    def update_rows(self, store: RowStore, rows: Tensor, records: Tensor, grads: Tensor, neg_lr: Tensor) -> None:
        store.add(rows, grads * neg_lr)

    def update_dense(self, parameter: Tensor, grad: Tensor, state: dict[str, Tensor], neg_lr: Tensor, ops: InPlace) -> None:
        ops.add_product(parameter, grad, neg_lr)


class Adagrad:
    """Element-wise: a sum of squared gradients for every weight (Duchi et al. 2011)."""

    name = "adagrad"
    record = ("weight", "sum")
    scalars = ()
    sums_duplicates = True
    dense_state = ("sum",)

    def update_rows(self, store: RowStore, rows: Tensor, records: Tensor, grads: Tensor, neg_lr: Tensor) -> None:
        squares = grads * grads
        deviation = (store.state(records, "sum") + squares).sqrt_().add_(EPSILON)
        store.add(rows, grads * neg_lr / deviation, squares)

    def update_dense(self, parameter: Tensor, grad: Tensor, state: dict[str, Tensor], neg_lr: Tensor, ops: InPlace) -> None:
        ops.add_product(state["sum"], grad, grad)
        ops.add_quotient(parameter, grad * neg_lr, state["sum"].sqrt().add_(EPSILON))


class RowWiseAdagrad(Adagrad):
    """One sum a row: of the mean of its squared gradients. Dense parameters keep one for every weight."""

    name = "rwsadagrad"
    record = ("weight",)
    scalars = ("momentum",)

    def update_rows(self, store: RowStore, rows: Tensor, records: Tensor, grads: Tensor, neg_lr: Tensor) -> None:
        deviation = store.add_scalar("momentum", rows, (grads * grads).mean(1)).sqrt_().add_(EPSILON)
        store.add(rows, grads * neg_lr / deviation[:, None])


RULES = {rule.name: rule for rule in (SGD, Adagrad, RowWiseAdagrad)}


class DenseOptimizer:
    """A rule applied to ordinary parameters; `state[i]` belongs to `parameters[i]`."""

    def __init__(self, parameters: list[nn.Parameter], rule, ops: InPlace):
        self.parameters, self.rule, self.ops = parameters, rule, ops
        self.state = [{name: torch.zeros_like(parameter) for name in rule.dense_state} for parameter in parameters]

    def gradients(self) -> list[Tensor]:
        """Of the parameters that have one."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def set_gradients(self, grads: list[Tensor]) -> None:
        """Put other values in the place of `gradients()`."""
        for parameter, grad in zip([parameter for parameter in self.parameters if parameter.grad is not None], grads, strict=True):
            parameter.grad = grad

    @torch.no_grad()
    def step(self, neg_lr: Tensor, scale: float = 1.0) -> None:
        """One update from the gradients times `scale`; clears them. A parameter without a gradient stays as it is."""
        for parameter, state in zip(self.parameters, self.state, strict=True):
            if parameter.grad is not None:
                grad = parameter.grad if scale == 1.0 else parameter.grad * scale
                self.rule.update_dense(parameter, grad, state, neg_lr, self.ops)
        self.zero_grad()

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def learning_rate(config: TrainConfig, step: int, upstream_compat: bool) -> float:
    """The rate of update number `step` (1 is the first): linear warm-up, then constant, then a quadratic decay that ends at its last value.

    Upstream freezes the rate between warm-up and decay at warm-up's last value, base (W - 1) / W, when there is a decay.
    """
    base, warmup, start, decay = config.learning_rate, config.warmup_steps, config.decay_start_step, config.decay_steps
    if step < warmup:
        return base * (1.0 - (warmup - step) / warmup)
    if decay == 0:
        return base
    if step < start:
        return base * (1.0 - 1.0 / warmup) if upstream_compat and warmup > 1 else base
    passed = min(step - start, decay - 1)
    return max(1e-7, base * ((decay - passed) / decay) ** 2)
