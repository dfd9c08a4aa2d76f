"""Predictions for a whole split."""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from dlrm_xla.backends.base import Backend
from dlrm_xla.batch import Batch


@torch.no_grad()
def predict(forward: Callable, batches: Iterable[Batch], backend: Backend) -> tuple[np.ndarray, np.ndarray]:
    """predictions [n] and labels [n], float32, of the rows that count. forward(StepBatch) -> [B, 1].

    Of several ranks each gives its part of every batch and gets what all have predicted, so that all come to the same figures.
    """
    predictions, labels = [], []
    for batch in batches:
        if backend.collectives.world == 1:
            prediction = forward(backend.to_device(batch))
            backend.end_step()
            predictions.append(prediction.cpu()[: batch.num_valid, 0].numpy())
            labels.append(batch.labels[: batch.num_valid, 0].numpy())
            continue
        there = backend.to_device(batch)
        gathered = backend.collectives.all_gather(torch.cat([forward(there), there.labels, there.valid], 1))
        backend.end_step()
        rows = gathered.cpu().numpy()
        rows = rows[rows[:, 2] != 0]
        predictions.append(rows[:, 0])
        labels.append(rows[:, 1])
    if not predictions:
        return np.zeros(0, np.float32), np.zeros(0, np.float32)
    return np.concatenate(predictions), np.concatenate(labels)
