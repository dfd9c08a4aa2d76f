"""MLPerf's event lines (`:::MLLOG {...}`) at upstream's moments, with upstream's keys, order, values and metadata.

Upstream leaves out the last run_stop, or writes "aborted" for a run that reached its threshold, because the best AUC is lost on the way;
here run_stop is written once, with the status that the caller found. Lines go through the caller's `emit` instead of mllog's own handler
on stdout, so that they neither garble a progress bar nor end a run whose reader has gone. As upstream does, dlrm.log starts with the
submission lines; cache_clear, init_* and run_start, which come before, are on stdout only.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from dlrm_xla.specs import UserError
from dlrm_xla.tracking import LineFile

BENCHMARK = "dlrm"
CALLER = 3  # stack frames from mllog's logging call out to the code that called a method of MLPerfLog; "file" and "lineno" name it
SUBMISSION = (
    ("SUBMISSION_BENCHMARK", BENCHMARK),
    ("SUBMISSION_ORG", "reference_implementation"),
    ("SUBMISSION_DIVISION", "closed"),
    ("SUBMISSION_STATUS", "onprem"),
    ("SUBMISSION_PLATFORM", "reference_implementation"),
    ("SUBMISSION_ENTRY", "reference_implementation"),
    ("SUBMISSION_POC_NAME", "reference_implementation"),
    ("SUBMISSION_POC_EMAIL", "reference_implementation"),
)


class MLPerfLog:
    """One method for each moment of a run; with enabled=False none of them does anything.

    A training run calls them in the order in which they stand here: init_start() init_stop() run_start() [samples()] submission()
    hyperparameters(), then for each epoch epoch_start(), eval_start() and eval_stop() around each test, epoch_stop(), at the end
    run_stop(). An inference-only run ends after hyperparameters(), as upstream's does.

    enabled  --mlperf-logging, on the one process that reports
    emit     takes a line without its newline and prints it on stdout
    """

    def __init__(self, enabled: bool, emit: Callable[[str], None] = print):
        self.enabled = enabled
        self._stopped = False
        if not enabled:
            return
        try:
            from mlperf_logging.mllog import constants, mllog
        except ImportError as error:
            raise UserError(f"--mlperf-logging needs a package that is not installed ({error}); run: pip install mlperf-logging") from None
        self._keys = constants
        self._emit = emit
        self._file: LineFile | None = None
        self._line = _LastLine()
        logger = logging.Logger("dlrm_xla.mlperf", logging.INFO)  # not in logging's registry: a second run adds no second handler
        logger.addHandler(self._line)
        self._mllog = mllog.MLLogger(logger=logger)

    def init_start(self) -> None:
        self._log("event", "CACHE_CLEAR", True)
        self._log("start", "INIT_START")

    def init_stop(self) -> None:
        self._log("end", "INIT_STOP")

    def run_start(self) -> None:
        """Before the data is touched."""
        self._log("start", "RUN_START")

    def samples(self, num_train: int, num_test: int) -> None:
        """Rows of the two halves. Upstream writes these with --mlperf-bin-loader only."""
        self._log("event", "TRAIN_SAMPLES", num_train)
        self._log("event", "EVAL_SAMPLES", num_test)

    def submission(self, seed: int, batch_size: int, run_dir: Path) -> None:
        """Who submits and with what; from here on the lines are also added to `run_dir`/dlrm.log. Unwritable: UserError."""
        if not self.enabled:
            return
        self._file = LineFile(Path(run_dir) / f"{BENCHMARK}.log")
        for key, value in SUBMISSION:
            self._log("event", key, value)
        self._log("event", "SEED", seed)
        self._log("event", "GLOBAL_BATCH_SIZE", batch_size)

    def hyperparameters(self, learning_rate: float, warmup_steps: int, decay_start_step: int, decay_steps: int) -> None:
        """After the console's "time/loss/accuracy" line. The learning rate comes under two keys: MLPerf's checker looks for the first."""
        self._log("event", "OPT_BASE_LR", learning_rate)
        self._log("event", "OPT_LR_WARMUP_STEPS", warmup_steps)
        self._log("event", "sgd_opt_base_learning_rate", learning_rate)
        self._log("event", "lr_decay_start_steps", decay_start_step)
        self._log("event", "sgd_opt_learning_rate_decay_steps", decay_steps)
        self._log("event", "sgd_opt_learning_rate_decay_poly_power", 2)

    def epoch_start(self, epoch: int) -> None:
        """epoch counts from 0; the events count from 1."""
        self._log("start", "BLOCK_START", metadata={"first_epoch_num": epoch + 1, "epoch_count": 1})
        self._log("start", "EPOCH_START", metadata={"epoch_num": epoch + 1})

    def eval_start(self, epoch: int, batches_done: int, batches_in_epoch: int) -> None:
        """Before the console's "Testing at" line.

        batches_done      of this epoch, 1 or more
        batches_in_epoch  of the whole training half; --num-batches does not shorten it
        """
        self._log("start", "EVAL_START", metadata={"epoch_num": batches_done / batches_in_epoch + epoch + 1})

    def eval_stop(self, epoch: int, batches_done: int, batches_in_epoch: int) -> None:
        """After the test's checkpoint, if one is saved; arguments as for eval_start."""
        self._log("end", "EVAL_STOP", metadata={"epoch_num": batches_done / batches_in_epoch + epoch + 1})

    def epoch_stop(self, epoch: int) -> None:
        self._log("end", "EPOCH_STOP", metadata={"epoch_num": epoch + 1})
        self._log("end", "BLOCK_STOP", metadata={"first_epoch_num": epoch + 1})

    def run_stop(self, success: bool) -> None:
        """success: the AUC threshold was reached. Only the first call counts."""
        if self._stopped:
            return
        self._stopped = True
        self._log("end", "RUN_STOP", metadata={"status": "success" if success else "aborted"})
        self.close()

    def close(self) -> None:
        """Closes dlrm.log; run_stop() does so too."""
        if self.enabled and self._file is not None:
            self._file.close()
            self._file = None

    def _log(self, kind: str, key: str, value=None, metadata: dict | None = None) -> None:
        """kind: "event" | "start" | "end". An upper-case key names one of the package's constants, any other stands for itself."""
        if not self.enabled:
            return
        key = getattr(self._keys, key) if key.isupper() else key
        getattr(self._mllog, kind)(key, value, metadata, stack_offset=CALLER)
        self._emit(self._line.text)
        if self._file is not None:
            self._file.write(self._line.text)


class _LastLine(logging.Handler):
    """Keeps the line. Writing happens outside mllog, which takes an error in a handler for one in the value and logs it a second time."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()
