"""A run from its first batch to its last: epochs, log lines, tests, checkpoints, early stop, resume."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dlrm_xla import checkpoint
from dlrm_xla.batch import Batch, Dataset
from dlrm_xla.checkpoint_file import Progress
from dlrm_xla.config import Config, OutputConfig
from dlrm_xla.console import Console, Meter
from dlrm_xla.evaluate import predict
from dlrm_xla.metrics import TestMetrics, evaluate_predictions, mlperf_metrics
from dlrm_xla.mlperf import MLPerfLog
from dlrm_xla.specs import UserError
from dlrm_xla.tracking import Tracker
from dlrm_xla.train import NotFiniteLoss, Trainer

CHECK_EVERY = 100  # batches between two looks at the loss on the device, if no log line comes sooner

ReadAhead = Callable[[Iterator[Batch]], Iterator[Batch]]


@dataclass
class Session:
    """What a run needs, put together by run_dlrm.py. `flags`: upstream's and ours, for checkpoints."""

    config: Config
    trainer: Trainer
    data: Dataset
    console: Console
    tracker: Tracker
    mlperf: MLPerfLog
    read_ahead: ReadAhead
    read_ahead_test: ReadAhead
    flags: dict
    progress: Progress
    last_saved: str | None = None
    metrics: TestMetrics | None = None
    stop: bool = False

    def __post_init__(self):
        self.test_freq = self.config.output.test_freq
        if self.config.upstream_compat and self.config.data.source == "trace" and self.test_freq > 0:
            self.console.note("note: --upstream-compat: upstream never tests on trace data, so --test-freq has no effect")
            self.test_freq = 0
        self.progress.num_epochs = self.config.train.num_epochs
        self.progress.num_batches = self.data.train.num_batches
        if self.config.upstream_compat and self.config.data.num_batches > 0:
            # where the data ends sooner, upstream still waits for that last batch: no log line and no test at an epoch's end
            self.progress.num_batches = self.config.data.num_batches
        self.progress.num_test_batches = self.data.test.num_batches
        self.last_saved = self.config.output.load_model or None

    def fit(self) -> None:
        """Trains from `progress` on. A loss that is not finite is a UserError with the batch and the last good checkpoint."""
        first_epoch, first_batch = self.progress.epoch, self.progress.batch
        # upstream leaves out the batches before a checkpoint's in every epoch that follows (and never ends where the epoch is not the first)
        skip_always = self.config.upstream_compat and first_epoch == 0
        num_batches, num_epochs = self.progress.num_batches, self.config.train.num_epochs
        done = min(first_epoch * num_batches + first_batch, num_epochs * num_batches)
        self.meter = Meter(num_epochs * num_batches - done, count_wait=self.config.output.mlperf)
        self.trainer.meter.reset(self.progress.loss_sum, self.progress.loss_rows)
        if 0 < num_epochs * num_batches == done:
            self.console.note(f"nothing is left to train: the checkpoint stands at the end of --nepochs={num_epochs}; raise it to go on")
        self.console.start_bar(num_epochs * num_batches, done)
        try:
            for epoch in range(num_epochs):
                self.mlperf.epoch_start(epoch)
                if epoch >= first_epoch:
                    self.epoch(epoch, first_batch if epoch == first_epoch or skip_always else 0)
                self.mlperf.epoch_stop(epoch)
                if self.stop:
                    break
        except NotFiniteLoss as error:
            saved = "no checkpoint was written (--save-model with --save-every N)"
            if self.last_saved:
                saved = f"the last good checkpoint is {self.last_saved}"
            raise UserError(f"epoch {self.progress.epoch}: {error}; {saved}; a lower --learning-rate or --lr-num-warmup-steps may help") from None
        finally:
            self.console.close_bar()
        reached = self.config.output.auc_threshold > 0 and self.progress.best_auc > self.config.output.auc_threshold
        self.mlperf.run_stop(reached)

    def epoch(self, epoch: int, first_batch: int) -> None:
        output, progress, trainer = self.config.output, self.progress, self.trainer
        num_batches = progress.num_batches
        progress.epoch, progress.batch = epoch, first_batch
        trainer.meter.start_epoch(first_batch)
        batches = self.read_ahead(self.data.train.batches(first_batch, epoch))
        try:
            for index in range(first_batch, num_batches):
                self.meter.waiting()
                batch = next(batches, None)
                if batch is None:
                    break
                self.meter.arrived()
                trainer.observe(batch)
                trainer.step(trainer.backend.to_device(batch), index, last_of_epoch=index + 1 == num_batches)
                self.meter.finished(batch.num_counted)
                done = progress.batch = index + 1
                self.console.advance()
                test = self.test_freq > 0 and (done % self.test_freq == 0 or done == num_batches)
                if test or done % output.print_freq == 0 or done == num_batches:
                    self.log(epoch, done)
                elif done % CHECK_EVERY == 0:
                    trainer.meter.check()
                if test:
                    with self.meter.paused():
                        self.test(epoch, done)
                    if self.stop:
                        return
                if output.save_every and (done % output.save_every == 0 or done == num_batches):
                    with self.meter.paused():
                        self.save(Path(output.save_model))
        finally:
            batches.close()
        trainer.meter.check()
        if progress.batch == num_batches and epoch + 1 < self.config.train.num_epochs:
            trainer.reorganize(epoch)
        if output.xla_metrics:
            self.console.line(trainer.backend.metrics_report())

    def log(self, epoch: int, done: int) -> None:
        """The training line, and the mean loss starts anew."""
        trainer, progress = self.trainer, self.progress
        loss = trainer.meter.mean()  # waits for the device, so the times below are of finished work
        interval = self.meter.read()
        progress.train_loss = loss
        compiles, fallbacks = trainer.backend.compiles(), trainer.backend.fallbacks()
        self.console.train(done, progress.num_batches, epoch, loss, interval, compiles)
        step = progress.num_batches * epoch + done
        self.tracker.train(step, epoch, loss, interval, compiles, None if compiles is None else sum(fallbacks.values()))
        trainer.meter.reset()

    def test(self, epoch: int, done: int) -> None:
        """A pass over the test half, its line, a checkpoint where it is the best so far, early stop."""
        progress, output = self.progress, self.config.output
        batches_in_epoch = -(-self.data.train.num_rows // self.data.train.batch_size)
        self.mlperf.eval_start(epoch, done, batches_in_epoch)
        self.console.testing(done, progress.num_batches, epoch)
        best = self.evaluate(progress.num_batches * epoch + done, epoch)
        if best and output.save_model:
            self.save_best()
        self.mlperf.eval_stop(epoch, done, batches_in_epoch)
        if output.xla_metrics:
            self.console.line(self.trainer.backend.metrics_report())
        if output.mlperf and 0 < output.accuracy_threshold < progress.best_accuracy:
            self.console.threshold_reached("accuracy", output.accuracy_threshold)
            self.stop = True
        if output.mlperf and 0 < output.auc_threshold < progress.best_auc:
            self.console.threshold_reached("auc", output.auc_threshold)
            self.stop = True

    def evaluate(self, step: int, epoch: int | None, forward=None) -> bool:
        """Tests, prints and records; returns whether this test is the best so far. Upstream forgets its best: there a test is compared with
        the checkpoint that was loaded, or with nothing."""
        progress, compat = self.progress, self.config.upstream_compat
        batches = self.read_ahead_test(self.data.test.batches())
        predictions, labels = predict(forward or self.trainer.forward, batches, self.trainer.backend)
        if epoch is not None and not math.isfinite(predictions.sum()):
            raise NotFiniteLoss(progress.batch, "a prediction in the test after batch {batch}")
        self.metrics = metrics = evaluate_predictions(predictions, labels)
        figures = mlperf_metrics(predictions, labels) if self.config.output.mlperf else None
        accuracy, auc = metrics.accuracy, metrics.auc if figures is None else figures["roc_auc"]
        best_accuracy, best_auc = progress.best_accuracy, progress.best_auc
        best = accuracy > best_accuracy if figures is None else auc > best_auc
        progress.test_accuracy, progress.test_auc = accuracy, auc
        shown_accuracy, shown_auc = max(best_accuracy, accuracy), max(best_auc, auc or 0.0)
        if not compat:
            progress.best_accuracy, progress.best_auc = shown_accuracy, shown_auc
        if figures is None:
            self.console.accuracy(accuracy, shown_accuracy)
        else:
            self.console.mlperf(figures, shown_auc, best_accuracy if compat else shown_accuracy)
        self.console.test_figures(metrics)
        self.tracker.test(step, epoch, metrics, figures)
        if epoch is not None and metrics.auc is not None and abs(metrics.auc - 0.5) < 0.005 and progress.batch == progress.num_batches:
            self.console.note(
                f"warning: after epoch {epoch} the test AUC is {metrics.auc:.4f}, as good as guessing; check that ids and labels belong together, "
                "and try --optimizer=adagrad or another --learning-rate"
            )
        return best

    def save_best(self) -> None:
        """Upstream's checkpoint: the best test so far."""
        self.save(save_paths(self.config.output)[-1])

    def save(self, path: Path) -> None:
        self.trainer.meter.check()
        self.progress.loss_sum, self.progress.loss_rows = self.trainer.meter.state()
        self.progress.updates = self.trainer.updates
        self.console.saving(str(path))
        checkpoint.save(path, self.trainer, self.progress, self.flags)
        self.last_saved = f"{path} (epoch {self.progress.epoch}, batch {self.progress.batch})"

    def final_figures(self) -> dict:
        """The run's last figures by name, for its records."""
        figures = {"train_loss": self.progress.train_loss, "best_accuracy": self.progress.best_accuracy, "best_auc": self.progress.best_auc}
        if self.metrics is not None:
            figures.update({f"test_{name}": value for name, value in asdict(self.metrics).items()})
        return figures

    def print_summary(self, paths: dict[str, Path]) -> None:
        """The last lines of a run: figures of the last test, and where everything lies."""
        line, metrics = self.console.line, self.metrics
        if metrics is not None:
            auc = "" if metrics.auc is None else f"test AUC {metrics.auc:.4f}, "
            line(f"{auc}log loss {metrics.log_loss:.4f}, accuracy {metrics.accuracy * 100:.3f} % on {metrics.num_rows:,} rows")
            if metrics.auc is not None and self.data.bayes_auc is not None:
                share = (metrics.auc - 0.5) / (self.data.bayes_auc - 0.5)
                line(f"the best possible (Bayes) AUC of this generated data is {self.data.bayes_auc:.4f}: {share:.1%} of the way from 0.5 reached")
        line(f"TensorBoard: tensorboard --logdir {paths['tensorboard']}")
        line(f"run folder: {paths['run']} (config.yaml, environment.json, metrics.jsonl); picture: {paths['summary']}")


def save_paths(output: OutputConfig) -> tuple[Path, ...]:
    """Where a run saves: --save-model, and with --save-every, which keeps the newest state there, the best test's beside it."""
    path = Path(output.save_model)
    if output.save_every and output.test_freq > 0:
        return path, path.with_name(f"{path.stem}.best{path.suffix}")
    return (path,)
