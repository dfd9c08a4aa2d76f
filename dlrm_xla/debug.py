"""--debug-mode: the architecture, every batch of an epoch, and the parameters before and after, printed as upstream prints them."""

from collections.abc import Callable

import numpy as np
import torch

from dlrm_xla.batch import Split, to_bags
from dlrm_xla.checkpoint import parameters
from dlrm_xla.config import Config
from dlrm_xla.train import Trainer


def print_architecture(line: Callable[[str], None], config: Config, table_rows: list[int], widths: list[int] | None) -> None:
    """widths: of each table with --md-flag."""
    model = config.model
    dim = model.embedding_dim if widths is None else widths
    num_features = len(table_rows) + 1
    if model.interaction == "cat":
        num_interactions = num_features * model.feature_dim
    else:
        num_interactions = num_features * (num_features + (1 if model.interaction_itself else -1)) // 2 + model.feature_dim
    top, bottom, rows = np.array((num_interactions, *model.top_layers)), np.array(model.bottom_layers), np.array(table_rows)
    line("model arch:")
    line(f"mlp top arch {len(top) - 1} layers, with input to output dimensions:")
    line(str(top))
    line("# of interactions")
    line(str(num_interactions))
    line(f"mlp bot arch {len(bottom) - 1} layers, with input to output dimensions:")
    line(str(bottom))
    line("# of features (sparse and dense)")
    line(str(num_features))
    line("dense feature size")
    line(str(bottom[0]))
    line("sparse feature size")
    line(str(dim))
    line(f"# of embeddings (= # of sparse features) {len(rows)}, with dimensions {dim}x:")
    line(str(rows))


def print_data(line: Callable[[str], None], train: Split, hotness: tuple[int, ...]) -> None:
    """Every training batch as upstream's (offsets, indices); with --upstream-compat this draws from the run's stream."""
    line("data (inputs and targets):")
    for index, batch in enumerate(train.batches()):
        torch.set_printoptions(precision=4)
        offsets, indices = to_bags(batch, hotness)
        lengths = [torch.diff(torch.cat([offset, torch.tensor([len(ids)])])).tolist() for offset, ids in zip(offsets, indices, strict=True)]
        line(f"mini-batch: {index}")
        line(str(batch.dense[: batch.num_valid]))
        line(str(torch.IntTensor(lengths)))
        line(str(indices))
        line(str(batch.labels[: batch.num_valid]))


def print_parameters(line: Callable[[str], None], when: str, trainer: Trainer) -> None:
    """when: "initial" | "updated"."""
    line(f"{when} parameters (weights and bias):")
    for _, value, _ in parameters(trainer):
        line(str(value.numpy()))
