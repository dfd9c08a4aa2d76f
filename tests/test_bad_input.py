"""Bad input ends with exit code 2 and one line on stderr that starts with "error: "; nothing is left half-written."""

import contextlib
import gzip
import io
import os
import pickle
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CRITEO_MODEL, SMALL

from dlrm_xla import checkpoint_file
from dlrm_xla.specs import UserError

PROCESSED = "kaggleAdDisplayChallenge_processed.npz"


def files_in(folder: Path) -> set[str]:
    """Every file below, hidden ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def largest_file(num_bytes: int):
    """No file of this process may grow beyond `num_bytes`: what a full disk looks like from here (Python ignores the signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Criteo's text and the processed file


def with_cell(lines: list[str], line: int, column: int, text: str | None) -> str:
    """The file with one cell (both counted from 1) replaced, or taken out where text is None."""
    cells = lines[line - 1].split("\t")
    cells[column - 1 : column] = [] if text is None else [text]
    return "".join(f"{row}\n" for row in [*lines[: line - 1], "\t".join(cells), *lines[line:]])


@pytest.mark.parametrize(
    "line, column, text, message",
    [
        (5, 7, None, "line 5: 39 columns; a row has 40 columns"),
        (703, 40, "00000001\tmore", "line 703: 41 columns"),
        (1, 20, "zzzzzzzz", "line 1, column 20 (id C6): 'zzzzzzzz' is not a hexadecimal id"),
        (350, 40, "123456789", "line 350, column 40 (id C26): '123456789' is not a hexadecimal id of 1 to 8 digits"),
        (2, 15, "-1", "line 2, column 15 (id C1): '-1' is not a hexadecimal id"),
        (9, 2, "1.5", "line 9, column 2 (count I1): '1.5' is not a whole number"),
        (9, 14, "many", "line 9, column 14 (count I13): 'many' is not a whole number"),
        (9, 14, "99999999999", "line 9, column 14 (count I13): '99999999999' does not fit 32 bits"),
        (7, 1, "2", "line 7, column 1 (label): '2' is not 0 or 1"),
        (7, 1, "", "line 7, column 1 (label): '' is not 0 or 1"),
        (7, 1, "0.5", "line 7, column 1 (label): '0.5' is not 0 or 1"),
        (7, 1, "\x00", "line 7: NUL bytes"),
        (7, 20, "a\x1b[31mb\u2028", "line 7, column 20 (id C6): "),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_column(cli, criteo_file, criteo_rows, line, column, text, message):
    criteo_file.write_text(with_cell(criteo_rows, line, column, text), encoding="utf-8")
    error = cli(*CRITEO_MODEL, f"--raw-data-file={criteo_file}").error
    assert error.startswith(f"{criteo_file}: line {line}") and message in error and error.isprintable()
    assert files_in(criteo_file.parent) == {"train.txt"}


def test_a_blank_line_and_an_empty_file(cli, criteo_file, criteo_rows):
    criteo_file.write_text("\n".join([*criteo_rows[:10], "", *criteo_rows[10:]]))
    assert "line 11: the line is blank" in cli(*CRITEO_MODEL, f"--raw-data-file={criteo_file}").error
    criteo_file.write_text("")
    assert "the file is empty" in cli(*CRITEO_MODEL, f"--raw-data-file={criteo_file}").error
    assert files_in(criteo_file.parent) == {"train.txt"}


@pytest.mark.parametrize("share", [0.0005, 0.3, 0.9, 0.9999])
def test_a_cut_off_gzip(cli, criteo_file, share):
    packed = gzip.compress(criteo_file.read_bytes())
    path = criteo_file.with_suffix(".txt.gz")
    path.write_bytes(packed[: int(len(packed) * share)])
    error = cli(*CRITEO_MODEL, f"--raw-data-file={path}").error
    assert error.startswith(f"{path}: line ") and "cut off" in error
    assert files_in(criteo_file.parent) == {"train.txt", "train.txt.gz"}


def test_a_damaged_gzip(cli, criteo_file):
    packed = bytearray(gzip.compress(criteo_file.read_bytes()))
    packed[len(packed) // 2] ^= 0xFF
    path = criteo_file.with_suffix(".txt.gz")
    path.write_bytes(packed)
    assert cli(*CRITEO_MODEL, f"--raw-data-file={path}").error.startswith(f"{path}: line ")


def test_a_raw_file_that_is_not_there_or_no_file(cli, tmp_path, criteo_file):
    assert cli(*CRITEO_MODEL, "--raw-data-file=none.txt").error == "--raw-data-file=none.txt: cannot read it: No such file or directory"
    assert cli(*CRITEO_MODEL, f"--raw-data-file={tmp_path}").error.endswith("cannot read it: Is a directory")
    assert cli(*CRITEO_MODEL, f"--raw-data-file={criteo_file}/x").error.endswith("cannot read it: Not a directory")
    assert "name Criteo's text with --raw-data-file" in cli(*CRITEO_MODEL, "--processed-data-file=none.npz").error


def test_too_few_rows(cli, criteo_file, criteo_rows):
    criteo_file.write_text(f"{criteo_rows[0]}\n")
    assert "too few" in cli(*CRITEO_MODEL, f"--raw-data-file={criteo_file}").error


def test_a_processed_file_made_with_other_flags_or_from_another_file(cli, criteo_file, criteo_rows):
    run = (*CRITEO_MODEL, f"--raw-data-file={criteo_file}", "--num-batches=1")
    assert cli(*run).code == 0
    processed = criteo_file.parent / PROCESSED
    before = processed.read_bytes()
    assert f"{processed}: made with --max-ind-range=-1, but 20 is asked for" in cli(*run, "--max-ind-range=20").error
    assert "made with --data-sub-sample-rate=0.0, but 0.5 is asked for" in cli(*run, "--data-sub-sample-rate=0.5").error
    criteo_file.write_text("".join(f"{row}\n" for row in reversed(criteo_rows)))
    assert "made from another raw file" in cli(*run).error
    assert processed.read_bytes() == before


def test_a_damaged_processed_file(cli, criteo_file):
    run = (*CRITEO_MODEL, f"--raw-data-file={criteo_file}", "--num-batches=1")
    assert cli(*run).code == 0
    processed = criteo_file.parent / PROCESSED
    whole = processed.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for broken in (b"", b"PK", b"not a zip" * 99, whole[:50], whole[: len(whole) // 2], whole[:-1], bytes(flipped)):
        processed.write_bytes(broken)
        error = cli(*run).error
        assert str(processed) in error and "delete" in error, broken[:20]
        assert processed.read_bytes() == broken


@pytest.mark.parametrize(
    "change, message",
    [
        ({"X_cat": None}, "X_cat"),
        ({"counts": np.ones(25, np.int32)}, "counts is not 26 whole numbers"),
        ({"counts": np.zeros(26, np.int32)}, "counts is not 26 whole numbers above 0"),
        ({"y": np.full(703, 2, np.int32)}, "y holds a value that is not a whole number 0 or 1"),
        ({"y": np.zeros(0, np.int32)}, "y has shape (0,)"),
        ({"X_int": np.zeros((703, 12), np.int32)}, "X_int is int32 [703, 12], not whole numbers [703, 13]"),
        ({"X_int": np.full((703, 13), -1, np.int32)}, "X_int holds a value that is not a whole number from 0"),
        ({"X_cat": np.full((703, 26), 10**6, np.int32)}, "X_cat holds a value that is not a whole number from 0 to its column's count - 1"),
        ({"X_cat": np.full((703, 26), 0.5)}, "X_cat holds a value"),
        ({"X_cat": np.full((703, 26), np.nan)}, "X_cat holds a value"),
        ({"X_cat": np.array([["a"] * 26] * 703)}, "X_cat is <U1"),
        ({"X_cat": np.array([[object] * 26] * 703)}, "X_cat"),
    ],
)
def test_a_processed_file_with_wrong_arrays(cli, tmp_path, change, message):
    shapes = {"X_cat": (703, 26), "X_int": (703, 13), "y": 703, "counts": 26}
    arrays = {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}
    arrays["counts"] += 1
    arrays = {name: array for name, array in {**arrays, **change}.items() if array is not None}
    np.savez(tmp_path / "p.npz", **arrays)
    error = cli(*CRITEO_MODEL, "--processed-data-file=p.npz").error
    assert "p.npz" in error and message in error


def test_no_space_for_the_processed_file(cli, criteo_file):
    with largest_file(50_000):
        error = cli(*CRITEO_MODEL, f"--raw-data-file={criteo_file}").error
    assert error == f"cannot write {criteo_file.parent / PROCESSED}: File too large; name another place with --processed-data-file=PATH"
    assert files_in(criteo_file.parent) == {"train.txt"}
    error = cli(*CRITEO_MODEL, f"--raw-data-file={criteo_file}", f"--processed-data-file={criteo_file}/p.npz").error
    assert "Not a directory" in error and "--processed-data-file" in error


# random data


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--rand-data-dist=gaussian", "--rand-data-max=20"], "the table has 3 rows; --rand-data-max=20 must be below 3"),
        (["--data-generation=synthetic"], "input/dist_emb_0.log: cannot read the trace distribution (No such file or directory)"),
        (["--num-batches=0", "--data-size=9", "--drop-last"], "--drop-last leaves no batch"),
        (["--qr-flag", "--qr-operation=concat", "--arch-mlp-bot=5-16-16", "--qr-threshold=10"], "table emb_l.3 has 3 rows"),
        (["--md-flag", "--md-round-dims", "--md-threshold=2", "--arch-sparse-feature-size=6", "--arch-mlp-bot=5-6"], "--md-round-dims rounds"),
    ],
)
def test_random_data_that_does_not_fit_the_tables(cli, tmp_path, argv, message):
    outcome = cli(*SMALL, *argv)
    assert message in outcome.error and outcome.losses == []
    assert all(name.startswith("run_kaggle_pt/") for name in files_in(tmp_path))


def test_a_model_larger_than_the_memory(cli):
    error = cli(*SMALL, "--arch-sparse-feature-size=4096", "--arch-mlp-bot=5-4096", "--arch-embedding-size=2147483647").error
    assert error.startswith("out of memory (")


# devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("flag", ["--device=cuda", "--use-gpu"])
def test_cuda_without_cuda(cli, tmp_path, flag):
    assert cli(*SMALL, flag, device=None).error.startswith("--device=cuda: this PyTorch sees no CUDA device; use --device=cpu")
    assert not files_in(tmp_path)


def test_xla_without_torch_xla(cli_process, tmp_path):
    block = """
class NoXla:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch_xla":
            raise ModuleNotFoundError("No module named 'torch_xla'", name=name)
sys.meta_path.insert(0, NoXla())
"""
    outcome = cli_process(*SMALL, device="xla", before=block)
    assert outcome.error.startswith("--device=xla: torch_xla cannot be imported (No module named 'torch_xla')")
    assert "use --device=cpu" in outcome.error
    assert not files_in(tmp_path)


def test_xla_on_a_device_that_does_not_exist(cli_process):
    outcome = cli_process(*SMALL, device="xla", env={**os.environ, "PJRT_DEVICE": "ABACUS"})
    assert outcome.error.startswith("--device=xla: PJRT_DEVICE=ABACUS does not start")


def test_metrics_of_xla_on_the_cpu(cli):
    assert cli(*SMALL, "--tpu-metrics-debug").error.startswith("--tpu-metrics-debug: torch_xla's metrics exist on --device=xla only")


# places to write


@pytest.mark.parametrize("flag", ["--save-model", "--log-dir", "--tensor-board-filename"])
@pytest.mark.parametrize("place", ["FILE/x", "/proc/x", "FOLDER", "none/x", "n" * 300, "/dev/null"])
def test_a_place_that_cannot_be_written(cli, tmp_path, flag, place):
    """Found before training starts. A path below a regular file and one in /proc are refused to root too."""
    (tmp_path / "FILE").write_text("kept")
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER" / "content").write_text("kept")
    outcome = cli(*SMALL, f"{flag}={place}", "--test-freq=4")
    if flag != "--save-model" and place in ("FOLDER", "none/x"):
        assert outcome.code == 0  # a folder is what is asked for; it is made
        return
    assert place in outcome.error and "--" in outcome.error
    assert outcome.losses == []
    assert {name: (tmp_path / name).read_text() for name in files_in(tmp_path)} == {"FILE": "kept", "FOLDER/content": "kept"}
    assert not Path("/dev/null").is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("flag", ["--save-model", "--log-dir", "--tensor-board-filename"])
def test_a_folder_without_permission(cli, tmp_path, flag):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "ermission" in cli(*SMALL, f"{flag}=closed/x", "--test-freq=4").error


def test_a_full_disk_keeps_the_checkpoint_before(cli, tmp_path):
    run = (*SMALL, "--test-freq=4", "--save-model=m.pt")
    assert cli(*run).code == 0
    before = (tmp_path / "m.pt").read_bytes()
    with largest_file(len(before) // 2):
        error = cli(*run, "--numpy-rand-seed=5", "--log-dir=other").error
    assert error.startswith("--save-model=m.pt: cannot be written (") and "free some space" in error
    assert (tmp_path / "m.pt").read_bytes() == before
    assert not [name for name in files_in(tmp_path) if "tmp" in name]


@pytest.mark.parametrize("num_bytes", [0, 500, 1500, 4000, 20_000])
def test_a_full_disk_under_the_run_folder(cli, tmp_path, num_bytes):
    with largest_file(num_bytes):
        outcome = cli(*SMALL, "--log-dir=logs")
    assert outcome.error.startswith("logs") and "cannot be written (" in outcome.error
    assert not [name for name in files_in(tmp_path) if "tmp" in name.removeprefix("logs/events.out.tf")]


def test_a_full_disk_under_stdout(cli_process):
    with open("/dev/full", "w") as full:
        outcome = cli_process(*SMALL, stdout=full)
    assert "No space left on device" in outcome.error


def test_paths_with_blanks_and_other_letters(cli, tmp_path, criteo_file):
    folder = tmp_path / "мои данные #1 'q' %s {x}"
    folder.mkdir()
    raw = criteo_file.rename(folder / "поезд 火车.txt")
    outcome = cli(
        *CRITEO_MODEL, f"--raw-data-file={raw}", f"--processed-data-file={folder}/обработано.npz", f"--save-model={folder}/модель é.pt",
        f"--log-dir={folder}/журнал", "--test-freq=5", "--num-batches=5",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert {"обработано.npz", "модель é.pt", "журнал/metrics.jsonl", "журнал/summary.png"} <= files_in(folder)
    assert f"Saving model to {folder}/модель é.pt" in outcome.out
    again = cli(*CRITEO_MODEL, f"--processed-data-file={folder}/обработано.npz", f"--load-model={folder}/модель é.pt", "--inference-only")
    assert again.code == 0, again.err


# checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint of SMALL after four batches."""
    import run_dlrm

    folder = tmp_path_factory.mktemp("trained")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), contextlib.chdir(folder):
        assert run_dlrm.main([*SMALL, "--num-batches=4", "--test-freq=4", "--save-model=m.pt", "--device=cpu"]) == 0
    return folder / "m.pt"


def test_a_checkpoint_that_is_not_there_or_no_file(cli, tmp_path):
    for name in ("none.pt", "none/x.pt", "n" * 300):
        error = cli(*SMALL, f"--load-model={name}").error
        assert error.startswith(f"--load-model={name}: cannot be read (") and ("No such file" in error or "too long" in error)
    assert cli(*SMALL, f"--load-model={tmp_path}").error.endswith("cannot be read (Is a directory)")
    assert "not a readable checkpoint" in cli(*SMALL, "--load-model=/dev/null").error
    assert not files_in(tmp_path)


def test_a_checkpoint_cut_off_anywhere(cli, trained, tmp_path):
    whole, path = trained.read_bytes(), tmp_path / "cut.pt"
    lengths = sorted({*range(0, 40), *range(40, len(whole), len(whole) // 60), *(len(whole) - gone for gone in (1, 2, 10, 22, 23, 100))})
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as error:
            checkpoint_file.read(path)
        assert str(error.value).startswith(f"--load-model={path}: not a readable checkpoint") and "\n" not in str(error.value), length
    assert "not a readable checkpoint" in cli(*SMALL, f"--load-model={path}").error


def test_a_checkpoint_with_a_wrong_byte_is_refused_or_loaded_but_never_a_traceback(trained, tmp_path):
    whole, path = trained.read_bytes(), tmp_path / "flipped.pt"
    refused = 0
    for position in range(0, len(whole), 97):
        flipped = bytearray(whole)
        flipped[position] ^= 0x41
        path.write_bytes(flipped)
        try:
            checkpoint_file.read(path)
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"--load-model={path}: ") and "\n" not in str(error)
    assert refused > 10


def zipped(content: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"epoch 3, loss 0.45\n" * 20, "not a readable checkpoint"),
        (b"\x80\x04", "not a readable checkpoint"),
        (zipped({"a.txt": b"hello"}), "not a readable checkpoint"),
        (zipped({"archive/data.pkl": b"", "archive/version": b"3"}), "not a readable checkpoint"),
        (saved([1, 2, 3]), "holds a list, not a checkpoint"),
        (saved(torch.zeros(3)), "holds a Tensor, not a checkpoint"),
        (saved({"state_dict": {}}), "it lacks iter, epoch, nepochs"),
        (saved({"emb_l.0.weight": torch.zeros(3, 2)}), "it lacks state_dict, iter"),
    ],
    ids=range(8),
)
def test_a_file_that_is_no_checkpoint(cli, tmp_path, content, message):
    (tmp_path / "x.pt").write_bytes(content)
    error = cli(*SMALL, "--load-model=x.pt").error
    assert error.startswith("--load-model=x.pt: ") and message in error


class Trap:
    """Unpickling this runs a command."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle", "among the weights", "protocol 4"])
def test_a_checkpoint_that_would_run_code_does_not(cli, trained, tmp_path, kind):
    path = tmp_path / "trap.pt"
    good = torch.load(trained, weights_only=True)
    if kind == "zip":
        torch.save({**good, "test_acc": Trap()}, path)
    elif kind == "legacy":
        torch.save({**good, "train_loss": Trap()}, path, _use_new_zipfile_serialization=False)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps(Trap()))
    elif kind == "protocol 4":
        torch.save(Trap(), path, pickle_protocol=4)
    else:
        torch.save({**good, "state_dict": {**good["state_dict"], "emb_l.0.weight": Trap()}}, path)
    for more in ([], ["--inference-only"]):
        error = cli(*SMALL, "--load-model=trap.pt", *more).error
        assert error.startswith("--load-model=trap.pt: ")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "key, value",
    [
        ("state_dict", 3), ("state_dict", {"emb_l.0.weight": "text"}), ("state_dict", {1: 2}), ("state_dict", None),
        ("opt_state_dict", 3), ("opt_state_dict", {}), ("opt_state_dict", {"state": 3, "param_groups": []}),
        ("iter", -5), ("iter", "four"), ("epoch", -1), ("epoch", None), ("train_loss", "low"), ("test_acc", [1]), ("nbatches", {}),
        ("dlrm_xla", 3), ("dlrm_xla", {}), ("dlrm_xla", {"progress": {"unknown": 3}, "flags": {}}),
    ],
)  # fmt: skip
def test_a_checkpoint_with_wrong_values(cli, trained, key, value):
    content = {**torch.load(trained, weights_only=True), key: value}
    if key != "dlrm_xla":
        del content["dlrm_xla"]  # as upstream's own file, where these keys count
    torch.save(content, "x.pt")
    assert cli(*SMALL, "--load-model=x.pt").error.startswith("--load-model=x.pt: ")


OTHER_MODELS = {
    "rows": (["--arch-embedding-size=50-21-100-3"], ["table emb_l.1", "20 x 8", "21 x 8", "--arch-embedding-size"]),
    "dimension": (["--arch-sparse-feature-size=4", "--arch-mlp-bot=5-16-4"], ["table emb_l.0", "50 x 8", "50 x 4", "--arch-sparse-feature-size"]),
    "bottom": (["--arch-mlp-bot=5-17-8"], ["bot_l.0.weight", "16 x 5", "17 x 5", "--arch-mlp-bot"]),
    "deeper bottom": (["--arch-mlp-bot=5-16-16-8"], ["bot_l.2.weight", "8 x 16", "16 x 16", "--arch-mlp-bot"]),
    "top": (["--arch-mlp-top=17-8-1"], ["top_l.0.weight", "16 x 18", "17 x 18", "--arch-mlp-top"]),
    "interaction": (["--arch-interaction-op=cat"], ["top_l.0.weight", "16 x 18", "16 x 40", "--arch-interaction-op"]),
    "itself": (["--arch-interaction-itself"], ["top_l.0.weight", "16 x 18", "16 x 23", "--arch-interaction-itself"]),
    "fewer tables": (["--arch-embedding-size=50-20-100"], ["number of tables", "--arch-embedding-size"]),
    "more tables": (["--arch-embedding-size=50-20-100-3-7"], ["number of tables", "--arch-embedding-size"]),
    "qr": (["--qr-flag", "--qr-threshold=60"], ["table emb_l.2", "--qr-flag"]),
    "md": (["--md-flag", "--md-threshold=60"], ["table emb_l", "--md-flag"]),
    "pooling": (["--weighted-pooling=learned"], ["v_W_l.0", "--weighted-pooling"]),
    "adagrad": (["--optimizer=adagrad"], ["--optimizer=sgd", "--optimizer=adagrad"]),
    "rwsadagrad": (["--optimizer=rwsadagrad"], ["--optimizer=sgd", "--optimizer=rwsadagrad"]),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
@pytest.mark.parametrize("only_test", [False, True])
def test_a_checkpoint_of_another_model_names_table_flag_and_both_values(cli, trained, tmp_path, name, only_test):
    argv, words = OTHER_MODELS[name]
    outcome = cli(*SMALL, *argv, f"--load-model={trained}", *(["--inference-only"] if only_test else []))
    if only_test and "adagrad" in name:
        assert outcome.code == 0  # a test needs no optimizer
        return
    assert outcome.error.startswith(f"--load-model={trained}: ")
    assert all(word in outcome.error for word in words), outcome.error
    assert not [name for name in files_in(tmp_path) if "events" in name]


def test_a_checkpoint_without_the_tables_of_this_data(cli, trained, criteo_file):
    error = cli(*CRITEO_MODEL, f"--raw-data-file={criteo_file}", f"--load-model={trained}").error
    assert "the number of tables is 4 in the checkpoint and 26 here" in error


# a loss that is no number


@pytest.mark.parametrize("loss", ["mse", "bce", "wbce"])
@pytest.mark.parametrize("rate", ["1e30", "3e38"])
@pytest.mark.parametrize("freq", [["--save-every=1"], ["--test-freq=1"], ["--print-freq=100"]], ids=lambda freq: freq[0])
def test_a_loss_that_is_no_number_stops_the_run(cli, tmp_path, loss, rate, freq):
    outcome = cli(*SMALL, f"--loss-function={loss}", f"--learning-rate={rate}", "--save-model=m.pt", *freq)
    assert "not a finite number" in outcome.error and "epoch 0: " in outcome.error
    assert any(f"batch {number} " in outcome.error for number in (1, 2))
    if (tmp_path / "m.pt").exists():
        assert "the last good checkpoint is m.pt (epoch 0, batch 1)" in outcome.error
        content = torch.load(tmp_path / "m.pt", weights_only=True)
        assert all(weight.isfinite().all() for weight in content["state_dict"].values())
    else:
        assert "no checkpoint was written" in outcome.error


def test_weights_that_an_update_ruined_are_not_saved(cli, trained, tmp_path):
    """The loss of the batch is finite, the weights after it are not: the next batch would show it, but the checkpoint comes first."""
    (tmp_path / "m.pt").write_bytes(trained.read_bytes())
    run = (*SMALL, "--loss-function=wbce", "--loss-weights=1e10-1e10", "--learning-rate=3e38", "--save-model=m.pt", "--save-every=1")
    assert "after batch 1 a number in emb_l.0.weight is not a finite number; no checkpoint was written" in cli(*run).error
    assert (tmp_path / "m.pt").read_bytes() == trained.read_bytes()


def test_the_last_good_checkpoint_is_kept_and_named(cli, trained, tmp_path):
    """A run that goes wrong late: it goes on from a good checkpoint with a rate that ruins the weights."""
    content = torch.load(trained, weights_only=True)
    (tmp_path / "m.pt").write_bytes(trained.read_bytes())
    error = cli(*SMALL, "--load-model=m.pt", "--save-model=m.pt", "--save-every=4", "--learning-rate=1e30").error
    assert "the loss of batch 6 is not a finite number; the last good checkpoint is m.pt" in error
    after = torch.load(tmp_path / "m.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(after[name], weight) for name, weight in content["state_dict"].items())


# what is not wrong but hardly meant


def test_a_checkpoint_that_nothing_would_write_and_training_that_is_done_are_said(cli, trained):
    assert "warning: no checkpoint will be written: --save-model needs --test-freq=N" in cli(*SMALL, "--save-model=m.pt").err
    assert "no checkpoint will be written" not in cli(*SMALL, "--save-model=m.pt", "--test-freq=6").err
    outcome = cli(*SMALL, "--num-batches=4", f"--load-model={trained}")
    assert outcome.code == 0 and "nothing is left to train" in outcome.err and outcome.losses == []
