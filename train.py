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
import time
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
from checkpoint import NotFinite, random_states
from dataset import build_dataset, skipped_images
from dataset.loaders import train_loader, val_loader
from loss import TrainingLoss, lpips_if_available, lpips_network
from meter import Meter
from metric import evaluate, format_results
from model import VQVAE, load_weights
from run import RunFolder, report
from run.resume import Resumed, best_psnr, find_resumed, restore
from run.state import RunState
from scheduler import learning_rate
from segment import Segment


class TrainingStep(nn.Module):
    """uint8 images (B, 3, H, W) -> the loss by its terms, and the indices: what is compiled.

    With `bf16`, encoder, decoder and LPIPS run under autocast; the quantizer turns it off for
    itself, and the loss adds up in float32.
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
    if util.world_size() > 1:
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
        training.announce()
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
        self.device = util.setup_processes()
        util.share_cores(args.num_workers)
        util.set_float32_precision("ieee")  # also in bf16, where the quantizer stays in float32
        util.seed_everything(args.seed)
        self.stop = stack.enter_context(exits.StopSignals())
        self.progress_shown = util.rank() == 0 and sys.stderr.isatty()
        self._find_images()
        self.model = VQVAE(args)
        resumed = self._find_start()
        self._build_step(resumed)
        self._start_loaders()
        self._open_run(resumed, stack)

    def _find_images(self) -> None:
        """The images, and the length of an epoch and of the run in steps."""
        args = self.args
        if args.batch_size % util.world_size():
            raise ValueError(
                f"--batch-size {args.batch_size} does not divide among {util.world_size()} "
                f"processes: give a multiple of {util.world_size()}"
            )
        common = dict(img_size=args.img_size, seed=args.seed, skip_corrupt=args.skip_corrupt)
        self.train_set = build_dataset(args.train_data_path, train=True, **common)
        self.val_set = build_dataset(args.val_data_path, train=False, **common)
        self.steps_per_epoch = math.ceil(len(self.train_set) / args.batch_size)
        steps = max(1, args.max_train_epochs * len(self.train_set) // args.batch_size)
        self.steps = min(steps, args.train_iters or steps)

    def _find_start(self) -> Resumed | None:
        """The checkpoint of --resume and its step, or the weights of --load."""
        args, quantizer = self.args, self.model.quantizer
        self.name = f"{quantizer.name}-f{self.model.f}-c{args.channel}-s{args.seed}"
        resumed = util.on_main(lambda: find_resumed(args, self.name, quantizer, self.train_set))
        if resumed:
            args.load = resumed.args.get("load")  # where the run began
        elif args.load:
            load_weights(self.model, args, args.load)
        self.resumed_from = resumed.path if resumed else None
        self.first_step = resumed.state.step if resumed else 0  # how many are done
        if self.first_step > self.steps:
            raise ValueError(
                f"the checkpoint is at step {self.first_step}, but these flags end the run at step "
                f"{self.steps}: give more --max-train-epochs or --train-iters"
            )
        return resumed

    def _build_step(self, resumed: Resumed | None) -> None:
        """Model, LPIPS, loss and optimizer on the device, with the state of the checkpoint."""
        args, device = self.args, self.device
        gpu = device.type == "cuda"
        self.precision = util.training_precision(args.precision)
        self.compiled = gpu if args.compile is None else args.compile
        self.model.to(device, memory_format=torch.channels_last)
        load = lpips_network if args.perceptual_weight else lpips_if_available
        self.perceptual = load(args.lpips_net, device, args.img_size)
        weights = (args.l1_weight, args.perceptual_weight, args.quantizer_loss_weight)
        criterion = TrainingLoss(*weights, self.perceptual)
        criterion.to(device, memory_format=torch.channels_last)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True
        )
        if resumed:
            restore(resumed, self.model, self.optimizer, device)
        self.training_step: nn.Module = TrainingStep(
            self.model, criterion, bf16=self.precision == "bf16"
        )
        if self.compiled:
            self.training_step.compile(fullgraph=True)
        if util.world_size() > 1:
            self.training_step = util.data_parallel(self.training_step)

    def _start_loaders(self) -> None:
        """This process's batches for training and validation."""
        args, processes = self.args, util.world_size()
        share = dict(num_workers=args.num_workers, rank=util.rank(), world_size=processes)
        share |= dict(device=self.device, stop=self.stop)
        order = dict(steps=self.steps, start_step=self.first_step, seed=args.seed)
        self.batches = train_loader(self.train_set, args.batch_size // processes, **order, **share)
        self.val_batches = val_loader(self.val_set, min(args.batch_size, 64), **share)
        if args.num_workers:
            iter(self.val_batches)  # starts its processes, before there are threads to fork beside

    def _open_run(self, resumed: Resumed | None, stack: contextlib.ExitStack) -> None:
        """Lock and begin the run folder, and take up what the checkpoint says of the run so far."""
        args = self.args
        self.train_fingerprint = util.on_main(self.train_set.fingerprint)
        self.val_fingerprint = util.on_main(self.val_set.fingerprint)["names"][:32]
        folder = resumed.path.parent if resumed else util.on_main(self._create_folder)
        self.run = RunFolder(folder, self.first_step)
        stack.enter_context(self.run.explained_errors(args.lr))
        util.on_main(lambda: stack.enter_context(self.run.locked()))
        self.environment = util.environment(self.device)
        util.on_main(lambda: self._begin_or_resume(resumed))
        self.meter, self.best_psnr, seconds = Meter(self.device), -math.inf, 0.0
        self.segments, self.skipped_before = [], []
        if resumed:
            state = resumed.state
            self.meter.resume(
                sums=state.interval_sums,
                count=state.interval_count,
                seconds=state.interval_seconds,
                skipped=state.skipped,
            )
            self.best_psnr = util.on_main(
                lambda: best_psnr(resumed, self.run, self.val_fingerprint)
            )
            seconds = state.seconds
            self.segments, self.skipped_before = state.segments, state.skipped_images
        self.started = time.perf_counter() - seconds  # as if there had been no interruption
        self.segments.append(
            Segment(
                first_step=self.first_step + 1,
                command=self.environment["command"],
                commit=self.environment["commit"],
                device=self.environment["device"],
                precision=self.precision,
                compiled=self.compiled,
            )
        )

    def _create_folder(self) -> str:
        args = self.args
        run = RunFolder.create(
            args.save,
            default_name=self.name,
            overwrite=args.overwrite,
            resuming=args.resume == "auto",
        )
        return str(run.path)

    def _begin_or_resume(self, resumed: Resumed | None) -> None:
        args = self.args
        if resumed is None:
            self.run.begin(
                vars(args),
                self.environment,
                overwrite=args.overwrite,
                tensorboard=args.tensorboard,
            )
        else:
            self.run.resume(
                vars(args),
                self.environment,
                checkpoint=resumed.path,
                step=resumed.state.step,
                seen=resumed.seen,
                steps=self.steps,
                keep=args.keep,
                overwrite=args.overwrite,
                tensorboard=args.tensorboard,
            )

    def announce(self) -> None:
        """Print what is about to be trained."""
        if util.rank() > 0:
            return
        report.print_start(
            self.args,
            self.model,
            self.train_set,
            self.val_set,
            steps=self.steps,
            device=self.device,
            precision=self.precision,
            compiled=self.compiled,
            folder=self.run.path,
        )
        if self.resumed_from:
            print(f"resumed after step {self.first_step} from {self.resumed_from}", flush=True)

    # -------------------------------------------------------------------------------------
    # Train
    # -------------------------------------------------------------------------------------
    def fit(self) -> dict:
        """Train from `first_step` to `steps`; return the result of the last evaluation."""
        args = self.args
        save_interval = args.save_interval or self.steps_per_epoch
        eval_interval = args.eval_interval or self.steps_per_epoch
        schedule = (self.steps, args.lr, args.warmup, args.lr_decay_style, args.lr_decay_ratio)
        progress = dict(total=self.steps, initial=self.first_step, unit="step")
        bar = tqdm(
            self.batches,
            desc=self.model.quantizer.name,
            disable=not self.progress_shown,
            **progress,
        )
        self.model.train()
        self.stop.defer()
        result = self.assess(self.first_step) if self._owes_evaluation(eval_interval) else {}
        with util.profiler(args.profile, self.run.path / "trace.json") as profile_step:
            for step, batch in enumerate(bar, start=self.first_step + 1):
                self.run.step = step
                lr = learning_rate(step - 1, *schedule)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                batch = batch.to(self.device, non_blocking=True)
                terms, indices, norm, bad = optimise(
                    self.training_step, self.optimizer, self.parameters, batch, args.clip_grad
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

    def _owes_evaluation(self, eval_interval: int) -> bool:
        """Whether the run was stopped between the checkpoint and the evaluation of one step."""
        done = self.first_step
        if done == 0:
            return False
        if done == self.steps:
            return True
        return done % eval_interval == 0 and done not in [v["step"] for v in self._validations()]

    def _validations(self) -> list[dict]:
        """Step and metrics of each evaluation of this validation set so far. A collective."""
        return util.on_main(lambda: self.run.validations(self.val_fingerprint))

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`. A collective."""
        with self.meter.paused():
            state = RunState(
                step=step,
                best_psnr=self.best_psnr,
                seconds=time.perf_counter() - self.started,
                interval_sums=self.meter.gathered_sums(),
                interval_count=self.meter.count,
                interval_seconds=self.meter.seconds(),
                skipped=self.meter.skipped,
                random=random_states(),
                threads=torch.get_num_threads(),
                train_images=len(self.train_set),
                train_fingerprint=self.train_fingerprint,
                validation=self.val_fingerprint,
                segments=self.segments,
                skipped_images=self.skipped_images(),
            )
            checkpoint = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "args": vars(self.args),
                **state.state_dict(),
            }
            util.on_main(lambda: self.run.save(checkpoint, self.args.keep))

    def skipped_images(self) -> list[str]:
        """The files that were left out since the run began. A collective."""
        return sorted({*self.skipped_before, *skipped_images(self.train_set, self.val_set)})

    def assess(self, step: int) -> dict:
        """Evaluate, draw the samples and mark the best checkpoint. A collective."""
        with self.meter.paused():
            try:
                result = evaluate(
                    self.model,
                    self.val_batches,
                    self.perceptual,
                    self.device,
                    progress=self.progress_shown,
                    final=step == self.steps,
                    stop=lambda: self.stop.received is not None,
                )
            except exits.Interrupted as error:
                raise self.interrupted(step) from error
            except NotFinite:
                util.on_main(lambda: self.run.discard(step))
                raise
            util.on_main(lambda: self.record_evaluation(step, result))
            self.best_psnr = max(result["psnr"], self.best_psnr)
        return result

    def record_evaluation(self, step: int, result: dict) -> None:
        """Mark the best checkpoint, log the result and draw the samples. In the main process."""
        if result["psnr"] > self.best_psnr:
            self.run.mark_best(step)
        # After best.pt: what is logged is not evaluated again after a kill.
        record = {"kind": "val", "step": step, "validation": self.val_fingerprint}
        self.run.log({**record, **result})
        self.run.draw_samples(self.model, self.val_set, self.device, step)
        report.print_evaluation(step, self.steps, result)

    def interrupted(self, step: int) -> exits.Interrupted:
        """The exception that ends a run which a signal has stopped."""
        return exits.Interrupted(
            f"stopped by {self.stop.received or 'another process'} after step {step}; to go on: "
            f"the same command with --resume {self.run.path}"
        )

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

    def write_results(self, evaluation: dict) -> dict:
        """Write results.json and results.txt, and print the final table. A collective."""
        skipped = self.skipped_images()
        results = report.results_of_run(
            self.args,
            evaluation=evaluation,
            validations=self._validations(),
            model=self.model,
            steps=self.steps,
            train_images=len(self.train_set),
            seconds=time.perf_counter() - self.started,
            skipped_steps=int(self.meter.skipped[0]),
            skipped_images=skipped,
            precision=self.precision,
            environment=self.environment,
            segments=self.segments,
        )
        table = format_results(evaluation)
        util.on_main(lambda: self.run.write_results(results, table))
        if util.rank() == 0:
            report.print_end(table, skipped, self.run.path)
        return results


if __name__ == "__main__":
    exits.run_script(main)
