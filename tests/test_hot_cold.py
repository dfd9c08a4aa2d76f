"""Hot ids: the map from id to slot, and that the ids looked up most have rows of their own."""

import numpy as np
import pytest
import torch

from compression import hot_cold
from compression.hot_ids import HotIds, hot_ids_bytes
from compression.method import Making
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.layouts import RowsLayout
from dlrm_xla.ops.rows import add_rows_scatter
from dlrm_xla.optim import RULES
from dlrm_xla.specs import TableSpec, UserError

METHOD = hot_cold.METHOD


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 30, 97, 1000, 10_007])
def test_every_id_is_found_in_a_slot_of_its_own(count):
    rng = np.random.RandomState(count)
    everything = rng.permutation(20 * count)
    ids, others = everything[:count], everything[count:]
    places = HotIds(count)
    for chosen in (ids, others[:count]):  # the second takes the first's place
        slots = places.put(chosen)
        assert len(set(slots.tolist())) == count and slots.min() >= 0 and slots.max() < places.num_slots
        found, slot = places.find(torch.from_numpy(chosen))
        assert found.all() and (slot.numpy() == slots).all()
        found, slot = places.find(torch.from_numpy(np.setdiff1d(everything, chosen)).int().view(-1, 1))
        assert slot.dtype == torch.int32 and not found.any() and not slot.any()
    assert sum(value.numel() * value.element_size() for value in places.state_dict().values()) == hot_ids_bytes(count)
    assert count <= places.num_slots <= max(count / 0.95 + 4, 4)


def test_fewer_ids_than_room_and_more():
    places = HotIds(100)
    assert not places.find(torch.arange(10))[0].any()
    assert len(places.put(np.arange(0))) == 0
    places.put(np.array([5]))
    assert places.find(torch.arange(10))[0].tolist() == [i == 5 for i in range(10)]
    with pytest.raises(ValueError, match="101 ids do not go into 100"):
        places.put(np.arange(101))


def test_find_on_a_device(backend):
    places = HotIds(500)
    slots = places.put(np.arange(0, 5000, 10))
    places = backend.place(places)
    before = backend.fallbacks()
    found, slot = places.find(torch.arange(5000, dtype=torch.int32).to(backend.device))
    backend.end_step()
    assert backend.fallbacks() == before
    assert (found.cpu().nonzero().flatten() == torch.arange(0, 5000, 10)).all()
    assert (slot.cpu()[::10].numpy() == slots).all()


def test_the_most_popular_have_their_own_rows():
    counts = np.random.RandomState(0).permutation(1000).astype(float)
    spec, knobs = TableSpec("emb_l.0", 1000, 4), METHOD.knob_values({"hot": "0.1", "rows": "7"})
    table = METHOD.create(spec, knobs, Making(np.random.RandomState(0), counts=counts))
    EmbeddingCollection([table], None, RULES["sgd"](), RowsLayout(add_rows_scatter, ragged=False))
    (rows,) = table.row_ids(torch.arange(1000))
    hot = counts >= 900
    slots = table.hot_ids.num_slots
    assert len(set(rows[hot].tolist())) == 100 and rows[hot].max() < slots
    assert set(rows[~hot].tolist()) == set(range(slots, slots + 7))


def test_an_id_that_was_never_looked_up_is_cold():
    counts = np.zeros(50)
    counts[[3, 7]] = 1
    table = METHOD.create(TableSpec("emb_l.0", 50, 4), METHOD.knob_values({"hot": "10"}), Making(np.random.RandomState(0), counts=counts))
    table.fill_buffers()
    assert table.hot_ids.find(torch.arange(50))[0].nonzero().flatten().tolist() == [3, 7]


def test_conversion_copies_hot_rows():
    counts = np.arange(1000.0)
    weight = np.random.RandomState(1).standard_normal((1000, 4)).astype(np.float32)
    knobs = METHOD.knob_values({"hot": "50", "rows": "3"})
    found = METHOD.convert(TableSpec("emb_l.0", 1000, 4), knobs, weight, Making(np.random.RandomState(0), counts=counts))
    collection = EmbeddingCollection([found.table], None, RULES["sgd"](), RowsLayout(add_rows_scatter, ragged=False))
    vectors = collection.lookup(torch.arange(1000, dtype=torch.int32)[:, None], None).pooled[:, 0].detach().numpy()
    np.testing.assert_allclose(vectors[-50:], weight[-50:], rtol=1e-6)
    assert len(np.unique(vectors[:-50], axis=0)) == 3


def test_counts_are_needed():
    spec, making = TableSpec("emb_l.0", 97, 4), Making(np.random.RandomState(0))
    with pytest.raises(UserError, match="hot_cold:hot=0.05: table emb_l.0: how often"):
        METHOD.create(spec, METHOD.knob_values({}), making)
    METHOD.create(spec, METHOD.knob_values({"hot": "97"}), making).fill_buffers()  # every id is hot
