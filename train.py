"""Train a VQVAE around a quantizer and evaluate it.

    python train.py --train-data-path synthetic --val-data-path synthetic      # any machine
    python train.py --quantizer rfsq --rfsq-stages 2 --rfsq-strategy layernorm \
        --batch-size 128 --lr 0.0008 --max-train-epochs 50                     # the paper's set-up
    torchrun --standalone --nproc-per-node 8 train.py                          # eight GPUs
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import save_image
from tqdm import tqdm

import util
from arguments import current_flags, get_args, may_change_flags
from checkpoint import NotFinite, is_of_a_file, load_checkpoint, unwritable, write_json, write_whole
from dataset import build_dataset, train_loader, val_loader
from loss import TrainingLoss, lpips_network
from metric import evaluate, format_results
from model import VQVAE, load_weights
from scheduler import learning_rate

SAMPLES = 8  # validation images in the pictures


def main(argv: Sequence[str] | None = None) -> dict:
    """Train and evaluate as the flags say (`argv`, or the command line); return the results.

    Raises:
        ValueError: for bad input, before anything is written.
    """
    with contextlib.ExitStack() as resources:
        return train(get_args(argv), resources)


def train(args: Namespace, resources: contextlib.ExitStack) -> dict:
    """`main` with its flags read; `resources` are given back at the end, whatever the end is."""
    device = util.setup_processes()
    main_process = util.rank() == 0
    util.share_cores(args.num_workers)
    util.seed_everything(args.seed)

    # -----------------------------------------------------------------------------------
    # Data
    # -----------------------------------------------------------------------------------
    processes = util.world_size()
    if args.batch_size % processes:
        raise ValueError(
            f"--batch-size {args.batch_size} does not divide among {processes} processes: "
            f"give a multiple of {processes}"
        )
    how = dict(img_size=args.img_size, seed=args.seed, skip_corrupt=args.skip_corrupt)
    train_set = build_dataset(args.train_data_path, train=True, **how)
    val_set = build_dataset(args.val_data_path, train=False, **how)
    steps = max(1, args.max_train_epochs * len(train_set) // args.batch_size)
    steps = min(steps, args.train_iters or steps)

    # -----------------------------------------------------------------------------------
    # Model, loss, optimizer
    # -----------------------------------------------------------------------------------
    model = VQVAE(args)
    if args.load:
        load_weights(model, args, args.load)
    resumed = util.from_main(find_resumed(args, model, len(train_set)) if main_process else None)
    if isinstance(resumed, str):  # the main process's complaint
        raise ValueError(resumed)
    first_step = resumed["step"] if resumed else 0
    if first_step > steps:
        raise ValueError(
            f"the checkpoint is at step {first_step}, but these flags end the run at step {steps}: "
            "give more --max-train-epochs or --train-iters"
        )
    cuda = device.type == "cuda"
    precision = args.precision or ("bf16" if cuda else "fp32")
    compiled = cuda if args.compile is None else args.compile
    float32 = "tf32" if precision == "bf16" else "ieee"
    util.set_float32_precision(float32)
    model.to(device, memory_format=torch.channels_last)
    perceptual = lpips_network(
        args.lpips_net, device, needed=args.perceptual_weight > 0, side=args.img_size
    )
    criterion = TrainingLoss(
        args.l1_weight, args.perceptual_weight, args.quantizer_loss_weight, perceptual
    ).to(device, memory_format=torch.channels_last)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    if resumed:
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
        util.restore_random_states(resumed["random"])
        if not cuda:
            torch.set_num_threads(resumed["threads"])  # sums are rounded by threads
    training_step: nn.Module = TrainingStep(model, criterion, bf16=precision == "bf16")
    if compiled:
        training_step.compile(fullgraph=True)
    if processes > 1:
        # The quantizers keep their own statistics equal in all processes.
        training_step = DistributedDataParallel(training_step, broadcast_buffers=False)

    share = dict(num_workers=args.num_workers, rank=util.rank(), world_size=processes)
    batches = train_loader(
        train_set,
        args.batch_size // processes,
        steps=steps,
        seed=args.seed,
        start_step=first_step,
        device=device,
        **share,
    )
    val_batches = val_loader(val_set, min(args.batch_size, 64), device=device, **share)

    # -----------------------------------------------------------------------------------
    # Run folder
    # -----------------------------------------------------------------------------------
    run = resumed["run"] if resumed else run_folder(args, model) if main_process else None
    run = util.from_main(run)
    if isinstance(run, str):
        raise ValueError(run)
    done = first_step

    @contextlib.contextmanager
    def named_errors() -> Iterator[None]:
        """What ends a run from within, numbers or the disk, in one line with what to do."""
        try:
            yield
        except NotFinite as error:
            good = max(run.glob("step_*.pt"), default=None)
            raise ValueError(
                f"step {done}: {error}: begin again with a lower --lr (now {args.lr:g}) or "
                f"--clip-grad; "
                + (f"last good checkpoint: {good}" if good else "no checkpoint yet")
            ) from error
        except OSError as error:
            if not is_of_a_file(error):
                raise
            raise ValueError(unwritable(error.filename or run, error)) from error

    resources.enter_context(named_errors())
    if main_process:
        resources.enter_context(util.lock_folder(run))
    weights = sum(p.numel() for p in parameters)
    if main_process:
        write_json(run / "args.json", vars(args))
        write_json(run / "environment.json", util.environment(device))
        trim_log(run / "metrics.jsonl", first_step, steps)
        for newer in run.glob("step_*.pt"):
            if newer.name > f"step_{first_step:07d}.pt":
                newer.unlink()  # of the course that is left here
        for half in run.glob(".*.*.*"):
            half.unlink()  # of a process that was killed as it wrote
        print(
            f"{model.quantizer.name}: {model.quantizer.bits:.4g} bits per position, f = {model.f}, "
            f"{weights:,} parameters\n{len(train_set):,} training images, {len(val_set):,} for "
            f"validation; {steps:,} steps of {args.batch_size} on {device} in {precision}"
            f"{', compiled' if compiled else ''}; run folder {run}"
            + (f"\nresumed after step {first_step} from {resumed['path']}" if resumed else ""),
            flush=True,
        )

    def log(record: dict) -> None:
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def save(step: int, improved: bool = False) -> None:
        all_sums = torch.stack(util.from_all(sums.cpu()))
        if main_process:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "args": vars(args),
                "step": step,
                "best_psnr": best,
                "skipped": skipped,
                "train_images": len(train_set),
                "interval_sums": all_sums,
                "interval_count": count,
                "interval_seconds": elapsed,
                "seconds": seconds_before + time.perf_counter() - started,
                "random": util.random_states(),
                "threads": torch.get_num_threads(),
            }
            util.save_run_checkpoint(run, state, args.keep, improved)

    def assess(step: int) -> dict:
        """Evaluate, draw the samples and save the checkpoint; the same result in all processes."""
        nonlocal best
        final = step == steps  # the floors depend on the images alone: once is enough
        util.set_float32_precision("ieee")
        result = evaluate(model, val_batches, perceptual, device, progress=bar_shown, final=final)
        util.set_float32_precision(float32)
        improved, best = result["psnr"] > best, max(best, result["psnr"])
        if main_process:
            log({"kind": "val", "step": step, **result})
            tqdm.write(
                f"step {step}/{steps}  validation: PSNR {result['psnr']:.2f} dB  "
                f"L1 {result['l1']:.4f}" + (f"  LPIPS {result['lpips']:.4f}" if perceptual else "")
            )
            draw_samples(model, val_set, device, run / "samples" / f"step_{step:07d}.png")
        save(step, improved)
        return result

    # -----------------------------------------------------------------------------------
    # Training
    # -----------------------------------------------------------------------------------
    bar_shown = main_process and sys.stderr.isatty()
    save_interval = args.save_interval or math.ceil(len(train_set) / args.batch_size)
    best, seconds_before, result = -math.inf, 0.0, {}
    # Since the last log line: sums of the terms of good steps, and how often each was not finite.
    # And the skipped steps, in all and in a row. On the device, since reading would wait for it.
    sums, skipped = torch.zeros((), device=device), torch.zeros(2, device=device)
    count, elapsed = 0, 0.0
    if resumed:
        best, seconds_before = resumed["best_psnr"], resumed["seconds"]
        count, elapsed = resumed["interval_count"], resumed["interval_seconds"]
        own = resumed["interval_sums"]  # of each process: of other ones, all take the mean
        own = own[util.rank()] if len(own) == processes else own.mean(0)
        sums, skipped = own.to(device), resumed["skipped"].to(device)
    started = time.perf_counter()
    interval_start = started - elapsed
    progress = dict(total=steps, initial=first_step, unit="step", disable=not bar_shown)
    bar = tqdm(batches, desc=model.quantizer.name, **progress)
    model.train()
    stop = util.StopSignals(batches.shield)
    with stop:
        for done, batch in enumerate(bar, start=first_step + 1):
            lr = learning_rate(
                done - 1, steps, args.lr, args.warmup, args.lr_decay_style, args.lr_decay_ratio
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            terms, indices = training_step(batch.to(device, non_blocking=True))
            optimizer.zero_grad(set_to_none=True)
            terms["loss"].backward()
            norm = nn.utils.clip_grad_norm_(parameters, args.clip_grad or math.inf)
            optimizer.found_inf = bad = not_finite(terms["loss"], norm)  # 1: Adam skips the step
            optimizer.step()

            skipped = torch.stack([skipped[0] + bad, (skipped[1] + bad) * bad])
            values = torch.stack([*terms.values(), norm, torch.ones_like(norm)]).detach()
            good, infinite = torch.where(bad > 0, 0, values), (~values.isfinite()).float()
            sums = sums + torch.stack([good, infinite])
            count += 1
            elapsed = time.perf_counter() - interval_start
            if done % args.log_interval == 0 or done == steps:
                record = {
                    "kind": "train",
                    "step": done,
                    "epoch": round(done * args.batch_size / len(train_set), 4),
                    "lr": lr,
                    **means([*terms, "grad_norm"], sums, skipped, args.max_skipped_steps),
                    "images_per_s": round(count * args.batch_size / elapsed, 1),
                    "peak_memory_mib": util.peak_memory_mib(device),
                    "codes_in_batch": codes_in_batch(indices, model.quantizer.stage_axis),
                }
                if main_process:
                    log(record)
                    report(record, bar, bar_shown, steps)
                sums, count, elapsed = torch.zeros_like(sums), 0, 0.0
                interval_start = time.perf_counter()
            stopping = stop_agreed(stop, done)
            if done % save_interval == 0 or done == steps:
                result = assess(done)
                interval_start = time.perf_counter() - elapsed
            elif stopping:
                save(done)
            if stopping and done < steps:
                raise util.Interrupted(
                    f"stopped by {stop.received or 'another process'} after step {done}; to go on: "
                    f"the same command with --resume {run}"
                )
    bar.close()
    if not result:  # resumed at its end
        result = assess(steps)

    # -----------------------------------------------------------------------------------
    # Results
    # -----------------------------------------------------------------------------------
    results = {
        "name": args.name or model.quantizer.name,
        **result,
        "parameters": weights,
        "steps": steps,
        "batch_size": args.batch_size,
        "images_seen": steps * args.batch_size,
        "train_images": len(train_set),
        "seconds": round(seconds_before + time.perf_counter() - started, 1),
        "skipped_steps": int(skipped[0]),
        "skipped_images": skipped_images(train_set, val_set),
        "seed": args.seed,
        "precision": precision,
        "train_data": args.train_data_path,
        "val_data": args.val_data_path,
        "checkpoint": "last.pt",
        "environment": util.environment(device),
        "args": vars(args),
    }
    if main_process:
        write_json(run / "results.json", results)
        table = format_results(result)
        write_whole(run / "results.txt", lambda file: file.write(f"{table}\n".encode()))
        print(f"\n{table}\n\nresults, pictures and checkpoints: {run}", flush=True)
    return results


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


def default_name(args, model: VQVAE) -> str:
    """The name of a run folder that is not named by --save."""
    return f"{model.quantizer.name}-f{model.f}-c{args.channel}-s{args.seed}"


def run_folder(args, model: VQVAE) -> Path | str:
    """Make the folder of a new run and return it, or the reason why it cannot be used."""
    if args.save is None:
        name = default_name(args, model)
        names = [name, *(f"{name}-{i}" for i in range(2, 10_000))]
        folder = next(p for p in (Path("runs", n) for n in names) if not p.exists())
    else:
        folder = Path(args.save)
        if folder.exists() and not folder.is_dir():
            return f"--save {folder} is a file: give a folder"
    old = (folder / "args.json").exists() and args.resume != "auto"
    if old and not args.overwrite:
        return f"{folder} already holds a run: give another --save, --resume it, or --overwrite it"
    try:
        if old:
            util.lock_folder(folder).close()
            for path in [*folder.glob("*.pt"), *folder.glob("results.*")]:
                path.unlink()
            shutil.rmtree(folder / "samples", ignore_errors=True)
        (folder / "samples").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"run folder {folder} cannot be made ({error.strerror}): give another --save"
    return folder


def find_resumed(args, model: VQVAE, train_images: int) -> dict | str | None:
    """What --resume continues: a checkpoint with its `path` and `run` folder added.

    None for a new run; a string is the reason why it cannot be resumed.
    """
    if args.resume is None:
        return None
    if args.resume == "auto":
        folder = Path(args.save or Path("runs", default_name(args, model)))
    else:
        folder = Path(args.resume)
    try:
        if folder.is_file():
            found, folder = (folder, load_checkpoint(folder)), folder.parent
        else:
            found = util.newest_checkpoint(folder)
        if found is None:
            if args.resume == "auto":
                args.save = str(folder)
                return None
            return f"--resume {folder} holds no checkpoint: give a run folder, a .pt file, or auto"
        path, saved = found
        if "interval_sums" not in saved:
            return f"{path} holds no training state: give a last.pt or step_*.pt of a run"
        if saved["train_images"] != train_images:
            return (
                f"{path} is of a run on {saved['train_images']:,} training images, here are "
                f"{train_images:,}, which come in another order: give the same images to resume it"
            )
        before, may_change = current_flags(saved["args"]), may_change_flags()
        if not args.perceptual_weight:
            may_change += ("lpips_net",)
        differ = [
            f"--{name.replace('_', '-')} {before.get(name)} there, {value} here"
            for name, value in vars(args).items()
            if name not in may_change and before.get(name) != value
        ]
        if differ:
            return (
                f"{path} is of another run: {'; '.join(differ)}: give the same flags to resume it"
            )
    except ValueError as error:
        return str(error)
    return {**saved, "path": str(path), "run": folder}


def trim_log(path: Path, step: int, steps: int) -> None:
    """Drop from the log what is to come (again) after `step`, and half a line."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        # A run that is resumed at its end evaluates once more.
        again = step == steps and record["kind"] == "val"
        if record["step"] < step or (record["step"] == step and not again):
            kept.append(line + "\n")
    write_whole(path, lambda file: file.write("".join(kept).encode()))


