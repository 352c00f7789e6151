"""A run folder: its lock, log, checkpoints, samples and results.

    args.json environment.json   flags; command, commit, versions, hardware
    metrics.jsonl                a line for every log interval and every evaluation
    step_0000500.pt last.pt      the newest checkpoints, and the last one by a second name
    best.pt                      the checkpoint of the highest validation PSNR
    samples/step_0000500.png     validation images over their reconstructions
    results.json results.txt     the final evaluation
    events.out.tfevents.*        with --tensorboard: log and samples for TensorBoard
    lock                         held by the process that trains here

All methods but `explained_errors` run in the main process alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from checkpoint import LAST, Damaged, NotFinite, load_checkpoint, save_checkpoint
from files import (
    TEMPORARY,
    is_of_a_file,
    locked,
    make_folder,
    parse_json,
    remove_leftovers,
    unwritable,
    write_json,
    write_whole,
)
from run import logfile
from run.board import EVENTS, Board

SAMPLES = 8  # validation images in a picture of samples
STEP_FILE = re.compile(r"step_(\d{7,})\.pt")
RESULTS = ("results.json", "results.txt")
EARLIER = "results_" + 7 * "[0-9]"  # results of a run that was later continued
OUTCOME = (*RESULTS, f"{EARLIER}.json", f"{EARLIER}.txt", "samples/step_*.png")
# A new run removes the files of REPLACED and the checkpoints, and removes or writes all of WRITTEN.
REPLACED = (LAST, "best.pt", *OUTCOME)
WRITTEN = ("*.pt", "metrics.jsonl", "environment.json", EVENTS, *OUTCOME)


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; made by `create`.
        step: the step that the run is at, for error messages.
    """

    def __init__(self, path: str | Path, step: int = 0):
        self.path = Path(path)
        self.log_path = self.path / "metrics.jsonl"
        self.step = step
        self.board: Board | None = None  # with --tensorboard

    # -----------------------------------------------------------------------------------
    # Begin and end
    # -----------------------------------------------------------------------------------
    @classmethod
    def create(
        cls, save: str | None, default_name: str, *, overwrite: bool, resuming: bool
    ) -> RunFolder:
        """Make the folder of a new run.

        Args:
            save: the folder; None: `default_name` under runs/, with a number appended if that
                exists.
            overwrite: whether the folder may hold another run, which `begin` then removes.
            resuming: whether the folder may hold a run that ended before its first checkpoint.

        Raises:
            ValueError: the folder holds another run, one whose checkpoints are gone, or other
                files, is held by another process, or cannot be made.
        """
        folder = Path(save or Path("runs", default_name))
        if save is None and not resuming:
            others = (Path("runs", f"{default_name}-{i}") for i in range(2, 10_000))
            folder = next(path for path in (folder, *others) if not path.exists())
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--save {folder} is a file: give a folder")
        run = cls(folder)
        a_run = (folder / "args.json").exists()
        if a_run and not overwrite and not resuming:
            with run.locked():  # a run in progress is refused here, without advice to go on with it
                raise ValueError(
                    f"{folder} already holds a run: give another --save, --resume it, or "
                    "--overwrite it"
                )
        files = (path for pattern in WRITTEN for path in sorted(folder.glob(pattern)))
        if not a_run and (other := next(files, None)):
            raise ValueError(
                f"{folder} holds {other.name} but no args.json, so it is not a run folder: give "
                "another --save"
            )
        if a_run and not overwrite and run._has_outcome():
            raise ValueError(
                f"{folder} holds results, pictures or evaluations of a run whose checkpoints are "
                "gone: give another --save, or --overwrite it"
            )
        make_folder(folder / "samples", "give another --save")
        return run

    def _has_outcome(self) -> bool:
        """Whether there is what a run leaves only after its first checkpoint."""
        files = any(path for pattern in OUTCOME for path in self.path.glob(pattern))
        return files or any(record["kind"] == "val" for record in self.read_log())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder until the end of `with`, or until this process ends in any way.

        Raises:
            ValueError: another process holds it.
        """
        held = f"another process is training in {self.path}: wait for it, or give another --save"
        with locked(self.path / "lock", held):
            try:
                yield
            finally:
                if self.board:
                    self.board.close()

    def begin(
        self,
        flags: dict,
        environment: dict,
        *,
        overwrite: bool = False,
        tensorboard: bool = False,
    ) -> None:
        """Begin a new run: record flags and environment, then remove an overwritten run.

        The new files are written first, so that a full disk leaves the old run as it was.

        Args:
            flags: all of them, by name.
            environment: the result of `util.environment`.
            overwrite: whether the folder may hold checkpoints of another run.
            tensorboard: whether to write events for TensorBoard.

        Raises:
            ValueError: there are checkpoints, and `overwrite` is not set.
        """
        if not overwrite:
            self._refuse_other_checkpoints(seen=())
        self._record_start(flags, environment)
        logfile.replace(self.log_path, [])
        remove_leftovers(self.path)
        Board.remove(self.path)
        old = [path for pattern in REPLACED for path in self.path.glob(pattern)]
        for path in [*old, *(path for _, path in self.checkpoints())]:
            path.unlink(missing_ok=True)
        if tensorboard:
            self.board = Board(self.path, first_step=None)

    def resume(
        self,
        flags: dict,
        environment: dict,
        *,
        checkpoint: Path,
        step: int,
        seen: Collection[str],
        steps: int,
        keep: int = 2,
        overwrite: bool = False,
        tensorboard: bool = False,
    ) -> None:
        """Continue a run after `step`: record flags and environment, discard what is newer.

        A run that is killed here at any moment can be continued by the same command. In particular,
        last.pt, which may be one of the newer checkpoints, is replaced before they are deleted.

        Args:
            flags: all of them, by name.
            environment: the result of `util.environment`.
            checkpoint: the file of the checkpoint of `step`.
            step: how many steps are done.
            seen: names of the checkpoints that were there when `checkpoint` was chosen.
            steps: the last step of the run.
            keep: how many checkpoints are kept.
            overwrite: whether checkpoints that are not in `seen` may be deleted.
            tensorboard: whether to write events for TensorBoard.

        Raises:
            ValueError: there are checkpoints that are not in `seen`, and `overwrite` is not set.
        """
        if not overwrite:
            self._refuse_other_checkpoints(seen)
        self._record_start(flags, environment)
        at_end = step == steps  # only the evaluation is repeated
        logfile.replace(self.log_path, logfile.up_to(self.read_log(), step, evaluated=not at_end))
        self._link(checkpoint, LAST)
        self._discard_after(step)
        if not at_end:
            self._set_results_aside()
        remove_leftovers(self.path)
        if STEP_FILE.fullmatch(checkpoint.name):
            self._name_newest(keep)  # deletes what a kill within `save` has left
        if tensorboard:
            # Events from `first` on are void. At the end, those of the last step are written again.
            first = step if at_end else step + 1
            self.board = Board(self.path, first)
            for record in self.read_log():
                if record["step"] >= first:
                    self.board.add(record)

    def _refuse_other_checkpoints(self, seen: Collection[str]) -> None:
        """Raises ValueError if there are checkpoints other than those that were seen."""
        new = [path for _, path in self.checkpoints() if path.name not in seen]
        if new:
            raise ValueError(
                f"another process has saved {new[-1]} just now: give the same command again"
            )

    def _record_start(self, flags: dict, environment: dict) -> None:
        (self.path / "samples").mkdir(exist_ok=True)
        write_json(self.path / "args.json", flags)
        write_json(self.path / "environment.json", environment)

    def _discard_after(self, step: int) -> None:
        """Delete the checkpoints after `step`, and best.pt if it is one of them."""
        newer = [path for number, path in self.checkpoints() if number > step]
        best = self.path / "best.pt"
        with contextlib.suppress(ValueError):  # there is none, or it is damaged
            if load_checkpoint(best)["step"] > step:
                newer.append(best)
        for path in newer:
            path.unlink()
        if newer:
            names = ", ".join(path.name for path in newer)
            print(f"discarded, as they are after step {step}: {names}", flush=True)

    def _set_results_aside(self) -> None:
        """Rename the results of a run that had ended: results_0012500.json, by its steps."""
        try:
            steps = parse_json((self.path / "results.json").read_bytes())["steps"]
        except (OSError, ValueError, LookupError, TypeError):
            steps = 0
        if type(steps) is not int or not 0 <= steps < 10**7:  # a damaged file
            steps = 0
        for path in map(self.path.joinpath, RESULTS):
            if path.exists():
                path.replace(path.with_stem(f"{path.stem}_{steps:07}"))

    @contextlib.contextmanager
    def explained_errors(self, lr: float) -> Iterator[None]:
        """Turn the errors of numbers that diverge, and of a full disk, into one line.

        Raises:
            ValueError: says what happened, and what to do.
        """
        try:
            yield
        except NotFinite as error:
            good = [path for number, path in self.checkpoints() if number < self.step]
            checkpoint = f"last good checkpoint: {good[-1]}" if good else "no checkpoint yet"
            raise ValueError(
                f"step {self.step}: {error}: begin again with a lower --lr (now {lr:g}) or "
                f"--clip-grad; {checkpoint}"
            ) from error
        except OSError as error:
            if not is_of_a_file(error):
                raise
            place = error.filename or f"standard output, or a file in {self.path},"
            raise ValueError(unwritable(place, error)) from error

    # -----------------------------------------------------------------------------------
    # Log
    # -----------------------------------------------------------------------------------
    def log(self, record: dict) -> None:
        """Append a record to metrics.jsonl, and to TensorBoard's events."""
        logfile.append(self.log_path, record)
        if self.board:
            self.board.add(record)

    def read_log(self) -> list[dict]:
        """The records of metrics.jsonl; damaged lines are skipped with a warning."""
        return logfile.read(self.log_path)

    def validations(self, images: str) -> list[dict]:
        """Step and metrics of each evaluation of a validation set, see `logfile.validations`."""
        return logfile.validations(self.read_log(), images)

    # -----------------------------------------------------------------------------------
    # Checkpoints
    # -----------------------------------------------------------------------------------
    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, file) of every step_*.pt, the newest last."""
        named = [(STEP_FILE.fullmatch(path.name), path) for path in self.path.glob("step_*.pt")]
        return sorted((int(match[1]), path) for match, path in named if match)

    def save(self, state: dict, keep: int) -> None:
        """Write step_*.pt, name it last.pt as well, then delete all but the newest `keep`."""
        save_checkpoint(self.path / f"step_{state['step']:07d}.pt", state)
        self._name_newest(keep)

    def _name_newest(self, keep: int) -> None:
        """Name the newest checkpoint last.pt, then delete all but the newest `keep`."""
        found = [path for _, path in self.checkpoints()]
        self._link(found[-1], LAST)
        for old in found[:-keep]:
            old.unlink()

    def discard(self, step: int) -> None:
        """Delete the checkpoint of `step`, whose evaluation showed that the model has diverged."""
        (self.path / f"step_{step:07d}.pt").unlink(missing_ok=True)
        (self.path / LAST).unlink(missing_ok=True)
        for _, newest in self.checkpoints()[-1:]:
            self._link(newest, LAST)

    def mark_best(self, step: int) -> None:
        """Give the checkpoint of `step` the second name best.pt."""
        path = self.path / f"step_{step:07d}.pt"
        self._link(path if path.exists() else self.path / LAST, "best.pt")

    def _link(self, path: Path, name: str) -> None:
        """Give a file a second name, which at every moment names the old file or the new one."""
        link = self.path / f".{name}{TEMPORARY}"
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)
        os.replace(link, self.path / name)
        link.unlink(missing_ok=True)  # renaming a file onto itself does nothing

    def newest_checkpoint(self) -> tuple[Path, dict] | None:
        """The newest whole checkpoint; warns about damaged ones. best.pt is the last resort.

        Raises:
            ValueError: all are damaged, or one that is not damaged cannot be read.
        """
        steps = [path for _, path in reversed(self.checkpoints())]
        damaged = []
        for path in [*steps, self.path / LAST, self.path / "best.pt"]:
            if path.is_file():
                try:
                    state = load_checkpoint(path)
                except Damaged as error:
                    damaged.append(path.name)
                    print(f"skipped: {error}", flush=True)
                    continue
                if path.name == "best.pt":
                    print(f"all newer checkpoints are damaged: continuing from {path}", flush=True)
                return path, state
        if damaged:
            raise ValueError(
                f"{self.path}: all checkpoints are damaged ({', '.join(damaged)}): give another "
                "--save, or --overwrite without --resume to begin again"
            )
        return None

    # -----------------------------------------------------------------------------------
    # Pictures and results
    # -----------------------------------------------------------------------------------
    def draw_samples(self, model, images, device: torch.device, step: int) -> None:
        """Write a PNG of the first validation images, originals over reconstructions."""
        from torchvision.utils import make_grid, save_image  # torchvision takes seconds to import

        readable = (image for i in range(len(images)) if (image := images[i]) is not None)
        originals = torch.stack([*itertools.islice(readable, SAMPLES)]).float() / 255
        decoded = model.decode(*model.tokens(originals.to(device)))
        pictures = torch.cat([originals, decoded.float().cpu().clamp(0, 1)])
        picture = make_grid(pictures, nrow=len(originals))
        path = self.path / "samples" / f"step_{step:07d}.png"
        write_whole(path, lambda file: save_image(picture, file, format="png"))
        if self.board:
            self.board.add_picture(picture, step)

    def write_results(self, results: dict, text: str) -> None:
        """Write results.json, and the table `text` as results.txt."""
        write_whole(self.path / "results.txt", lambda file: file.write(f"{text}\n".encode()))
        write_json(self.path / "results.json", results)
