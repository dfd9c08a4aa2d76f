"""Rows of int8 numbers with a scale for each, trained as they are: a float32 copy of a table exists while its starting values are drawn, never later.

A row is q x scale, q in -127..127. An update reads the row, adds the rule's step in float32 and rounds stochastically back to q (Li et al.,
"Adaptive Low-Precision Training for Embeddings in Click-Through Rate Prediction", AAAI 2023, arXiv:2212.05735), up with the probability that makes
the mean right: a step much smaller than the scale is not lost, it happens seldom. A row's scale grows where the row would leave the range and
never shrinks.

Four numbers of a row share an int32 word, so that rows lie in lines of 128 lanes as float32 rows do, and an update adds the difference of two words:
additions of integers are exact, and those of zero leave a row's other lookups alone.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from dlrm_xla.layouts import Layout
from dlrm_xla.ops.bags import distinct_row_grads, pack
from dlrm_xla.ops.noise import uniform_noise
from dlrm_xla.ops.rows import count_up, sum_duplicates, sum_sorted
from dlrm_xla.specs import UserError
from dlrm_xla.stores import FieldStore, Window, check_rows

LARGEST = 127
FILL_ROWS = 1 << 18  # rows rounded at a time
LEAST_SCALE = 1e-12


class QuantizedStore(FieldStore):
    """V rows of d int8 numbers; the interface of RowStore. The rule must keep no number for every weight (sgd, rwsadagrad).

    Fields: "data", words [V, ceil(d / 4)] int32; "scale" [V] float32; a vector [V] for each of rule.scalars. clock: updates so far, which the
    rounding's noise depends on, 0-D int32.
    """

    reads_bags = False  # no bag_sum: a row has to be made of its codes first

    def __init__(self, num_rows: int, width: int, rule, layout: Layout, device: str = "cpu"):
        super().__init__()
        if rule.record != ("weight",):
            raise UserError(f"int8: --optimizer={rule.name} keeps a float32 number for every int8 number of a table; use sgd or rwsadagrad")
        check_rows(num_rows, width, layout)
        self.num_rows, self.width, self.rule, self.layout = num_rows, width, rule, layout
        self.num_words, self.record_width = -(-width // 4), width + 1
        words, self.regions = layout.regions(num_rows, {"data": self.num_words})
        floats, float_regions = layout.regions(num_rows, {"scale": 0, **dict.fromkeys(rule.scalars, 0)})
        names = {name: "floats" if name == "data" else name for name in floats}  # where one buffer holds all fields it is called data
        self.regions |= {name: replace(region, buffer=names[region.buffer]) for name, region in float_regions.items()}
        self.register_buffer("data", torch.zeros(words["data"], dtype=torch.int32, device=device))
        for name, shape in floats.items():
            self.register_buffer(names[name], torch.zeros(shape, device=device))
        self.buffer_names = tuple(dict.fromkeys(("data", *names.values())))
        self.register_buffer("clock", torch.zeros((), dtype=torch.int32))
        if not layout.ragged and not layout.sorts:
            self.register_buffer("scratch", torch.zeros(num_rows, dtype=torch.int32, device=device))

    def read(self, rows: Tensor) -> Tensor:
        """rows [K] -> records [K, d + 1]: the weights, and behind them the scale."""
        scale = self._gather("scale", rows)[:, None]
        return torch.cat([self._codes(self._gather("data", rows)).to(torch.float32) * scale, scale], 1)

    def weights(self, records: Tensor) -> Tensor:
        return records[:, : self.width]

    @torch.no_grad()
    def update(self, rows: Tensor, records: Tensor, grads: Tensor, neg_lr: Tensor) -> None:
        """As RowStore.update. Duplicates are always added up first: rounding is not linear."""
        if self.layout.ragged:
            for distinct, totals in distinct_row_grads(pack(rows[:, None], None), grads, self.num_rows, None):
                self.rule.update_rows(self, distinct, self.read(distinct), totals, neg_lr)
        else:
            if self.layout.sorts:
                rows, records, grads = sum_sorted(rows, records, grads)
            else:
                grads = sum_duplicates(rows, grads, self.scratch, self.layout.add_rows)
            self.rule.update_rows(self, rows, records, grads, neg_lr)
        self.clock += 1

    def add(self, rows: Tensor, step: Tensor) -> None:
        """Add step [K, d] to rows [K]; a row that stands there several times has a step of zero at all places but one."""
        words, scale = self._gather("data", rows), self._gather("scale", rows)
        codes = self._codes(words)
        wanted = codes.to(torch.float32) * scale[:, None] + step
        moved = (step != 0).any(1)
        grown = torch.where(moved, torch.maximum(scale, wanted.abs().amax(1) / LARGEST), scale)
        noise = uniform_noise(rows, self.width, self.clock, count_up(self.width, torch.int32, rows.device))
        rounded = torch.floor(wanted / grown.clamp_min(LEAST_SCALE)[:, None] + noise).clamp(-LARGEST, LARGEST).to(torch.int32)
        new = self._words(torch.where(moved[:, None], rounded, codes))
        self._add("data", rows, new - words)
        self._add("scale", rows, grown - scale)

    @staticmethod
    def row_bytes(width: int, rule) -> int:
        """Of one row with its optimizer's state."""
        return 4 * (-(-width // 4) + 1 + len(rule.scalars))

    def _codes(self, words: Tensor) -> Tensor:
        """[K, W] int32 -> [K, d] int32 in -128..127."""
        shifts = 24 - 8 * count_up(4, torch.int32, words.device)
        signed = torch.bitwise_right_shift(torch.bitwise_left_shift(words[:, :, None], shifts), 24)
        return signed.reshape(words.shape[0], -1)[:, : self.width]

    def _words(self, codes: Tensor) -> Tensor:
        """The way back."""
        if codes.shape[1] < 4 * self.num_words:
            codes = nn.functional.pad(codes, (0, 4 * self.num_words - codes.shape[1]))
        parts = torch.bitwise_and(codes, 255).view(codes.shape[0], -1, 4)
        return torch.bitwise_left_shift(parts, 8 * count_up(4, torch.int32, codes.device)).sum(2, dtype=torch.int32)

    def state_buffers(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.named_buffers() if name in self.rule.scalars or name == "scratch")

    def numbers(self, buffer: str) -> tuple[int, int]:
        """Numbers of four bytes that are weights (words and scales), and others."""
        if buffer in ("scratch", "clock"):
            return 0, self.num_rows if buffer == "scratch" else 1
        fields = [name for name, region in self.regions.items() if region.buffer == buffer]
        weights = self.num_rows * sum({"data": self.num_words, "scale": 1}.get(name, 0) for name in fields)
        return weights, self.num_rows * sum(name in self.rule.scalars for name in fields)

    def fields(self, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Views of on_host() by name: "weight" [V, 4 ceil(d / 4)] int8, "scale" [V], each scalar [V]."""
        whole = {name: self.layout.as_rows(buffers[region.buffer], region, self.num_rows) for name, region in self.regions.items()}
        words = whole.pop("data")
        return {"weight": words.view(torch.int8)} | whole

    def saved(self, fields: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
        return {"": fields["weight"][rows], "_scale": fields["scale"][rows]}

    def weight(self) -> Tensor:
        """[V, d] float32, a copy."""
        fields = self.fields(self.on_host())
        return fields["weight"][:, : self.width].float() * fields["scale"][:, None]

    @torch.no_grad()
    def fill(self, start: int, num_rows: int, fill: Callable[[Tensor], None], first: int, total: int) -> None:
        """The values that `fill` writes, rounded to the nearest of 255 in the range of each row. As RowStore.fill."""
        values = torch.empty(num_rows, self.width)
        fill(values if num_rows == total else Window(values, first, total))
        fields = self.fields(self.on_host())
        for first in range(0, num_rows, FILL_ROWS):
            piece = values[first : first + FILL_ROWS]
            here = slice(start + first, start + first + piece.shape[0])
            scale = (piece.abs().amax(1) / LARGEST).clamp_min(LEAST_SCALE)
            fields["scale"][here] = scale
            fields["weight"][here, : self.width] = torch.round(piece / scale[:, None]).to(torch.int8)
