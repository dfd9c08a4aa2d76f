"""What conversions of trained tables share: how much each id counts, least squares over a row's ids, and how far the result is from the table."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from compression.method import Converted, Knob, Making
from compression.optimal import importance
from dlrm_xla.specs import TableSpec, UserError
from dlrm_xla.tables import EmbeddingTable

CHUNK = 1 << 17  # ids at a time, so that float64 needs no second copy of a large table

WEIGHTED = Knob("weighted", bool, False, "in a conversion an id counts as often as training looks it up")


def id_weights(method: str, spec: TableSpec, knobs: dict, making: Making) -> np.ndarray | None:
    """[N] positive float64: how much each id counts in a conversion; None: all the same."""
    if not knobs["weighted"]:
        return None
    if making.counts is None:
        raise UserError(
            f"{method}:weighted=true: table {spec.name}: how often its ids are looked up is not known; give the training data too, or weighted=false"
        )
    return importance(making.counts)


def chunks(num_ids: int):
    return (slice(start, min(start + CHUNK, num_ids)) for start in range(0, num_ids, CHUNK))


def fit_rows(
    rows: Tensor, num_rows: int, wanted: Callable[[slice], Tensor], weights: np.ndarray | None, factor: Callable[[slice], Tensor] | None = None
) -> Tensor:
    """[num_rows, d] float32: for each row r the least-squares a of wanted_i ~ a x factor_i over the ids i of that row, number by number.

    rows [N] int64 of each id;  wanted, factor: ids -> [n, d] or [n, 1] float64, factor None for 1: then a is the weighted mean
    """
    products = squares = None
    for ids in chunks(len(rows)):
        values = wanted(ids)
        if products is None:
            products = torch.zeros(num_rows, values.shape[1], dtype=torch.float64)
            squares = torch.zeros_like(products)
        scale = torch.ones(1, 1, dtype=torch.float64) if factor is None else factor(ids)
        counts = scale if weights is None else scale * torch.from_numpy(weights[ids, None])
        products.index_add_(0, rows[ids], values * counts)
        squares.index_add_(0, rows[ids], (counts * scale).expand_as(values).contiguous())
    return torch.where(squares > 0, products / squares.clamp(min=1e-300), 0.0).float()


def converted(table: EmbeddingTable, values: dict[str, Tensor], weight: np.ndarray, making: Making) -> Converted:
    """The table with those rows instead of starting values, and its distance from `weight` [N, D]: Frobenius norms, |approximation - W| / |W|."""
    table.parts = {name: replace(part, fill=partial(_write, values=values[name])) for name, part in table.parts.items()}
    sums, weights = np.zeros((2, 2)), importance(making.counts)  # plain and weighted; of the difference and of the table
    for ids in chunks(len(weight)):
        numbers, exact = torch.arange(ids.start, ids.stop), torch.from_numpy(weight[ids]).double()
        rows = tuple(values[name][row].reshape(len(numbers), -1) for name, row in zip(values, table.row_ids(numbers), strict=True))
        with torch.no_grad():
            difference = table.combine(rows, numbers).double() - exact
        squares = torch.stack([difference.square().sum(1), exact.square().sum(1)]).numpy()
        sums[0] += squares.sum(1)
        if weights is not None:
            sums[1] += squares @ weights[ids]
    facts = {"relative_error": math.sqrt(sums[0, 0] / max(sums[0, 1], 1e-300))}
    if weights is not None:
        facts["relative_error_weighted"] = math.sqrt(sums[1, 0] / max(sums[1, 1], 1e-300))
    return Converted(table, facts)


def _write(rows: Tensor, values: Tensor) -> None:
    rows.copy_(values)


def float64_of(weight: np.ndarray) -> Callable[[slice], Tensor]:
    return lambda ids: torch.from_numpy(weight[ids]).double()
