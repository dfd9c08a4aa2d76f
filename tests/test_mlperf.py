"""MLLOG events: upstream's keys, kinds, values and metadata in upstream's order, on the console and in dlrm.log."""

import inspect
import json
import sys

import pytest

from dlrm_xla.mlperf import MLPerfLog
from dlrm_xla.specs import UserError

POINT, START, END = "POINT_IN_TIME", "INTERVAL_START", "INTERVAL_END"
REFERENCE = "reference_implementation"

# recorded from upstream 090956e: --num-batches=12 --test-freq=5 --mini-batch-size=32 --learning-rate=0.1 --mlperf-logging, two epochs
BEFORE_SUBMISSION = [
    (POINT, "cache_clear", True, {}),
    (START, "init_start", None, {}),
    (END, "init_stop", None, {}),
    (START, "run_start", None, {}),
]
SUBMISSION = [
    (POINT, "submission_benchmark", "dlrm", {}),
    (POINT, "submission_org", REFERENCE, {}),
    (POINT, "submission_division", "closed", {}),
    (POINT, "submission_status", "onprem", {}),
    (POINT, "submission_platform", REFERENCE, {}),
    (POINT, "submission_entry", REFERENCE, {}),
    (POINT, "submission_poc_name", REFERENCE, {}),
    (POINT, "submission_poc_email", REFERENCE, {}),
    (POINT, "seed", 123, {}),
    (POINT, "global_batch_size", 32, {}),
    (POINT, "opt_base_learning_rate", 0.1, {}),
    (POINT, "opt_learning_rate_warmup_steps", 0, {}),
    (POINT, "sgd_opt_base_learning_rate", 0.1, {}),
    (POINT, "lr_decay_start_steps", 0, {}),
    (POINT, "sgd_opt_learning_rate_decay_steps", 0, {}),
    (POINT, "sgd_opt_learning_rate_decay_poly_power", 2, {}),
]
EPOCHS = [
    (START, "block_start", None, {"first_epoch_num": 1, "epoch_count": 1}),
    (START, "epoch_start", None, {"epoch_num": 1}),
    (START, "eval_start", None, {"epoch_num": 1.4166666666666667}),
    (END, "eval_stop", None, {"epoch_num": 1.4166666666666667}),
    (START, "eval_start", None, {"epoch_num": 1.8333333333333335}),
    (END, "eval_stop", None, {"epoch_num": 1.8333333333333335}),
    (START, "eval_start", None, {"epoch_num": 2.0}),
    (END, "eval_stop", None, {"epoch_num": 2.0}),
    (END, "epoch_stop", None, {"epoch_num": 1}),
    (END, "block_stop", None, {"first_epoch_num": 1}),
    (START, "block_start", None, {"first_epoch_num": 2, "epoch_count": 1}),
    (START, "epoch_start", None, {"epoch_num": 2}),
    (START, "eval_start", None, {"epoch_num": 2.416666666666667}),
    (END, "eval_stop", None, {"epoch_num": 2.416666666666667}),
    (START, "eval_start", None, {"epoch_num": 2.8333333333333335}),
    (END, "eval_stop", None, {"epoch_num": 2.8333333333333335}),
    (START, "eval_start", None, {"epoch_num": 3.0}),
    (END, "eval_stop", None, {"epoch_num": 3.0}),
    (END, "epoch_stop", None, {"epoch_num": 2}),
    (END, "block_stop", None, {"first_epoch_num": 2}),
]
ABORTED = [(END, "run_stop", None, {"status": "aborted"})]


def parsed(lines):
    events = []
    for line in lines:
        assert line.startswith(":::MLLOG {")
        event = json.loads(line.removeprefix(":::MLLOG "))
        assert list(event) == ["namespace", "time_ms", "event_type", "key", "value", "metadata"]
        where = {name: event["metadata"].pop(name) for name in ("file", "lineno")}
        assert where["file"] == __file__, "the metadata must name the caller"
        events.append((event["event_type"], event["key"], event["value"], event["metadata"]))
    return events


def whole_run(log, run_dir, success=False):
    log.init_start()
    log.init_stop()
    log.run_start()
    log.submission(123, 32, run_dir)
    log.hyperparameters(0.1, 0, 0, 0)
    for epoch in range(2):
        log.epoch_start(epoch)
        for done in (5, 10, 12):
            log.eval_start(epoch, done, 12)
            log.eval_stop(epoch, done, 12)
        log.epoch_stop(epoch)
    log.run_stop(success)


def test_events_are_upstreams(tmp_path):
    lines = []
    whole_run(MLPerfLog(True, lines.append), tmp_path)
    assert parsed(lines) == BEFORE_SUBMISSION + SUBMISSION + EPOCHS + ABORTED
    assert parsed((tmp_path / "dlrm.log").read_text().splitlines()) == SUBMISSION + EPOCHS + ABORTED


def test_the_folder_is_made_and_a_second_run_is_added_to_the_log(tmp_path):
    for _ in range(2):
        lines = []
        whole_run(MLPerfLog(True, lines.append), tmp_path / "new" / "run", success=True)
    assert len(lines) == len(BEFORE_SUBMISSION + SUBMISSION + EPOCHS) + 1, "each event once, also in a process's second run"
    success = [(END, "run_stop", None, {"status": "success"})]
    assert parsed((tmp_path / "new" / "run" / "dlrm.log").read_text().splitlines()) == (SUBMISSION + EPOCHS + success) * 2


def test_run_stop_comes_once():
    lines = []
    log = MLPerfLog(True, lines.append)
    log.run_stop(True)
    log.run_stop(False)
    assert parsed(lines) == [(END, "run_stop", None, {"status": "success"})]


def test_samples():
    lines = []
    MLPerfLog(True, lines.append).samples(100, 20)
    assert parsed(lines) == [(POINT, "train_samples", 100, {}), (POINT, "eval_samples", 20, {})]


def test_disabled_does_nothing(tmp_path):
    lines = []
    log = MLPerfLog(False, lines.append)
    whole_run(log, tmp_path)
    log.samples(1, 1)
    log.close()
    assert lines == [] and list(tmp_path.iterdir()) == []
    public = {name for name, _ in inspect.getmembers(MLPerfLog, inspect.isfunction) if not name.startswith("_")}
    assert public == {
        "init_start", "init_stop", "run_start", "samples", "submission", "hyperparameters", "epoch_start", "eval_start", "eval_stop",
        "epoch_stop", "run_stop", "close",
    }  # fmt: skip


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlperf_logging", None)
    monkeypatch.delitem(sys.modules, "mlperf_logging.mllog", raising=False)
    MLPerfLog(False)
    with pytest.raises(UserError, match="--mlperf-logging .* pip install mlperf-logging"):
        MLPerfLog(True)


def test_log_that_cannot_be_written(tmp_path):
    (tmp_path / "dlrm.log").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"dlrm\.log: cannot be written \(No space left on device\).*--log-dir"):
        whole_run(MLPerfLog(True, lambda line: None), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--log-dir"):
        MLPerfLog(True, lambda line: None).submission(1, 1, tmp_path / "file" / "run")
