"""The folder of a training run: what is written there, and how a run is resumed."""

from run.folder import RunFolder

__all__ = ["RunFolder"]