def not_finite(loss: Tensor, norm: Tensor) -> Tensor:
    """1.0 if the loss or the gradient of any process is not finite, else 0.0; on the device."""
    bad = (~(loss.detach().isfinite() & norm.isfinite())).float()
    if util.world_size() > 1:
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return bad


def stop_agreed(stop: util.StopSignals, step: int) -> bool:
    """Whether to stop after `step`: asked of one process; of several, every 16 steps of any."""
    if util.world_size() == 1:
        return stop.received is not None
    return step % 16 == 0 and any(util.from_all(stop.received is not None))


def draw_samples(model: VQVAE, images, device: torch.device, path: Path) -> None:
    """A PNG of the first validation images, the originals over their reconstructions."""
    first = [images[i] for i in range(min(SAMPLES, len(images)))]
    originals = torch.stack([image for image in first if image is not None]).float() / 255
    tokens = model.encode(originals.to(device))
    tokens = tokens if isinstance(tokens, tuple) else (tokens,)
    pictures = torch.cat([originals, model.decode(*tokens).float().cpu()])
    pictures, row = pictures.clamp(0, 1), len(originals)
    write_whole(path, lambda file: save_image(pictures, file, nrow=row, format="png"))


def means(names: list[str], sums: Tensor, skipped: Tensor, limit: int) -> dict:
    """The mean of each term over the good steps of an interval and all processes.

    `sums` (2, terms + 1): of the terms and of the good steps, and how often each was not finite.

    Raises:
        NotFinite: the last `limit` steps or more were all skipped.
    """
    if util.world_size() > 1:
        dist.all_reduce(sums)
    *totals, in_all, in_a_row = torch.cat([sums.flatten(), skipped]).tolist()
    totals, bad = totals[: len(names) + 1], totals[len(names) + 1 :]
    if in_a_row >= limit:
        terms = ", ".join(name for name, count in zip(names, bad, strict=False) if count)
        raise NotFinite(f"{in_a_row:.0f} steps in a row were not finite in {terms}")
    good = totals.pop()
    record = {n: total / good if good else None for n, total in zip(names, totals, strict=True)}
    return record | ({"skipped_steps": int(in_all)} if in_all else {})


