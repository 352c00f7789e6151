"""A training run: its start, its state, its folder, and what it reports.

setup      images, start, batches and folder, from the flags
resume     the checkpoint of --resume, and its state restored
progress   the state of the run while it trains
state      the same as a checkpoint holds it
folder     lock, checkpoints, samples, results
logfile    metrics.jsonl
board      events for TensorBoard
report     printed lines, and the records that are logged
"""

from run.folder import RunFolder

__all__ = ["RunFolder"]
