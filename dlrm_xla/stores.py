"""Rows of numbers that are read and updated in place: the unit of storage, of row updates and of byte counting.

A store is not an autograd parameter. Rows are gathered, made leaves, and their gradients are handed back: no [V, d] gradient ever exists.
"""

import torch
from torch import Tensor, nn

from dlrm_xla.ops.rows import AddRows


class RowStore(nn.Module):
    """V rows of d float32 numbers and their optimizer's state.

    weight  [V, d] buffer;  `state` names buffers [V] or [V, d] that the row rule asked for.
    add_rows(target, rows, values): how this device adds to rows in place.
    """

    def __init__(self, weight: Tensor, add_rows: AddRows):
        super().__init__()
        self.register_buffer("weight", weight)
        self.add_rows = add_rows
        self.state_names: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def add_state(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """A buffer of zeros called `name`, kept with the rows."""
        self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=self.weight.device))
        self.state_names += (name,)

    def read(self, rows: Tensor) -> Tensor:
        """rows [K] int64 -> [K, d]."""
        return self.weight.index_select(0, rows)

    @torch.no_grad()
    def update(self, rows: Tensor, grads: Tensor, rule, neg_lr: Tensor) -> None:
        """Apply `rule` to rows [K] int64 with gradients [K, d], in place; a row may stand there many times; a zero gradient changes nothing.

        neg_lr is minus the learning rate, a 0-D tensor.
        """
        rule.update_rows(self, rows, grads, neg_lr)
