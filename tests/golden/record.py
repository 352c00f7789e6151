"""Records what a redesign must not change: losses, weights, checkpoints, files and images.

    python tests/golden/record.py OUT

trains nine tiny configurations for 20 steps on generated images and writes `frozen.json` (the loss
of every step, the loss terms, a checksum and the norms of the final weights), and for every
quantizer a checkpoint NAME.pt, a `.rfsq` file and the PNG that it decodes to. `test_frozen.py`
compares the code with the files that stand beside this one, which commit 1350f45 wrote; run it
again only for a change that is meant to alter numbers, and say so in CHANGELOG.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import platform
import sys
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

STEPS = 20
SIZE = (
    "--train-data-path synthetic --val-data-path synthetic --img-size 32 --channel 16 "
    f"--batch-size 8 --train-iters {STEPS} --perceptual-weight 0 --lr 0.005 --num-workers 0 "
    "--log-interval 1 --seed 0"
).split()
RFSQ = {  # name: flags
    f"rfsq-{stages}-{strategy}": f"--rfsq-stages {stages} --rfsq-strategy {strategy}"
    + " --rfsq-initial-scale 1" * (strategy == "scale")  # the default of that time
    for stages in (2, 4)
    for strategy in ("none", "scale", "layernorm")
}
FROZEN = {
    **RFSQ,
    "fsq": "--quantizer fsq --levels 8 8 8 8",
    "lfq": "--quantizer lfq --lfq-dim 12",
    "ema": "--quantizer ema --n-embed 64 --embed-dim 8",
}
ALSO_CODECS = {
    "rfsq-2-layernorm-image": "--rfsq-statistics image",
    "ema-residual": "--quantizer ema --n-embed 48 --embed-dim 8 --ema-stages 2",
    "geometric": "--rfsq-strategy geometric --levels 8 4 4 2 --network dct",
}
NOT_CODECS = ("rfsq-4-none", "rfsq-4-scale", "rfsq-4-layernorm")
CODED = "rfsq-2-layernorm"  # this one is entropy-coded as well
RESUMABLE = "rfsq-2-layernorm"  # its checkpoint keeps the state of training


def machine() -> str:
    """What the last bits of a result may depend on."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {platform.machine()}, {capability}"


def train(flags: str, folder: Path) -> dict:
    """Train with one thread; the losses of all steps and the final weights."""
    import train as training

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        training.main([*SIZE, *flags.split(), "--save", str(folder)])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    state = torch.load(folder / "last.pt", weights_only=True)["model"]
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.contiguous().numpy().tobytes())
    steps = [record for record in records if record["kind"] == "train"]
    (validation,) = (record for record in records if record["kind"] == "val")
    return {
        "loss": [record["loss"] for record in steps],
        "grad_norm": [record["grad_norm"] for record in steps],
        "psnr": validation["psnr"],
        "norms": {name: value.double().norm().item() for name, value in sorted(state.items())},
        "sha256": digest.hexdigest(),
    }


def main(out: Path) -> None:
    from dataset import SyntheticDataset
    from scripts import compress

    out.mkdir(parents=True, exist_ok=True)
    image = SyntheticDataset(48, seed=3, length=1)[0][:, :37, :45]  # no multiple of f
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(out / "image.png")
    runs = out / "runs"
    frozen = {}
    for name, flags in {**FROZEN, **ALSO_CODECS}.items():
        record = train(flags, runs / name)
        if name in FROZEN:
            frozen[name] = record
        if name in NOT_CODECS:
            continue
        state = torch.load(runs / name / "last.pt", weights_only=True)
        if name != RESUMABLE:
            state = {key: state[key] for key in ("model", "args", "step")}
        save(out / f"{name}.pt", state)
        files = [(name, f"{name}.pt", [])]
        load = ["--load", str(out / f"{name}.pt"), "--force"]
        if name == CODED:
            coded = f"{name}-coded"
            compress.main(["fit", str(out / "image.png"), *load, "--out", str(out / f"{coded}.pt")])
            small = torch.load(out / f"{coded}.pt", weights_only=True)
            save(
                out / f"{coded}.pt",
                {k: small[k] for k in ("model", "args", "step", "entropy_model")},
            )
            files.append((coded, f"{coded}.pt", ["--entropy-coding"]))
        for stem, checkpoint, options in files:
            work = out / "work"
            load = ["--load", str(out / checkpoint), "--force"]
            compress.main(["encode", str(out / "image.png"), *load, "--out", str(work), *options])
            (work / "image.rfsq").replace(out / f"{stem}.rfsq")
            compress.main(["decode", str(out / f"{stem}.rfsq"), *load, "--out", str(out)])
    (out / "frozen.json").write_text(
        json.dumps({"machine": machine(), "steps": STEPS, "runs": frozen}, indent=1) + "\n"
    )


def save(path: Path, state: dict) -> None:
    state = {key: value for key, value in state.items() if key not in ("format", "checksum")}
    state["args"] = {**state["args"], "save": f"runs/{path.stem}"}  # no folder of this machine
    try:
        from checkpoint import save_checkpoint
    except ImportError:  # as at commit 1350f45
        from util import save_checkpoint
    save_checkpoint(path, state)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
