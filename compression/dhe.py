"""Deep hash embedding: an id becomes k numbers by k hashes, and a network makes its vector of them. There is no table. "dhe".

    e(i) = MLP(x),    x_j = h_j(i) / 2^31,  uniform in [-1, 1)

Kang et al., "Learning to Embed Categorical Features without Embedding Tables for Recommendation", KDD 2021, arXiv:2010.10784, section 3.
Differs from the paper: no batch normalization. It would make an id's vector depend on which other ids are in the batch, padding included.
Instead the starting weights have its first step folded in: each unit's mean over ids is subtracted and its spread divided by, as measured on
drawn hashes. The hashes are 32 bits mixed, not polynomials modulo a prime; k and the layers are smaller than the paper's 1024 and 5 x 1800.
Starting values: each number of a vector has mean 0 and standard deviation 1/sqrt(3N) over the ids, as in a plain table, by the same calibration.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from compression.hashes import Hashes
from compression.method import Knob, Making, Method
from dlrm_xla.specs import TableSpec
from dlrm_xla.tables import EmbeddingTable

SAMPLE = 4096  # drawn hashes that starting weights are calibrated on


class DHETable(EmbeddingTable):
    """No rows: `hashes` numbers of an id through `depth` hidden layers of `width` units."""

    def __init__(self, spec: TableSpec, hashes: int, width: int, depth: int, activation: str, rng: np.random.RandomState):
        super().__init__(spec, {})
        self.hashes, self.activation = Hashes(hashes, rng), activation
        sizes = [hashes, *[width] * depth, spec.embedding_dim]
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, n, m) for n, m in zip(sizes[:-1], sizes[1:], strict=True))
        self._start(rng)

    def row_ids(self, ids: Tensor) -> tuple[()]:
        return ()

    def combine(self, rows: tuple[()], ids: Tensor) -> Tensor:
        x = self.hashes.mix_all(ids).to(self.layers[0].weight.dtype) * 2.0**-31
        for layer in self.layers[:-1]:
            x = self._activate(layer(x))
        return self.layers[-1](x)

    def _activate(self, x: Tensor) -> Tensor:
        # Mish is x tanh(softplus(x)); the two operators have a lowering on XLA each
        return torch.relu(x) if self.activation == "relu" else x * torch.tanh(nn.functional.softplus(x))

    @torch.no_grad()
    def _start(self, rng: np.random.RandomState) -> None:
        """Normal weights, then every unit shifted and scaled to mean 0 and deviation 1 over drawn hashes, in the last layer 1/sqrt(3N)."""
        x = torch.from_numpy(rng.uniform(-1, 1, (SAMPLE, self.layers[0].in_features)))
        for layer in self.layers:
            weight = torch.from_numpy(rng.normal(0, 1, tuple(layer.weight.shape)))
            out = x @ weight.T
            target = 1 / math.sqrt(3 * self.spec.num_embeddings) if layer is self.layers[-1] else 1.0
            scale = target / out.std(0).clamp(min=1e-6)
            layer.weight.copy_(weight * scale[:, None])
            layer.bias.copy_(-out.mean(0) * scale)
            x = self._activate((out - out.mean(0)) * scale)


def _bytes(spec: TableSpec, hashes: int, width: int, depth: int) -> int:
    dim = spec.embedding_dim
    return 4 * ((hashes + 1) * width + (depth - 1) * (width + 1) * width + (width + 1) * dim) + 8 * hashes


def _widest(spec: TableSpec, knobs: dict, most_bytes: float) -> int:
    """The largest width within so many bytes, at least 1."""
    hashes, depth = knobs["hashes"], knobs["depth"]
    width = 1
    while _bytes(spec, hashes, 2 * width, depth) <= most_bytes:
        width *= 2
    step = width
    while step := step // 2:
        if _bytes(spec, hashes, width + step, depth) <= most_bytes:
            width += step
    return width


def _width(spec: TableSpec, knobs: dict) -> int:
    return knobs["width"] or _widest(spec, knobs, 0.4 * spec.num_embeddings * spec.embedding_dim)


def _num_bytes(spec: TableSpec, knobs: dict) -> int:
    return _bytes(spec, knobs["hashes"], _width(spec, knobs), knobs["depth"])


def _create(spec: TableSpec, knobs: dict, making: Making) -> DHETable:
    return DHETable(spec, knobs["hashes"], _width(spec, knobs), knobs["depth"], knobs["activation"], making.rng)


METHOD = Method(
    name="dhe",
    title="deep hash embedding: a network of an id's hashes, no table",
    paper="Kang et al., Learning to Embed Categorical Features without Embedding Tables for Recommendation, KDD 2021, arXiv:2010.10784",
    knobs=(
        Knob("hashes", int, 128, "k, numbers that an id becomes", least=1, most=4096),
        Knob("width", int, None, "units of a hidden layer; without it as many as a tenth of the table's bytes allow", least=1, most=8192),
        Knob("depth", int, 2, "hidden layers", least=1, most=8),
        Knob("activation", str, "mish", "of the hidden layers", choices=("mish", "relu")),
    ),
    bytes_formula="4 ((k+1) w + (depth-1) (w+1) w + (w+1) D) + 8 k",
    num_bytes=_num_bytes,
    create=_create,
    sized_by="width",
    sized_most=lambda spec, knobs: min(8192, _widest(spec, knobs, 4.0 * spec.num_embeddings * spec.embedding_dim)),
)
