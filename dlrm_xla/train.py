"""The training step, and the loss that it leaves on the device."""

import math

import torch
from torch import Tensor

from dlrm_xla.backends.base import Backend, StepBatch
from dlrm_xla.batch import Batch
from dlrm_xla.config import Config
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.losses import make_loss
from dlrm_xla.models.dlrm import DLRM
from dlrm_xla.optim import DenseOptimizer, learning_rate
from dlrm_xla.specs import UserError


class LossMeter:
    """Mean loss since the last reset and the first batch whose loss was not finite, kept on the device: reading them is the only wait.

    totals  [4] float64: sum of loss x rows, rows, first bad batch (inf: none), batches done in the epoch. A mean over a thousand batches
            would lose its sixth digit in float32. It is always sent from the host whole: a constant made on the device would be another
            program.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._send(0.0, 0.0, math.inf, 0.0)

    def _send(self, *values: float) -> None:
        self.totals = torch.tensor(values, dtype=torch.float64).to(self.device)

    def reset(self, loss_sum: float = 0.0, rows: float = 0.0) -> None:
        _, _, first_bad, batch = self.totals.tolist()
        self._send(loss_sum, rows, first_bad, batch)

    def start_epoch(self, batch: int) -> None:
        """The next loss is that of batch number `batch`, counted from 0."""
        loss_sum, rows, first_bad, _ = self.totals.tolist()
        self._send(loss_sum, rows, first_bad, float(batch))

    def add(self, loss: Tensor, num_rows: Tensor) -> None:
        """loss, num_rows: 0-D, on the device; of several ranks those of all together."""
        loss_sum, rows, first_bad, batch = self.totals.unbind()
        batch = batch + 1
        first_bad = torch.where(torch.isfinite(loss), first_bad, torch.minimum(first_bad, batch))
        self.totals = torch.stack([loss_sum + loss.double() * num_rows, rows + num_rows, first_bad, batch])

    def check(self) -> None:
        """Waits for the device. NotFiniteLoss where a loss was NaN or infinite, with the batch's number (1 is the first of the epoch)."""
        first_bad = self.totals.tolist()[2]
        if math.isfinite(first_bad):
            raise NotFiniteLoss(int(first_bad))

    def mean(self) -> float:
        """Waits for the device and checks."""
        self.check()
        loss_sum, rows = self.state()
        return loss_sum / rows

    def state(self) -> tuple[float, float]:
        """Sum of loss x rows, and rows, since the last reset."""
        return tuple(self.totals.tolist()[:2])


class NotFiniteLoss(UserError):
    """Training has gone wrong at `batch` (1 is the first of the epoch). what: the numbers that show it."""

    def __init__(self, batch: int, what: str = "the loss of batch {batch}"):
        super().__init__(f"{what.format(batch=batch)} is not a finite number")
        self.batch = batch


class Trainer:
    """A model, its tables and their optimizers. `updates` counts the steps of the learning rate's course.

    frozen_pooling: upstream's --debug-mode leaves the learned pooling weights out of its optimizer.
    """

    def __init__(self, config: Config, model: DLRM, tables: EmbeddingCollection, backend: Backend, frozen_pooling: bool = False):
        self.config, self.model, self.tables, self.backend = config, model, tables, backend
        self.loss = make_loss(config.loss)
        self.rule = tables.rule
        trained = [p for name, p in tables.named_parameters() if not (frozen_pooling and name.startswith("v_W_l"))]
        self.dense = DenseOptimizer(trained + list(model.parameters()), self.rule, backend.inplace)
        self.meter = LossMeter(backend.device)
        self.updates = 0
        self.first_rate: float | None = None  # upstream's first update after resuming: the checkpoint's rate, then the course from step 2
        self._rate: float | None = None
        self._neg_lr: Tensor | None = None
        self._observed = any(table.observes for table in tables.tables)
        self._pending: list = []  # lookups of batches that wait for their common step
        backend.end_step()  # the optimizers' zeros become data; as constants they would make the first step another program

    def forward(self, batch: StepBatch) -> Tensor:
        """Click probabilities [B, 1]."""
        return self.model(batch.dense, self.tables.lookup(batch.ids, batch.weights).pooled)

    def step(self, batch: StepBatch, index: int, last_of_epoch: bool) -> None:
        """Forward, backward, and the update after each --mlperf-grad-accum-iter batches of an epoch, and after its last.

        index: the batch's number in its epoch. Upstream drops the gradients of all but the last batch of a group, and a group that the
        epoch's end cuts short.
        """
        group, compat = self.config.train.accumulate, self.config.upstream_compat
        if compat and (index + 1) % group == 0:
            self.drop_pending()
        loss = self._backward(batch, index)
        if (index + 1) % group == 0 or (last_of_epoch and not compat):
            loss = self.update(loss)
        else:
            (loss,) = self.backend.collectives.sum_all([loss])
        self.meter.add(loss, batch.num_counted)
        self.backend.end_step()

    def _backward(self, batch: StepBatch, index: int) -> Tensor:
        """Forward and backward; the loss, 0-D, of several ranks this one's share. A function of its own: XLA writes out every tensor that is still
        held when a step ends (24 MB a step of the Kaggle model at batch 2048).
        """
        lookup = self.tables.lookup(batch.ids, batch.weights)
        prediction = self.model(batch.dense, lookup.pooled)
        try:
            loss = self.loss(prediction, batch.labels, batch.valid, batch.num_counted)
        except RuntimeError:  # torch's cross entropy refuses a prediction of NaN on the CPU
            if prediction.isfinite().all():
                raise
            raise NotFiniteLoss(index + 1) from None
        loss.backward()
        self._pending.append(lookup)
        return loss.detach()

    def update(self, loss: Tensor) -> Tensor:
        """One step of every optimizer with the mean of the pending batches' gradients. loss: of the last batch; its sum over all ranks is returned,
        which travels with the gradients."""
        neg_lr = self.negative_rate(self.next_rate())
        self.updates += 1
        self.first_rate = None
        scale = 1.0 / len(self._pending)
        shared = self.tables.shared_gradients(self._pending, scale)
        loss, *sums = self.backend.collectives.sum_all([loss, *shared, *self.dense.gradients()])
        self.dense.set_gradients(sums[len(shared) :])
        self.tables.update(self._pending, neg_lr, scale, sums[: len(shared)])
        self.dense.step(neg_lr, scale)
        self._pending = []
        return loss

    def observe(self, batch: Batch) -> None:
        """A batch in the host's memory, before it is trained on, for the tables that count ids."""
        if self._observed:
            rows = slice(batch.num_valid)
            self.tables.observe(batch.ids[rows].numpy(), None if batch.weights is None else batch.weights[rows].numpy())

    def reorganize(self, epoch: int) -> None:
        """Between epochs: tables that cluster or cache anew do so."""
        self.backend.end_step()
        if self.tables.reorganize(epoch):
            self.backend.end_step()

    def next_rate(self) -> float:
        """The learning rate of the next update."""
        if self.first_rate is not None:
            return self.first_rate
        return learning_rate(self.config.train, self.updates + 1, self.config.upstream_compat)

    def drop_pending(self) -> None:
        """Forget the gradients of the batches that wait for a common step."""
        self._pending = []
        self.dense.zero_grad()

    def negative_rate(self, rate: float) -> Tensor:
        """Minus the rate as a 0-D tensor on the device, sent only when it changes."""
        if rate != self._rate:
            self._rate, self._neg_lr = rate, torch.tensor(-rate).to(self.backend.device)
        return self._neg_lr
