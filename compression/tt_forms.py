"""Reading rows of a tensor train: the ways to do it, and which one costs least.

A *form* groups neighbouring cores, (2, 1) for the first two and the last. The cores of a group are multiplied out once, by one dense matrix product
for each core added, into a table with a row for every combination of their digits; a lookup then reads one row of each group and multiplies these
small matrices. (1, ..., 1) is the direct form, which multiplies out nothing; two groups are the prefix form: two gathers and one product a lookup,
whose rows are whole lines of 128 lanes where R q is a multiple of 128.

Digits: id = i_1 + p_1 (i_2 + p_2 (i_3 + ...)). The first runs fastest, so the row of a group is made of the group's own digits in the same way, and
each product writes its rows in their final place: nothing large is transposed.
"""

import math

import torch
from torch import Tensor

from compression.tt_shapes import TTShape
from dlrm_xla.ops.integers import quotient

Form = tuple[int, ...]

# Relative costs of one multiplication of a lookup's small product, one number read, one multiplication of a dense product and one number written;
# a unit is about 1 ns. Confirmed by `benchmarks/tt.py --parts crossover --rounds 3`, with --device xla and cpu: tables of 10.1M x 16 with 3 and 4
# cores and of 142,572 x 64, ranks 8 to 32, 512 to 32,768 lookups, forward alone and with gradients, CPU time. The form that is picked takes 1.00
# times the fastest one's time in the median, 1.03 in the geometric mean and 1.76 at most (XLA, rank 32, 2,048 lookups with gradients: 39 against
# 22 ms; eager 1.45). Of 100 other sets, each constant changed by factors of two, the best had 1.03 and 1.76 too. At rank 32 both forms of
# 3 cores meet at about 3,800 lookups. Gradients cost both sides alike, so they are no part of the rule.
PRODUCT, READ, CONTRACT, WRITE = 1.0, 1.0, 0.1, 1.0


def forms(cores: int) -> list[Form]:
    """Direct, and a cut at a bond that leaves no more cores on the right than on the left: rows there begin with a rank, so for as many
    digits they are R times as long. (1, 2) took 270 ms where (2, 1) took 16, (1, 3) 2230 where (2, 2) took 17."""
    return [(1,) * cores, *((k, cores - k) for k in range((cores + 1) // 2, cores) if cores > 2)]


def choose(shape: TTShape, lookups: int) -> Form:
    """The form of the least cost; shapes are static, so it is chosen when a program is traced."""
    return min(forms(shape.cores), key=lambda form: cost(shape, form, lookups))


def cost(shape: TTShape, form: Form, lookups: int) -> float:
    """For each lookup PRODUCT x multiplications + READ x numbers read; for each group of several cores CONTRACT x multiplications + WRITE x numbers
    written."""
    fixed, reads, products = 0.0, 0, 0
    first, left = 0, 1
    for count in form:
        last = first + count
        width = shape.ranks[first] * math.prod(shape.dims[first:last]) * shape.ranks[last]
        for k in range(first + 1, last):
            table = math.prod(shape.rows[first : k + 1]) * shape.ranks[first] * math.prod(shape.dims[first : k + 1]) * shape.ranks[k + 1]
            fixed += table * (CONTRACT * shape.ranks[k] + WRITE)
        reads += width
        products += left * width if first else 0
        left *= math.prod(shape.dims[first:last])
        first = last
    return fixed + lookups * (READ * reads + PRODUCT * products)


def lookup(cores: list[Tensor], shape: TTShape, ids: Tensor, form: Form) -> Tensor:
    """cores [p, R q R'] each, ids [B] int -> [B, D]."""
    rest, first, vectors = ids, 0, None
    for number, count in enumerate(form):
        last = first + count
        table = contract(cores[first:last], shape, first)
        row = rest
        if number < len(form) - 1:
            size = math.prod(shape.rows[first:last])
            rest = quotient(row, size)
            row = row - rest * size
        rows = table.index_select(0, row)
        vectors = rows if vectors is None else product(vectors, rows, shape.ranks[first])
        first = last
    return vectors


def contract(cores: list[Tensor], shape: TTShape, first: int) -> Tensor:
    """Neighbouring cores, of which `first` is the first -> [p ... p, R q ... q R'], their digits as in an id."""
    table = cores[0]
    for k, core in enumerate(cores[1:], start=first + 1):
        p, before, q, after = shape.core(k)
        if after == 1:  # products with q columns are slow: one for all digits, and a transpose of what is small, the right side of a cut
            rows, inner = table.shape[0], table.shape[1] // before
            table = (table.reshape(-1, before) @ core.view(p, before, q).transpose(0, 1).reshape(before, -1)).view(rows, inner, p, q)
            table = table.permute(2, 0, 1, 3).reshape(p * rows, -1)
            continue
        left = table.reshape(1, -1, before).expand(p, -1, -1)  # [p, rows x R q .., R before]
        num_rows = p * table.shape[0]
        table = torch.bmm(left, core.view(p, before, q * after)).view(num_rows, -1)
    return table


def product(left: Tensor, right: Tensor, rank: int) -> Tensor:
    """[B, m R] and [B, R n] -> [B, m n]: a small matrix product for each lookup. In the host's memory `bmm`; XLA does better with the sum written
    out, on a CPU and on a TPU.

    65,536 lookups, [4, 32] by [32, 4], CPU ms forward and with gradients: eager 38 and 130 by bmm, 162 and 444 by the sum; XLA 90 and 196 by bmm, 63
    and 108 by the sum, both with the prefix table. TPU v5e, as compiled (`benchmarks/tt.py --parts tpu`): by the sum 1.08 and 1.69 GB of traffic with
    0.1 and 2.7 MB of temporaries, by bmm 1.82 and 3.02 GB with 403 MB; the direct form 7.4 and 10.1 GB with 1.1 GB. At 2,048 lookups prefix and
    direct move 154 and 236 MB forward, 428 and 302 MB with gradients."""
    count = left.shape[0]
    if left.device.type == "xla":
        return (left.view(count, -1, rank, 1) * right.view(count, 1, rank, -1)).sum(2).view(count, -1)
    return torch.bmm(left.view(count, -1, rank), right.view(count, rank, -1)).view(count, -1)
