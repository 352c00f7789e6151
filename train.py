"""Train a VQVAE around a quantizer and evaluate it.

    python train.py --train-data-path synthetic --val-data-path synthetic      # any machine
    python train.py --quantizer rfsq --rfsq-stages 2 --rfsq-strategy layernorm \
        --batch-size 128 --lr 0.0008 --max-train-epochs 50                     # the paper's set-up
    torchrun --standalone --nproc-per-node 8 train.py                          # eight GPUs
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import save_image
from tqdm import tqdm

import util
from arguments import get_args
from dataset import build_dataset, denormalize, normalize, train_loader, val_loader
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
    args = get_args(argv)
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
    train_set = build_dataset(args.train_data_path, args.img_size, args.seed, train=True)
    val_set = build_dataset(args.val_data_path, args.img_size, args.seed, train=False)
    steps = max(1, args.max_train_epochs * len(train_set) // args.batch_size)
    steps = min(steps, args.train_iters or steps)
    share = dict(
        num_workers=args.num_workers, rank=util.rank(), world_size=processes, device=device
    )
    batches = train_loader(
        train_set, args.batch_size // processes, steps=steps, seed=args.seed, **share
    )
    val_batches = val_loader(val_set, min(args.batch_size, 64), **share)

    # -----------------------------------------------------------------------------------
    # Model, loss, optimizer
    # -----------------------------------------------------------------------------------
    model = VQVAE(args)
    if args.load:
        load_weights(model, args, args.load)
    cuda = device.type == "cuda"
    precision = args.precision or ("bf16" if cuda else "fp32")
    compiled = cuda if args.compile is None else args.compile
    util.set_float32_precision("tf32" if precision == "bf16" else "ieee")
    model.to(device, memory_format=torch.channels_last)
    perceptual = lpips_network(args.lpips_net, device, needed=args.perceptual_weight > 0)
    criterion = TrainingLoss(
        args.l1_weight, args.perceptual_weight, args.codebook_weight, perceptual
    ).to(device, memory_format=torch.channels_last)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    training_step: nn.Module = TrainingStep(model, criterion, bf16=precision == "bf16")
    if compiled:
        training_step.compile(fullgraph=True)
    if processes > 1:
        # The quantizers keep their own statistics equal in all processes.
        training_step = DistributedDataParallel(training_step, broadcast_buffers=False)

    # -----------------------------------------------------------------------------------
    # Run folder
    # -----------------------------------------------------------------------------------
    run = util.from_main(run_folder(args, model) if main_process else None)
    if isinstance(run, str):  # the main process's complaint
        raise ValueError(run)
    weights = sum(p.numel() for p in parameters)
    if main_process:
        util.write_json(run / "args.json", vars(args))
        util.write_json(run / "environment.json", util.environment(device))
        print(
            f"{model.quantizer.name}: {model.quantizer.bits:.4g} bits per position, f = {model.f}, "
            f"{weights:,} parameters\n{len(train_set):,} training images, {len(val_set):,} for "
            f"validation; {steps:,} steps of {args.batch_size} on {device} in {precision}"
            f"{', compiled' if compiled else ''}; run folder {run}",
            flush=True,
        )

    def assess(step: int) -> dict:
        """Evaluate, draw the samples and save the checkpoint; the same result in all processes."""
        nonlocal best
        final = step == steps  # the floors depend on the images alone: once is enough
        result = evaluate(model, val_batches, perceptual, device, progress=bar_shown, floors=final)
        improved, best = result["psnr"] > best, max(best, result["psnr"])
        if main_process:
            log({"kind": "val", "step": step, **result})
            tqdm.write(
                f"step {step}/{steps}  validation: PSNR {result['psnr']:.2f} dB  "
                f"L1 {result['l1']:.4f}" + (f"  LPIPS {result['lpips']:.4f}" if perceptual else "")
            )
            draw_samples(model, val_set, device, run / "samples" / f"step_{step:07d}.png")
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "args": vars(args),
                "step": step,
                "best_psnr": best,
            }
            util.save_checkpoint(run / "last.pt", state)
            if improved:
                shutil.copyfile(run / "last.pt", run / ".best.pt")
                (run / ".best.pt").replace(run / "best.pt")
        return result

    def log(record: dict) -> None:
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    # -----------------------------------------------------------------------------------
    # Training
    # -----------------------------------------------------------------------------------
    bar_shown = main_process and sys.stderr.isatty()
    save_interval = args.save_interval or math.ceil(len(train_set) / args.batch_size)
    best, result = -math.inf, {}
    sums: dict[str, Tensor] = {}
    started = interval_start = time.perf_counter()
    bar = tqdm(batches, total=steps, desc=model.quantizer.name, unit="step", disable=not bar_shown)
    model.train()
    for step, batch in enumerate(bar):
        lr = learning_rate(
            step, steps, args.lr, args.warmup, args.lr_decay_style, args.lr_decay_ratio
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        terms, indices = training_step(batch.to(device, non_blocking=True))
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        norm = nn.utils.clip_grad_norm_(parameters, args.clip_grad or math.inf)
        optimizer.step()

        # Sums stay on the device between log lines: reading one would wait for the GPU.
        for name, term in {**terms, "grad_norm": norm}.items():
            sums[name] = sums.get(name, 0) + term.detach()
        done = step + 1
        if done % args.log_interval == 0 or done == steps:
            count = done % args.log_interval or args.log_interval
            record = {name: mean_over_run(total, count) for name, total in sums.items()}
            if not math.isfinite(record["loss"]):
                raise ValueError(
                    f"the loss is {record['loss']} at step {done}: lower --lr (now {args.lr:g}) or "
                    f"--clip-grad; the last good checkpoint, if any, is in {run}"
                )
            seconds = time.perf_counter() - interval_start
            record = {
                "kind": "train",
                "step": done,
                "epoch": round(done * args.batch_size / len(train_set), 4),
                "lr": lr,
                **record,
                "images_per_s": round(count * args.batch_size / seconds, 1),
                "peak_memory_mib": util.peak_memory_mib(device),
                "codes_in_batch": codes_in_batch(indices, model.quantizer.stage_axis),
            }
            if main_process:
                log(record)
                report(record, bar, bar_shown, steps)
            sums, interval_start = {}, time.perf_counter()
        if done % save_interval == 0 or done == steps:
            paused = time.perf_counter()
            result = assess(done)
            interval_start += time.perf_counter() - paused
    bar.close()

    # -----------------------------------------------------------------------------------
    # Results
    # -----------------------------------------------------------------------------------
    results = {
        "name": model.quantizer.name,
        **result,
        "parameters": weights,
        "steps": steps,
        "batch_size": args.batch_size,
        "images_seen": steps * args.batch_size,
        "train_images": len(train_set),
        "seconds": round(time.perf_counter() - started, 1),
        "seed": args.seed,
        "precision": precision,
        "train_data": args.train_data_path,
        "val_data": args.val_data_path,
        "checkpoint": "last.pt",
        "environment": util.environment(device),
        "args": vars(args),
    }
    if main_process:
        util.write_json(run / "results.json", results)
        (run / "results.txt").write_text(format_results(result) + "\n")
        print(f"\n{format_results(result)}\n\nresults, pictures and checkpoints: {run}", flush=True)
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
        images = normalize(batch).contiguous(memory_format=torch.channels_last)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.bf16):
            reconstruction, indices, quantizer_loss = self.model(images)
            return self.criterion(images, reconstruction, quantizer_loss), indices


def run_folder(args, model: VQVAE) -> Path | str:
    """Make the run folder and return it, or the reason why it cannot be used."""
    if args.save is None:
        name = f"{model.quantizer.name}-f{model.f}-c{args.channel}-s{args.seed}"
        names = [name, *(f"{name}-{i}" for i in range(2, 10_000))]
        folder = next(p for p in (Path("runs", n) for n in names) if not p.exists())
    else:
        folder = Path(args.save)
        if folder.exists() and not folder.is_dir():
            return f"--save {folder} is a file: give a folder"
        if (folder / "args.json").exists():
            if not args.overwrite:
                return f"{folder} already holds a run: give another --save, or --overwrite it"
            for name in ("metrics.jsonl", "results.json", "results.txt", "best.pt", "last.pt"):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / "samples", ignore_errors=True)
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"run folder {folder} cannot be made ({error.strerror}): give another --save"
    return folder


def draw_samples(model: VQVAE, images, device: torch.device, path: Path) -> None:
    """A PNG of the first validation images, the originals over their reconstructions."""
    originals = normalize(torch.stack([images[i] for i in range(min(SAMPLES, len(images)))]))
    tokens = model.encode(originals.to(device))
    tokens = tokens if isinstance(tokens, tuple) else (tokens,)
    pictures = torch.cat([originals, model.decode(*tokens).float().cpu()])
    save_image(denormalize(pictures).clamp(0, 1), path, nrow=len(originals))


def mean_over_run(total: Tensor, count: int) -> float:
    """The mean over `count` steps and all processes of a term whose sum is `total`."""
    total = total.clone()
    if util.world_size() > 1:
        torch.distributed.all_reduce(total)
    return total.item() / count / util.world_size()


def codes_in_batch(indices: Tensor, stage_axis: bool) -> list[int]:
    """Number of different codes of each stage in one process's batch."""
    stages = indices.unbind(-1) if stage_axis else [indices]
    return [len(torch.unique(stage)) for stage in stages]


def report(record: dict, bar: tqdm, bar_shown: bool, steps: int) -> None:
    """Show a log record: in the bar on a terminal, else as a line."""
    speed = f"{record['images_per_s']:.0f}"
    if bar_shown:
        bar.set_postfix(loss=f"{record['loss']:.4f}", lr=f"{record['lr']:.2e}", images_s=speed)
        return
    terms = "  ".join(
        f"{name} {record[name]:.4f}"
        for name in ("loss", "l1", "perceptual", "codebook", "grad_norm")
        if name in record
    )
    print(
        f"step {record['step']}/{steps}  epoch {record['epoch']:.2f}  {terms}  "
        f"lr {record['lr']:.2e}  {speed} images/s",
        flush=True,
    )


if __name__ == "__main__":
    util.run_script(main)
