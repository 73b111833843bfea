"""Checkpoints of a run, and their exports, around its iterations."""

import time
from pathlib import Path

from training.callbacks import Callback, Step, is_due
from training.checkpoint_folders import remove_old
from training.checkpoint_saving import Saver, Sealed
from training.hf_exports import Export, HfExports
from training.setup import Run


class Checkpoints(Callback):
    """Saves at intervals, at the end and before the run stops; one that is due waits for the last one."""

    takes_long = True

    def __init__(self) -> None:
        self.saver = Saver()
        # on the first rank, if asked for
        self.exports: HfExports | None = None
        self.failed: list[Export] = []

    def before_training(self, run: Run) -> None:
        settings = run.config.checkpoint
        if settings.save is None:
            return
        self.saver.prepare(run)
        if run.is_first_rank and settings.export_hf is not None:
            self.exports = HfExports(run.config)
            self.exports.find_missed()

    def after_step(self, run: Run, step: Step) -> None:
        if run.config.checkpoint.save is None:
            return
        started = time.monotonic()
        worked = self._seal(run, self.saver.poll(run, self._in_use))
        if run.should_stop or is_due(run, run.config.checkpoint.save_interval):
            self._save(run)
            worked = True
        if worked:
            run.metrics.write(run.iteration, {"checkpoint_seconds": time.monotonic() - started})
        if self.exports is not None:
            self._report(run, self.exports.poll())

    def after_training(self, run: Run) -> None:
        self._seal(run, self.saver.finish(run, self._in_use))
        self.saver.wait_for_removal()
        if self.exports is None:
            return
        if run.should_stop:
            self.exports.stop()
        else:
            self._report(run, self.exports.finish())
            # those that stayed for their export only
            remove_old(Path(str(run.config.checkpoint.save)), run.config.checkpoint.most_recent_k).join()
        for export in self.failed:
            print(f"iteration {export.iteration} was not exported: {export.error}", flush=True)

    def after_failure(self, run: Run) -> None:
        self.saver.drop()
        if self.exports is not None:
            self.exports.stop()

    @property
    def _in_use(self) -> set[Path]:
        return self.exports.in_use if self.exports is not None else set()

    def _save(self, run: Run) -> None:
        self._seal(run, self.saver.finish(run, self._in_use))
        self.saver.begin(run)
        is_last = run.should_stop or run.iteration == run.config.train.train_iters
        if is_last or not run.config.checkpoint.async_save:
            self._seal(run, self.saver.finish(run, self._in_use))

    def _seal(self, run: Run, sealed: Sealed | None) -> bool:
        """Say that a checkpoint is complete, and export it if it is time."""
        if sealed is None:
            return False
        if run.is_first_rank:
            print(f"iteration {sealed.iteration}: saved {sealed.folder}", flush=True)
        if run.config.checkpoint.async_save:
            run.metrics.write(sealed.iteration, {"checkpoint_written_seconds": sealed.seconds})
        if self.exports is not None:
            self.exports.add(sealed.folder)
        return True

    def _report(self, run: Run, exports: list[Export]) -> None:
        for export in exports:
            if export.error is not None:
                self.failed.append(export)
            done = f"exported {export.folder}" if export.error is None else f"export failed: {export.error}"
            print(f"iteration {export.iteration}: {done}", flush=True)
            key = "export_error" if export.error is not None else "exported"
            run.metrics.write(export.iteration, {key: export.error or str(export.folder)})
