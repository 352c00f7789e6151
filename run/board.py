"""TensorBoard: the records of metrics.jsonl and the pictures of samples, as events (--tensorboard).

train/loss train/lr train/images_per_s ...      every log interval
train/codes_in_batch/1 ...                      codes used, by stage
val/psnr val/ssim val/stages/1/perplexity ...   every evaluation
samples                                         originals over reconstructions
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from torch import Tensor

# Keys that are not drawn: constants of the run, and values that are not numbers.
LEFT_OUT = {"step", "images", "image_size", "bits", "f", "bpp", "floors"}
LEFT_OUT |= {"stage", "codebook_size", "tokens"}
EVENTS = "events.out.tfevents.*"  # the names that TensorBoard gives its files


class Board:
    """The event files in a run folder, which TensorBoard reads as one run.

    Args:
        folder: the run folder.
        first_step: TensorBoard ignores events of earlier files from this step on, which the run
            repeats; None: there are no earlier files.
    """

    def __init__(self, folder: Path, first_step: int | None) -> None:
        self.folder, self.first_step = folder, first_step

    @cached_property
    def writer(self):
        """The writer, made at the first event: loading processes fork before its thread starts."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder), purge_step=self.first_step)

    def add(self, record: dict) -> None:
        """Add the numbers of a record of metrics.jsonl."""
        for name, value in scalars({**record, "kind": None}):
            self.writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])
        self.writer.flush()  # to disk, before the run may be killed

    def add_picture(self, picture: Tensor, step: int) -> None:
        """Add the picture of samples, (3, H, W) in [0, 1]."""
        self.writer.add_image("samples", picture, step)
        self.writer.flush()

    def close(self) -> None:
        """Close the file, if there is one."""
        if "writer" in vars(self):
            self.writer.close()

    @staticmethod
    def remove(folder: Path) -> None:
        """Delete the event files of a run that is replaced."""
        for path in folder.glob(EVENTS):
            path.unlink()


def scalars(record: dict) -> Iterator[tuple[str, float]]:
    """(name, value) of every number in a record.

    A number in a list or dictionary is named name/key; list entries are numbered from 1, as stages
    are.
    """
    for name, value in record.items():
        if name in LEFT_OUT:
            continue
        if isinstance(value, list):
            value = {str(i): entry for i, entry in enumerate(value, start=1)}
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", x) for key, x in scalars(value))
        elif isinstance(value, int | float):
            yield name, value
