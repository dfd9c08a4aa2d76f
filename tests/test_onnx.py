"""--save-onnx: the file predicts what the trained weights say (a float64 oracle), in batches of any size; upstream's names; what is refused."""

import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from dlrm_xla import onnx_export
from tests.conftest import CRITEO_MODEL, SMALL
from tests.oracles import dlrm_forward

ROWS = (50, 20, 100, 3)
SHORT = (*SMALL, "--num-batches=2")
SAVE = ("--save-onnx", "--save-model=m.pt", "--save-every=2")  # the weights after the last batch
QR = ("--qr-flag", "--qr-threshold=10")

MODELS = {
    "plain": ((), {}),
    "one_row": (("--mini-batch-size=1",), {}),
    "one_id": (("--num-indices-per-lookup=1", "--num-indices-per-lookup-fixed"), {}),
    "cat": (("--arch-interaction-op=cat",), {"interaction": "cat"}),
    "itself": (("--arch-interaction-itself",), {"itself": True}),
    "weighted": (("--weighted-pooling=learned", "--learning-rate=1"), {}),
    "adagrad": (("--optimizer=adagrad",), {}),
    "bfloat16": (("--matmul-precision=bfloat16",), {}),
    "qr": (QR, {}),
    "qr_add": ((*QR, "--qr-operation=add"), {"operation": "add"}),
    "qr_concat": (
        ("--qr-flag", "--qr-threshold=1", "--qr-operation=concat", "--arch-sparse-feature-size=4"),
        {"operation": "concat"},
    ),
    "qr_pooled_first": ((*QR, "--upstream-compat", "--arch-interaction-op=cat", "--learning-rate=1e-3"), {"interaction": "cat", "pools_first": True}),
    "mixed_dimensions": (("--md-flag", "--md-threshold=10"), {}),
}


def random_bags(size: int, rows: tuple[int, ...], longest: int) -> list[list[list[int]]]:
    """[size][table] bags of 0..longest ids, the first and the last of table 0 empty."""
    rng = np.random.default_rng(size)
    bags = [[rng.integers(0, n, rng.integers(0, longest + 1)).tolist() for n in rows] for _ in range(size)]
    bags[0][0] = bags[-1][0] = []
    return bags


def offsets_and_indices(bags) -> tuple[np.ndarray, list[np.ndarray]]:
    by_table = list(zip(*bags, strict=True))
    offsets = [np.cumsum([0] + [len(ids) for ids in table])[:-1] for table in by_table]
    return np.array(offsets, dtype=np.int64), [np.array(sum(table, []), dtype=np.int64) for table in by_table]


