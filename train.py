"""Train a VQVAE around a quantizer and evaluate it.

    python train.py --train-data-path synthetic --val-data-path synthetic      # any machine
    python train.py --quantizer rfsq --rfsq-stages 2 --rfsq-strategy layernorm \
        --batch-size 128 --lr 0.0008 --max-train-epochs 50                     # the paper's set-up
    torchrun --standalone --nproc-per-node 8 train.py                          # eight GPUs
"""

from __future__ import annotations

import contextlib
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import exits
import util
from arguments import get_args
from checkpoint import NotFinite
from loss import TrainingLoss, lpips_if_available, lpips_network
from metric import evaluate, format_results
from model import VQVAE
from run import report, setup
from run.progress import Progress
from run.resume import best_psnr, owes_evaluation, restore
from scheduler import learning_rate


class TrainingStep(nn.Module):
    """The compiled part of a step: uint8 images (B, 3, H, W) -> the loss by its terms, indices.

    With `bf16`, encoder, decoder and LPIPS run under autocast; the quantizer turns it off for
    itself, and the loss is summed in float32.
    """

    def __init__(self, model: VQVAE, criterion: TrainingLoss, bf16: bool):
        super().__init__()
        self.model, self.criterion, self.bf16 = model, criterion, bf16

    def forward(self, batch: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        images = (batch.float() / 255).contiguous(memory_format=torch.channels_last)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.bf16):
            reconstruction, indices, quantizer_loss = self.model(images)
            return self.criterion(images, reconstruction, quantizer_loss), indices


class StepResult(NamedTuple):
    """The result of `optimise`: tensors on the device, where they may still be computed.

    Attributes:
        terms: the loss and its terms, scalars by name.
        indices: the codes of the batch.
        norm: the norm of the gradient before clipping.
        bad: 1.0 if the update was skipped, else 0.0.
    """

    terms: dict[str, Tensor]
    indices: Tensor
    norm: Tensor
    bad: Tensor


def optimise(
    step: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[Tensor],
    batch: Tensor,
    clip_grad: float,
    mark: Callable[[str], None] = lambda part: None,
) -> StepResult:
    """One step of training. The update is skipped if the loss or the gradient is not finite.

    Args:
        step: a `TrainingStep`, which may be compiled and wrapped for several processes.
        optimizer: Adam with `fused=True`, which reads `found_inf` on the device.
        parameters: the parameters of the optimizer.
        batch: uint8 images (B, 3, H, W), on the device.
        clip_grad: the largest norm of the gradient; 0 does not clip.
        mark: called after each part with its name: "forward", "backward", "optimizer".
    """
    terms, indices = step(batch)
    mark("forward")
    optimizer.zero_grad(set_to_none=True)
    terms["loss"].backward()
    mark("backward")
    norm = nn.utils.clip_grad_norm_(parameters, clip_grad or math.inf)
    bad = not_finite(terms["loss"], norm)
    optimizer.found_inf = bad  # 1: Adam skips the step
    optimizer.step()
    mark("optimizer")
    return StepResult(terms, indices, norm, bad)


def not_finite(loss: Tensor, norm: Tensor) -> Tensor:
    """1.0 if the loss or the gradient of any process is not finite, else 0.0; on the device."""
    bad = (~(loss.detach().isfinite() & norm.isfinite())).float()
    if util.in_group():
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return bad


def main(argv: Sequence[str] | None = None) -> dict:
    """Train and evaluate as the flags say (`argv`, or the command line); return the results.

    Raises:
        ValueError: for bad input, before anything is written; later, for a loss that stays not
            finite, a damaged image or a disk that cannot be written.
        exits.Interrupted: a signal stopped the run; from the first step on, a checkpoint is saved
            before.
    """
    with contextlib.ExitStack() as stack:
        training = Training(get_args(argv), stack)
        result = training.fit()
        return training.write_results(result)


