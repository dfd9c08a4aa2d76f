"""Predictions for a whole split."""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from dlrm_xla.backends.base import Backend
from dlrm_xla.batch import Batch


@torch.no_grad()
def predict(forward: Callable, batches: Iterable[Batch], backend: Backend) -> tuple[np.ndarray, np.ndarray]:
    """predictions [n] and labels [n], float32, of the rows that count. forward(StepBatch) -> [B, 1]."""
    predictions, labels = [], []
    for batch in batches:
        prediction = forward(backend.to_device(batch))
        backend.end_step()
        predictions.append(prediction.cpu()[: batch.num_valid, 0].numpy())
        labels.append(batch.labels[: batch.num_valid, 0].numpy())
    if not predictions:
        return np.zeros(0, np.float32), np.zeros(0, np.float32)
    return np.concatenate(predictions), np.concatenate(labels)