def skipped_images(*datasets) -> list[str]:
    """The files that any process left out because they could not be read; says them aloud."""
    own = [name for images in datasets for name in getattr(images, "skipped", list)()]
    names = sorted(set().union(*util.from_all(own)))
    if names and util.rank() == 0:
        more = f" and {len(names) - 3} more, named in results.json" if len(names) > 3 else ""
        print(f"{len(names)} images skipped: {', '.join(names[:3])}{more}", flush=True)
    return names


def codes_in_batch(indices: Tensor, stage_axis: bool) -> list[int]:
    """Number of different codes of each stage in one process's batch."""
    stages = indices.unbind(-1) if stage_axis else [indices]
    return [len(torch.unique(stage)) for stage in stages]


def report(record: dict, bar: tqdm, bar_shown: bool, steps: int) -> None:
    """Show a log record: in the bar on a terminal, else as a line."""
    speed = f"{record['images_per_s']:.0f}"
    if bar_shown:
        loss = "skipped" if record["loss"] is None else f"{record['loss']:.4f}"
        bar.set_postfix(loss=loss, lr=f"{record['lr']:.2e}", images_s=speed)
        return
    terms = "  ".join(
        f"{name} {record[name]:.4f}"
        for name in ("loss", "l1", "perceptual", "quantizer", "grad_norm")
        if record.get(name) is not None
    )
    if "skipped_steps" in record:
        terms += f"  {record['skipped_steps']} steps skipped"
    print(
        f"step {record['step']}/{steps}  epoch {record['epoch']:.2f}  {terms}  "
        f"lr {record['lr']:.2e}  {speed} images/s",
        flush=True,
    )


if __name__ == "__main__":
    util.run_script(main)