class Training:
    """One run, from its flags to its results.

    Several processes make the same calls in the same order; rank 0 alone writes and prints.

    Args:
        args: the flags of `arguments.py`.
        stack: releases the run folder's lock and the signals on every exit path.
    """

    def __init__(self, args: Namespace, stack: contextlib.ExitStack):
        self.args = args
        self.device = device = util.setup_processes()
        util.share_cores(args.num_workers)
        util.set_float32_precision("ieee")  # also in bf16, where the quantizer stays in float32
        util.seed_everything(args.seed)
        self.stop = stack.enter_context(exits.StopSignals())
        self.progress_shown = util.rank() == 0 and sys.stderr.isatty()

        self.train_set, self.val_set = setup.build_datasets(args)
        steps = max(1, args.max_train_epochs * len(self.train_set) // args.batch_size)
        self.steps = min(steps, args.train_iters or steps)

        self.model = VQVAE(args)
        name = f"{self.model.quantizer.name}-f{self.model.f}-c{args.channel}-s{args.seed}"
        resumed = setup.find_start(args, name, self.model, self.train_set, self.steps)
        self.start_step = resumed.state.step if resumed else 0  # how many steps are done

        self.precision = util.training_precision(args.precision)
        self.compiled = device.type == "cuda" if args.compile is None else args.compile
        self.model.to(device, memory_format=torch.channels_last)
        load = lpips_network if args.perceptual_weight else lpips_if_available
        self.perceptual = load(args.lpips_net, device, args.img_size)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
        )
        if resumed:
            restore(resumed, self.model, self.optimizer, device)
        self.training_step = self._build_step()

        self.batches, self.val_batches = setup.start_loaders(
            args, self.train_set, self.val_set, self.start_step, self.steps, device, self.stop
        )
        train_fingerprint = util.on_main(self.train_set.fingerprint)
        validation = util.on_main(self.val_set.fingerprint)["names"][:32]
        self.environment = util.environment(device)
        self.run = setup.open_folder(args, name, resumed, self.steps, self.environment, stack)

        self.progress = Progress(
            self.train_set, self.val_set, train_fingerprint, validation, device
        )
        self.meter = self.progress.meter
        if resumed:
            best = util.on_main(lambda: best_psnr(resumed.state, self.run, validation))
            self.progress.restore(resumed.state, best)
        changed = self.progress.begin_segment(
            self.start_step + 1, self.environment, self.precision, self.compiled
        )
        if util.rank() == 0:
            report.print_start(
                args,
                self.model,
                self.train_set,
                self.val_set,
                steps=self.steps,
                device=device,
                precision=self.precision,
                compiled=self.compiled,
                folder=self.run.path,
                resumed=resumed,
                changed=changed,
            )

    def _build_step(self) -> nn.Module:
        """Model and loss as one module, compiled, and wrapped in a process group."""
        criterion = TrainingLoss(
            l1_weight=self.args.l1_weight,
            perceptual_weight=self.args.perceptual_weight,
            quantizer_weight=self.args.quantizer_loss_weight,
            perceptual=self.perceptual,
        )
        criterion.to(self.device, memory_format=torch.channels_last)
        step = TrainingStep(self.model, criterion, bf16=self.precision == "bf16")
        if self.compiled:
            step.compile(fullgraph=True)
        return util.data_parallel(step) if util.in_group() else step

    def fit(self) -> dict:
        """Train from `start_step` to `steps`; return the result of the last evaluation."""
        args = self.args
        epoch = math.ceil(len(self.train_set) / args.batch_size)
        save_interval = args.save_interval or epoch
        eval_interval = args.eval_interval or epoch
        parameters = list(self.model.parameters())
        bar = tqdm(
            self.batches,
            desc=self.model.quantizer.name,
            total=self.steps,
            initial=self.start_step,
            unit="step",
            disable=not self.progress_shown,
        )
        self.model.train()
        self.stop.defer()
        validation = self.progress.validation
        owed = util.on_main(
            lambda: owes_evaluation(
                self.run, validation, self.start_step, self.steps, eval_interval
            )
        )
        result = self.assess(self.start_step) if owed else {}
        with util.profiler(args.profile, self.run.path / "trace.json") as profile_step:
            for step, batch in enumerate(bar, start=self.start_step + 1):
                self.run.step = step
                lr = learning_rate(
                    step - 1,
                    steps=self.steps,
                    peak=args.lr,
                    warmup=args.warmup,
                    style=args.lr_decay_style,
                    decay_ratio=args.lr_decay_ratio,
                )
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                terms, indices, norm, bad = optimise(
                    self.training_step,
                    self.optimizer,
                    parameters,
                    batch.to(self.device, non_blocking=True),
                    args.clip_grad,
                )
                self.meter.update({**terms, "grad_norm": norm}, bad)
                profile_step()

                last = step == self.steps
                if step % args.log_interval == 0 or last:
                    self.log(step, lr, indices, bar)
                stopping = self.stop.agreed(step)
                evaluating = step % eval_interval == 0 or last
                if stopping or evaluating or step % save_interval == 0:
                    self.save(step)
                if stopping and not last:
                    raise self.interrupted(step)
                if evaluating:
                    result = self.assess(step)
        bar.close()
        return result

    def log(self, step: int, lr: float, indices: Tensor, bar: tqdm) -> None:
        """Log the interval that ends with `step`, and show it. A collective."""
        means, steps_per_s = self.meter.compute(self.args.max_skipped_steps)
        if util.rank() > 0:
            return
        record = report.training_record(
            step=step,
            epoch=step * self.args.batch_size / len(self.train_set),
            lr=lr,
            means=means,
            images_per_s=steps_per_s * self.args.batch_size,
            device=self.device,
            indices=indices,
            stage_axis=self.model.quantizer.stage_axis,
        )
        self.run.log(record)
        if self.progress_shown:
            report.show_progress(bar, record)
        else:
            report.print_training(record, terms=self.meter.names, steps=self.steps)

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`. A collective."""
        with self.meter.paused():
            checkpoint = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "args": vars(self.args),
                **self.progress.state(step).state_dict(),
            }
            util.on_main(lambda: self.run.save(checkpoint, self.args.keep))

    def assess(self, step: int) -> dict:
        """Evaluate, draw the samples and mark the best checkpoint. A collective."""
        with self.meter.paused():
            try:
                result = evaluate(
                    self.model,
                    self.val_batches,
                    self.perceptual,
                    self.device,
                    progress=util.rank() == 0,
                    final=step == self.steps,
                    stop=lambda: self.stop.received is not None,
                )
            except exits.Interrupted as error:
                raise self.interrupted(step) from error
            except NotFinite:
                util.on_main(lambda: self.run.discard(step))
                raise
            util.on_main(lambda: self.record_evaluation(step, result))
            self.progress.best_psnr = max(result["psnr"], self.progress.best_psnr)
        return result

    def record_evaluation(self, step: int, result: dict) -> None:
        """Mark the best checkpoint, log the result and draw the samples. In the main process."""
        if result["psnr"] > self.progress.best_psnr:
            self.run.mark_best(step)
        # After best.pt is named: a logged evaluation is not repeated after a kill.
        record = {"kind": "val", "step": step, "validation": self.progress.validation}
        self.run.log({**record, **result})
        self.run.draw_samples(self.model, self.val_set, self.device, step)
        report.print_evaluation(step, self.steps, result)

    def interrupted(self, step: int) -> exits.Interrupted:
        """The exception that ends a run which a signal has stopped."""
        return exits.Interrupted(
            f"stopped by {self.stop.received or 'another process'} after step {step}; to go on: "
            f"the same command with --resume {self.run.path}"
        )

    def write_results(self, evaluation: dict) -> dict:
        """Write results.json and results.txt, and print the final table. A collective."""
        results = report.results_of_run(
            self.args,
            self.model,
            self.progress,
            evaluation=evaluation,
            validations=util.on_main(lambda: self.run.validations(self.progress.validation)),
            steps=self.steps,
            precision=self.precision,
            environment=self.environment,
        )
        table = format_results(evaluation)
        util.on_main(lambda: self.run.write_results(results, table))
        if util.rank() == 0:
            report.print_end(table, results["skipped_images"], self.run.path)
        return results


if __name__ == "__main__":
    exits.run_script(main)
