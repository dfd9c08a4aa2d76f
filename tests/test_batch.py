"""Bags to slots and back, padding and packing lose nothing, whatever the bags hold."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_xla.backends.base import StepBatch
from dlrm_xla.batch import Batch, from_bags, pad_rows, slot_starts, to_bags
from dlrm_xla.specs import TableSpec, UserError

IDS = st.integers(0, 2**31 - 1)


@st.composite
def bags(draw) -> tuple[list[list[list[int]]], list[int], int]:
    """(bags[table][row] = ids, hotness [T], dense columns): 1 to 6 rows, 1 to 4 tables, bags empty to full."""
    num_rows, num_dense = draw(st.integers(1, 6)), draw(st.integers(0, 3))
    hotness = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    tables = [draw(st.lists(st.lists(IDS, max_size=most), min_size=num_rows, max_size=num_rows)) for most in hotness]
    return tables, hotness, num_dense


def as_batch(tables, hotness, num_dense) -> Batch:
    num_rows = len(tables[0])
    dense = torch.arange(num_rows * num_dense, dtype=torch.float32).view(num_rows, num_dense) + 1
    labels = torch.arange(num_rows, dtype=torch.float32).view(num_rows, 1) + 0.5
    lengths = [np.array([len(bag) for bag in table]) for table in tables]
    indices = [np.array([index for bag in table for index in bag], dtype=np.int64) for table in tables]
    return from_bags(dense, lengths, indices, labels, hotness)


def as_lists(offsets, indices) -> list[list[list[int]]]:
    """Upstream's pairs of (offsets, indices) read the way nn.EmbeddingBag does: a bag ends where the next one begins."""
    tables = []
    for starts, values in zip(offsets, indices, strict=True):
        ends = [*starts.tolist()[1:], len(values)]
        tables.append([values.tolist()[start:end] for start, end in zip(starts.tolist(), ends, strict=True)])
    return tables


@given(bags())
@settings(deadline=None)
def test_bags_come_back_as_they_went_in(given_bags):
    tables, hotness, num_dense = given_bags
    batch = as_batch(*given_bags)
    offsets, indices = to_bags(batch, hotness)
    assert as_lists(offsets, indices) == tables
    assert all(part.dtype == torch.int64 for part in offsets + indices)


@given(bags())
@settings(deadline=None)
def test_a_slot_is_an_id_with_weight_one_or_nothing_with_weight_zero(given_bags):
    tables, hotness, num_dense = given_bags
    batch = as_batch(*given_bags)
    num_rows = len(tables[0])
    assert batch.ids.dtype == torch.int32 and batch.weights.dtype == torch.float32
    assert tuple(batch.ids.shape) == tuple(batch.weights.shape) == (num_rows, sum(hotness)) and batch.num_valid == batch.size == num_rows
    for row in range(num_rows):
        expected_ids, expected_weights = [], []
        for table, most in zip(tables, hotness, strict=True):
            bag = table[row]
            expected_ids += bag + [0] * (most - len(bag))
            expected_weights += [1.0] * len(bag) + [0.0] * (most - len(bag))
        assert batch.ids[row].tolist() == expected_ids and batch.weights[row].tolist() == expected_weights


@given(bags(), st.integers(0, 4))
@settings(deadline=None)
def test_padded_rows_are_zero_and_do_not_count(given_bags, more):
    tables, hotness, num_dense = given_bags
    batch = as_batch(*given_bags)
    padded = pad_rows(batch, batch.size + more)
    assert padded.size == batch.size + more and padded.num_valid == batch.num_valid
    assert padded.valid_mask().flatten().tolist() == [1.0] * batch.num_valid + [0.0] * more
    for name in ("dense", "ids", "weights", "labels"):
        before, after = getattr(batch, name), getattr(padded, name)
        assert torch.equal(after[: batch.size], before) and not after[batch.size :].any() and after.dtype == before.dtype
    assert as_lists(*to_bags(padded, hotness)) == tables
    assert pad_rows(batch, batch.size) is batch


@given(bags(), st.integers(0, 4), st.booleans())
@settings(deadline=None)
def test_two_packed_tensors_hold_the_whole_batch(given_bags, more, weighted):
    tables, hotness, num_dense = given_bags
    batch = as_batch(*given_bags)
    if not weighted:
        batch = Batch(batch.dense, batch.ids, None, batch.labels, batch.num_valid)
    batch = pad_rows(batch, batch.size + more)
    floats, ids = batch.pack()
    assert ids.dtype == torch.int32 and floats.dtype == torch.float32
    assert floats.shape[1] == num_dense + 2 + (sum(hotness) if weighted else 0)
    there = StepBatch.from_packed(floats, ids, weighted)
    assert torch.equal(there.dense, batch.dense) and torch.equal(there.ids, batch.ids) and torch.equal(there.labels, batch.labels)
    assert torch.equal(there.valid, batch.valid_mask()) and there.num_counted.item() == batch.num_valid
    assert (there.weights is None and batch.weights is None) or torch.equal(there.weights, batch.weights)


def test_without_weights_every_slot_of_a_valid_row_is_an_id():
    batch = pad_rows(Batch(torch.zeros(2, 1), torch.tensor([[7, 0, 3], [0, 0, 0]], dtype=torch.int32), None, torch.zeros(2, 1), 2), 3)
    assert as_lists(*to_bags(batch, [1, 2])) == [[[7], [0]], [[0, 3], [0, 0]]]


def test_a_bag_that_is_too_long_is_refused():
    with pytest.raises(UserError, match="table 1: a bag holds 3 ids but only 2 slots; raise --num-indices-per-lookup to 3"):
        as_batch([[[1]], [[1, 2, 3]]], [1, 2], 1)


@pytest.mark.parametrize("hotness", [[1], [3, 1, 2], [5] * 26])
def test_slots_of_the_tables_follow_each_other(hotness):
    starts = slot_starts(hotness)
    assert starts.tolist() == [sum(hotness[:table]) for table in range(len(hotness) + 1)]


def test_a_table_needs_rows_columns_and_slots():
    for field in ("num_embeddings", "embedding_dim", "hotness"):
        with pytest.raises(ValueError, match=f"table emb_l.0: {field} is 0"):
            TableSpec(**{"name": "emb_l.0", "num_embeddings": 3, "embedding_dim": 2, "hotness": 1, field: 0})