def session(path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def assert_predicts(folder, options, tolerance=2e-6):
    weights = {name: value.numpy() for name, value in torch.load(folder / "m.pt")["state_dict"].items()}
    file = session(folder / "dlrm_s_pytorch.onnx")
    for size in (1, 5, 70):
        bags = random_bags(size, ROWS, longest=12)
        dense = np.random.default_rng(size).random((size, 5), dtype=np.float32)
        offsets, indices = offsets_and_indices(bags)
        (found,) = file.run(["pred"], {"dense_x": dense, "offsets": offsets, **{f"indices_{t}": ids for t, ids in enumerate(indices)}})
        expected = dlrm_forward.predict(weights, dense, bags, **options)
        assert found.shape == (size, 1)
        assert size == 1 or expected.std() > 1e-3  # predictions at 0 and 1 would hide a mistake
        np.testing.assert_allclose(found[:, 0], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_the_file_predicts_what_the_weights_say(cli, tmp_path, name):
    flags, options = MODELS[name]
    outcome = cli(*SHORT, *SAVE, *flags)
    assert outcome.code == 0, outcome.err
    assert_predicts(tmp_path, options)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_from_xla(cli, tmp_path):
    pytest.importorskip("torch_xla")
    outcome = cli(*SHORT, *SAVE, "--mini-batch-size=8", device="xla")
    assert outcome.code == 0, outcome.err
    assert_predicts(tmp_path, {})


def test_without_training(cli, tmp_path):
    assert cli(*SHORT, *SAVE).code == 0
    (tmp_path / "dlrm_s_pytorch.onnx").unlink()
    outcome = cli(*SHORT, "--save-onnx", "--inference-only", "--load-model=m.pt")
    assert outcome.code == 0, outcome.err
    assert_predicts(tmp_path, {})


def test_criteo_has_one_tensor_of_indices(cli, tmp_path, criteo_file):
    outcome = cli(*CRITEO_MODEL, "--save-onnx", f"--raw-data-file={criteo_file}", "--num-batches=1")
    assert outcome.code == 0, outcome.err
    assert "lS_i_onnx.shape torch.Size([26, 64])\ninputs ['dense_x', 'offsets', 'indices']\n" in outcome.out
    file = session(tmp_path / "dlrm_s_pytorch.onnx")
    assert [(value.name, value.shape) for value in file.get_inputs()] == [
        ("dense_x", ["batch_size", 13]), ("offsets", [26, "batch_size"]), ("indices", [26, "batch_size"]),
    ]  # fmt: skip
    dense, indices = np.zeros((3, 13), dtype=np.float32), np.zeros((26, 3), dtype=np.int64)
    (found,) = file.run(None, {"dense_x": dense, "offsets": np.tile(np.arange(3), (26, 1)), "indices": indices})
    assert found.shape == (3, 1) and np.ptp(found) < 1e-7


def test_upstreams_lines_and_names(cli, tmp_path):
    """As upstream prints them for the same flags, but for the names of the axes of ids."""
    outcome = cli(*SHORT, "--save-onnx")
    expected = [
        "X_onnx.shape torch.Size([32, 5])",
        "lS_o_onnx.shape torch.Size([4, 32])",
        "ii.shape torch.Size([156])",
        "ii.shape torch.Size([150])",
        "ii.shape torch.Size([177])",
        "ii.shape torch.Size([44])",
        "inputs ['dense_x', 'offsets', 'indices_0', 'indices_1', 'indices_2', 'indices_3']",
        "{'dense_x': {0: 'batch_size'}, 'pred': {0: 'batch_size'}, 'offsets': {1: 'batch_size'}, 'indices_0': {0: 'num_indices_0'}, "
        "'indices_1': {0: 'num_indices_1'}, 'indices_2': {0: 'num_indices_2'}, 'indices_3': {0: 'num_indices_3'}}",
    ]
    assert "\n".join(expected) + "\n" in outcome.out
    model = onnx.load(tmp_path / "dlrm_s_pytorch.onnx")
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    ids = {f"indices_{table}": [f"num_indices_{table}"] for table in range(4)}
    assert shapes == {"dense_x": ["batch_size", 5], "offsets": [4, "batch_size"], **ids, "pred": ["batch_size", 1]}


def test_a_file_that_predicts_something_else_is_not_put_in_place(cli, tmp_path, monkeypatch):
    (tmp_path / "dlrm_s_pytorch.onnx").write_text("of an earlier run")
    numbers = onnx_export.bag_numbers
    monkeypatch.setattr(onnx_export, "bag_numbers", lambda offsets, num_ids: numbers(offsets, num_ids) * 0)
    assert "differ from the model's by" in cli(*SHORT, "--save-onnx").error
    assert (tmp_path / "dlrm_s_pytorch.onnx").read_text() == "of an earlier run"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_file_that_onnxruntime_cannot_run_is_not_put_in_place(cli, tmp_path, monkeypatch):
    """With upstream's names for the axes, onnxruntime believes all tables to have equally many ids."""
    names = onnx_export.input_names

    def upstreams(inputs, stacked):
        found, axes = names(inputs, stacked)
        return found, {name: dict.fromkeys(axis, "batch_size") for name, axis in axes.items()}

    monkeypatch.setattr(onnx_export, "input_names", upstreams)
    assert "re-use buffer" in cli(*SHORT, "--save-onnx", *QR, "--upstream-compat", "--learning-rate=1e-4").error
    assert not (tmp_path / "dlrm_s_pytorch.onnx").exists()


def test_a_file_for_one_batch_size_is_not_put_in_place(cli, tmp_path, monkeypatch):
    fixed = onnx_export.input_names
    monkeypatch.setattr(onnx_export, "input_names", lambda *arguments: (fixed(*arguments)[0], {}))
    assert "onnxruntime fails on 33 rows" in cli(*SHORT, "--save-onnx").error
    assert not (tmp_path / "dlrm_s_pytorch.onnx").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_told_before_training(cli, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    outcome = cli(*SHORT, "--save-onnx")
    assert "pip install onnx onnxruntime" in outcome.error
    assert outcome.losses == []


def test_what_cannot_be_written_is_told_before_training(cli, tmp_path, monkeypatch):
    (tmp_path / "dlrm_s_pytorch.onnx").mkdir()
    outcome = cli(*SHORT, "--save-onnx")
    assert "dlrm_s_pytorch.onnx cannot be written" in outcome.error
    assert outcome.losses == []
    (tmp_path / "dlrm_s_pytorch.onnx").rmdir()
    monkeypatch.setattr(onnx_export, "FILE_LIMIT", 5_000)
    outcome = cli(*SHORT, "--save-onnx")
    assert "ONNX file holds less than 2" in outcome.error
    assert outcome.losses == []


def test_says_nothing_about_the_library(cli_process):
    """PyTorch's exporter deprecates itself in two warnings; the user has no part in that."""
    outcome = cli_process(*SHORT, "--save-onnx", "--print-freq=100", before="import warnings; warnings.simplefilter('always')")
    assert outcome.code == 0
    assert "arning" not in outcome.err and "onnx" not in outcome.err
