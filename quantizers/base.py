"""The contract that every quantizer keeps.

z (B, C, *positions) ──forward──> quantized (B, C, *positions), indices (B, *positions[, stages])
                                                                    │
quantized (in evaluation mode bit for bit)  <──indices_to_codes─────┘
"""

from __future__ import annotations

import math
from argparse import Namespace
from contextlib import nullcontext
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .functional import HALF_PRECISION, output_dtype, traced


class Quantized(NamedTuple):
    """What a quantizer makes of a latent; names for what `forward` returns.

    `out = Quantized(*quantizer(z))` gives these names to the values of `forward`.

    Attributes:
        codes: the quantized latent (B, C, *positions).
        indices: int64, (B, *positions), with a last axis of stages for a residual quantizer.
        loss: the quantizer's own loss (a scalar), None where it has none.
        statistics: side information that the decoder needs beyond the indices, None if there is
            none.
    """

    codes: Tensor
    indices: Tensor
    loss: Tensor | None = None
    statistics: Tensor | None = None


class Quantizer(nn.Module):
    """Base class: what a model, a loss or a metric may ask of any quantizer.

    Attributes:
        dim: number of channels of `z`.
        codebook_sizes: number of codes of each stage (one entry for a single-stage quantizer).
        stage_axis: whether `indices` ends with an axis of stages. A residual FSQ has it with one
            stage too.
        levels: levels of the channels that make up an index, lowest digit first; None where an
            index is one number.
        side_bits: bits of side information per image, beyond the indices (0 unless stated).
        group: neighbours on the last axis that are quantized together, of which its length must be
            a multiple (1 but for `Pairs`).
        name: a short name for folders and tables, such as `rfsq-2x2048-layernorm`.
        flags: the flags of the command line that the quantizer reads: their names in the parsed
            arguments, each with the constructor argument that takes its value.

    `forward(z)` takes `(B, dim, *positions)` with any number of position axes and returns
    `(quantized, indices)`, followed by `loss` if the quantizer has a loss of its own, and by
    `statistics` if it has side information; `Quantized` names them. `indices` is int64, and in
    range even where `z` is NaN or infinite.

    Everything is computed in float32 with autocast off, and parameters and buffers are float32,
    whatever the enclosing model is cast to. `quantized` has the dtype of `z`, and is float32 under
    autocast; values in float64 are those of float32.

    `indices_to_codes(indices)` decodes indices of any integer type, to float32; quantizers with
    side information also take `statistics`. The codes of an RFSQ have a gradient for its
    parameters: decode under `torch.no_grad()` where none is wanted.

    A subclass defines `quantize`, which `forward` calls, and `dequantize`, which
    `indices_to_codes` calls. Its buffers are state that training moves, such as running
    statistics; constants are no buffers.
    """

    flags: ClassVar[dict[str, str]] = {}
    _frozen: bool = False
    _mode_asked: bool = True  # of `train`, also while it has no effect
    _constants: tuple[Tensor, ...] = ()  # on the CPU: see `constants`
    _copies: tuple[Tensor, ...] = ()  # on another device
    dim: int
    codebook_sizes: list[int]
    name: str
    stage_axis: bool = False
    levels: list[int] | None = None
    side_bits: float = 0.0
    group: int = 1

    @classmethod
    def from_args(cls, args: Namespace) -> Quantizer:
        """Build the quantizer from parsed command-line arguments, as `flags` says.

        Raises:
            ValueError: for values that the constructor refuses.
        """
        return cls(**{name: getattr(args, flag) for flag, name in cls.flags.items()})

    def read_flags(self) -> list[str]:
        """The flags of the command line that this quantizer reads."""
        return list(self.flags)

    def flag_values(self) -> dict:
        """The values in use of flags whose default depends on other flags."""
        return {"levels": self.levels} if "levels" in self.flags else {}

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        """Quantize `z` (B, dim, *positions): see the class for what is returned.

        Raises:
            ValueError: for an input that is not of this shape, or empty.
            RuntimeError: in a backward pass, while training moves buffers.
        """
        self._check_input(z)
        self._check_not_recomputed()
        dtype = output_dtype(z)
        # There is no autocast for shapes alone.
        no_autocast = nullcontext() if z.is_meta else torch.autocast(z.device.type, enabled=False)
        with no_autocast:
            out = self.quantize(z.float())
        values = out.codes.to(dtype), out.indices
        if out.statistics is not None:
            loss = z.new_zeros((), dtype=torch.float32) if out.loss is None else out.loss
            return *values, loss, out.statistics
        return values if out.loss is None else (*values, out.loss)

    def quantize(self, z: Tensor) -> Quantized:
        """Quantize a checked `z` (B, dim, *positions), float32 and outside autocast."""
        raise NotImplementedError

    def indices_to_codes(self, indices: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Decode `indices`, as `forward` returns them, or their first stages.

        Args:
            indices: (B, *positions[, k]), of any integer type.
            statistics: side information, as `forward` returns it; required by a quantizer with
                `side_bits`, refused by others.

        Returns:
            Codes (B, dim, *positions), float32.

        Raises:
            ValueError: for indices out of range, or statistics that do not fit.
        """
        indices = self._check_indices(indices)
        if statistics is None:
            return self.dequantize(indices)
        if not self.side_bits:
            raise ValueError(f"{self.name} decodes from indices alone, but statistics were given")
        return self.dequantize(indices, statistics)

    def dequantize(self, indices: Tensor, *statistics: Tensor) -> Tensor:
        """Decode checked int64 indices: see `indices_to_codes`."""
        raise NotImplementedError

    def codes_after_each_stage(
        self, indices: Tensor, statistics: Tensor | None = None
    ) -> list[Tensor]:
        """Codes of the first 1, 2, ... stages of `indices`, each (B, dim, *positions).

        Their differences are the codes of each stage. `statistics` as for `indices_to_codes`.
        """
        if not self.stage_axis:
            return [self.indices_to_codes(indices, statistics)]
        stages = range(1, self._check_indices(indices).shape[-1] + 1)
        return [self.indices_to_codes(indices[..., :k], statistics) for k in stages]

    def stage_input(self, stage: int, z: Tensor, quantized: Tensor | None = None) -> Tensor | None:
        """Input of the FSQ of a stage, (B, dim, *positions); None for a quantizer without an FSQ.

        For analysis of a trained quantizer.

        Args:
            stage: its number, from 0.
            z: the latent (B, dim, *positions).
            quantized: codes of the stages before it, together; None for the first stage.
        """
        return None

    def freeze(self) -> Quantizer:
        """Fix what stored indices decode to: evaluation mode and no gradient for parameters.

        `.train()` of the enclosing model changes neither. Gradients still go to `z`. Freeze before
        DistributedDataParallel wraps the model, since it expects the same parameters all the time.
        """
        asked = self._mode_asked if self._frozen else self.training
        self._set_frozen(True)
        self.zero_grad()  # an optimiser moves whatever has a gradient
        self.requires_grad_(False).eval()
        self._mode_asked = asked
        return self

    def unfreeze(self) -> Quantizer:
        """Undo `freeze`: parameters have gradients, and the mode is the one last asked for.

        It was asked for by `.train()` or `.eval()`. What sets `training` itself is not seen.
        """
        self._set_frozen(False)
        return self.requires_grad_(True).train(self._mode_asked)

    def _set_frozen(self, frozen: bool) -> None:
        for part in self.modules():
            if isinstance(part, Quantizer):
                part._frozen = frozen

    def train(self, mode: bool = True) -> Quantizer:
        """As of any module, but a frozen quantizer stays in evaluation mode until `unfreeze`."""
        self._mode_asked = mode
        return super().train(mode and not self._frozen)

    @property
    def stages(self) -> int:
        """Number of stages: 1 unless the quantizer is residual."""
        return len(self.codebook_sizes)

    @property
    def bits(self) -> float:
        """Bits per latent position: log2 of the number of codes, summed over stages."""
        return float(sum(math.log2(size) for size in self.codebook_sizes))

    def bits_with_side_information(self, positions: int, stages: int | None = None) -> float:
        """Bits per position of the first `stages` (default: all), side information included.

        Args:
            positions: latent positions of an image, which share its side information.
            stages: how many, with the side information of these alone.
        """
        stages = self.stages if stages is None else stages
        index_bits = sum(math.log2(size) for size in self.codebook_sizes[:stages])
        return index_bits + self.side_bits * stages / self.stages / positions

    def extra_repr(self) -> str:
        return f"{self.name}, dim={self.dim}, bits={self.bits:g}"

    def constants(self, device: torch.device) -> tuple[Tensor, ...]:
        """`_constants`, the tensors that follow from the arguments alone, on `device`.

        They are not buffers, because a model that is made on the meta device and filled from a
        checkpoint gets no values for a buffer that is not in the checkpoint.
        """
        if device.type == "cpu":
            return self._constants
        if self._copies and self._copies[0].device == device:
            return self._copies
        copies = tuple(x.to(device) for x in self._constants)
        if not (traced() or torch.is_inference_mode_enabled()):
            self._copies = copies
        return copies

    def __getstate__(self) -> dict:
        # Not as tensors, which `torch.load(map_location=...)` would take off the CPU.
        constants = [(x.tolist(), x.dtype) for x in self._constants]
        return {**self.__dict__, "_constants": constants}

    def __setstate__(self, state: dict) -> None:
        constants = (torch.tensor(x, dtype=dtype, device="cpu") for x, dtype in state["_constants"])
        super().__setstate__({**state, "_constants": tuple(constants)})

    def _apply(self, fn, recurse=True):
        # `.half()` or `.bfloat16()` of the enclosing model must not round codebooks and statistics:
        # tensors change device, but never precision.
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.dtype != torch.float32:
                return tensor.to(moved.device, torch.float32)
            return moved

        super()._apply(keep_float32, recurse)
        if self._constants:
            # Copied once, here: a cast that names no device leaves them where they are.
            before = self._copies[0].device if self._copies else torch.device("cpu")
            self._copies = ()
            self.constants(fn(torch.empty(0, device=before)).device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # `state_dict` is a copy that belongs to the caller, `load_state_dict`.
        for key, value in state_dict.items():
            floats = isinstance(value, Tensor) and value.is_floating_point()
            if floats and key.startswith(prefix):
                state_dict[key] = value.float()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_state(self) -> None:
        for key, value in (*self._parameters.items(), *self._buffers.items()):
            if value is not None and value.dtype in HALF_PRECISION:
                raise ValueError(
                    f"{key} of {self.name} must be float32, not {value.dtype}: call .float() of "
                    "the quantizer, and leave it out of mixed precision of parameters (with FSDP: "
                    "fully_shard of the quantizer by itself, before that of the model)"
                )

    def _check_input(self, z: Tensor) -> None:
        self._check_state()
        if not isinstance(z, Tensor) or z.is_complex():
            given = z.dtype if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"{self.name} quantizes a tensor of real numbers, not {given}")
        if z.dim() < 2 or z.shape[1] != self.dim:
            given = z.shape[1] if z.dim() >= 2 else "no"
            raise ValueError(
                f"{self.name} quantizes {self.dim} channels on axis 1, but the input has {given} "
                f"(shape {tuple(z.shape)}): give (batch, {self.dim}, *positions)"
            )
        if not traced() and not z.numel():
            raise ValueError(
                f"{self.name} was given an empty input (shape {tuple(z.shape)}): give at least one "
                "item with at least one position"
            )

    def _check_not_recomputed(self) -> None:
        if not self.training or traced() or torch._C._current_graph_task_id() == -1:
            return  # no backward pass
        if next(self.buffers(), None) is not None:
            raise RuntimeError(
                f"{self.name} was called in a backward pass, as gradient checkpointing does, which "
                "would move its statistics or codebook twice and give wrong gradients: leave the "
                "quantizer out of the checkpointed part (a small part of a step), or freeze() it"
            )

    def _check_indices(self, indices: Tensor) -> Tensor:
        """Return `indices` as int64 if they are integers of the right shape and range."""
        self._check_state()
        if not isinstance(indices, Tensor):
            raise ValueError(
                f"indices must be a tensor, not {type(indices).__name__}: convert them with "
                "torch.as_tensor"
            )
        dtype = indices.dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            raise ValueError(f"indices must be integers, not {dtype}: convert them with .long()")
        indices = indices.to(torch.int64)
        axes = 2 if self.stage_axis else 1
        if indices.dim() < axes:
            wanted = "(batch, *positions, stages)" if self.stage_axis else "(batch, *positions)"
            raise ValueError(f"indices must be {wanted}, not of shape {tuple(indices.shape)}")
        given = indices.shape[-1]
        if self.stage_axis and not 1 <= given <= self.stages:
            raise ValueError(
                f"{self.name} decodes 1 to {self.stages} stages on the last axis of the indices, "
                f"but it has {given} (shape {tuple(indices.shape)})"
            )
        if traced() or indices.is_meta or not indices.numel():
            return indices
        by_stage = indices.flatten(0, -2) if self.stage_axis else indices.reshape(-1, 1)
        low, high = int(indices.min()), by_stage.amax(0).tolist()
        for stage, (top, size) in enumerate(zip(high, self.codebook_sizes, strict=False)):
            if low < 0 or top >= size:
                raise ValueError(
                    f"indices of stage {stage + 1} of {self.name} run from 0 to {size - 1}, "
                    f"but {low if low < 0 else top} was given"
                )
        return indices
