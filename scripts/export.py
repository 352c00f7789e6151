"""Write a model in the form that other tools read: `model.safetensors` and `config.json`.

    python scripts/export.py --load runs/NAME/last.pt --out weights/NAME

    model.safetensors   the state dict of `model.VQVAE`
    config.json         the flags of the architecture, the format's version and a checksum; under
                        "training" what scripts take as defaults: image size, name, step, LPIPS
    README.md           a model card, with the results if the run's folder has them

Every --load, and `model.load_model`, takes such a folder. The optimizer, the random states and the
entropy model of `compress.py fit` stay in the checkpoint.
"""

from __future__ import annotations

import argparse
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import exits
import output
from arguments import DEFAULTS_OF_MODEL, LOAD_HELP, Parser
from checkpoint import CONFIG, ENTROPY_MODEL, WEIGHTS, save_export
from dataset import GENERATED
from files import make_folder, parse_json, write_whole
from flags import architecture_flags, unread_flags
from model import VQVAE, load_model
from tables.results import lacking, parts_of, without_places

CARD = "README.md"


def results_of(path: str, step: int | None, architecture: dict) -> tuple[dict, str] | None:
    """results.json and results.txt beside a checkpoint, if they are of its step and its model."""
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    try:
        results = parse_json((folder / "results.json").read_bytes())
        table = (folder / "results.txt").read_text()
    except (OSError, ValueError):
        return None
    if lacking(results) or results["steps"] != step:
        return None
    flags = results["args"]
    same = all(flags[flag] == value for flag, value in architecture.items() if flag in flags)
    return (results, table) if same else None


def model_card(
    model: VQVAE,
    name: str,
    flags: dict,
    step: int | None,
    results: tuple[dict, str] | None,
    licence: str | None,
) -> str:
    """The text of the model card, Markdown; its first lines are what model hubs read."""
    quantizer, parameters = model.quantizer, sum(p.numel() for p in model.parameters())
    rows = [
        ("quantizer", quantizer.name),
        ("bits per position", f"{quantizer.bits:.4g}"),
        *([("bits per image, beside these", f"{side:g}")] if (side := quantizer.side_bits) else []),
        ("codes of each stage", ", ".join(map(str, quantizer.codebook_sizes))),
        ("pixels a position", f"{model.f}x{model.f}"),
        ("parameters", f"{parameters:,}"),
        ("training steps", "unknown" if step is None else f"{step:,}"),
        *((f"`--{flag.replace('_', '-')}`", value) for flag, value in flags.items()),
    ]
    tokens = "indices, statistics" if quantizer.side_bits else "indices"
    about = [f"license: {licence}"] if licence else []
    parts = [
        "\n".join(["---", *about, "tags:", "- image-tokenizer", "- rfsq", "---"]),
        f"# {name}",
        "An image tokenizer of the RFSQ project (residual finite scalar quantization). In a "
        "checkout of it, every `--load` takes this folder, and in Python:",
        '```python\nfrom model import load_model\n\nmodel = load_model("FOLDER").model\n'
        f"{tokens} = model.encode(images)  # float images (B, 3, H, W) in [0, 1]\n"
        f"images = model.decode({tokens}).clamp(0, 1)\n```",
        output.markdown_table(("", "value"), rows),
        "## Results",
    ]
    if results is None:
        parts.append("Not measured.")
    else:
        values, table = results
        commits = dict.fromkeys(part.get("commit") or "unknown" for part in parts_of(values))
        command = without_places(values["environment"]["command"])
        data = {split: Path(values[f"{split}_data"]).name for split in ("train", "val")}
        among = f", drawn from the {values['train_images']:,} of `{data['train']}`"
        if values["train_data"] == GENERATED:
            among = ", all of them generated"
        parts += [
            f"```\n{table.strip()}\n```",
            f"Training saw {values['images_seen']:,} images{among}; "
            f"the table is of the images of `{data['val']}`. Commit {', '.join(commits)}; command:",
            f"```\n{command}\n```",
        ]
    return "\n\n".join(parts) + "\n"


def licence(text: str) -> str:
    """The value of `--license`, which must not break the card's first lines."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", text):
        raise argparse.ArgumentTypeError(
            f"'{output.printable(text)}' is not an identifier such as mit or cc-by-4.0"
        )
    return text


def prepare_folder(folder: Path, force: bool) -> None:
    """Make the folder for an export.

    Raises:
        ValueError: it holds other files, or an export without `force`.
    """
    make_folder(folder, "give another --out")
    held = {path.name for path in folder.iterdir() if path.name[0] != "."}
    if other := sorted(held - {WEIGHTS, CONFIG, CARD}):
        raise ValueError(f"{folder} holds other files ('{other[0]}'): give a new folder as --out")
    if held and not force:
        raise ValueError(f"{folder} holds a model: give another --out, or --force to replace it")


def export(flags: Namespace) -> Path:
    """Export as the flags say, and return the folder. ValueError for bad input."""
    model, args, saved = load_model(flags.load)
    step, name = saved.get("step"), output.printable(args.name or model.quantizer.name)
    # As they are in the checkpoint: the fingerprint of `.rfsq` files covers them.
    names = [flag for flag in architecture_flags() if flag in saved["args"]]
    architecture = {flag: saved["args"][flag] for flag in names}
    training = {"step": step, **{flag: getattr(args, flag) for flag in DEFAULTS_OF_MODEL}}
    out = Path(flags.out)
    unread = unread_flags(model.quantizer)
    rows = {k: v for k, v in architecture.items() if k not in unread}
    given = {k: v for k, v in rows.items() if v is not None and v is not False}
    results = results_of(flags.load, step, architecture)
    card = model_card(model, name, given, step, results, flags.license)
    data = card.encode(errors="backslashreplace")  # names need not be Unicode
    prepare_folder(out, flags.force)
    save_export(out, saved["model"], architecture, training)
    write_whole(out / CARD, lambda file: file.write(data))
    size = (out / WEIGHTS).stat().st_size
    print(f"{name}, step {step}: {out}, {size:,} bytes of weights")
    if ENTROPY_MODEL in saved:
        print("the entropy model of `compress.py fit` is not exported: run `fit` on the export")
    return out


def main(argv: Sequence[str] | None = None) -> Path:
    """Export as the flags say, and return the folder. ValueError for bad input."""
    parser = Parser.of(__file__, __doc__)
    parser.add_argument("--load", required=True, metavar="MODEL", help=LOAD_HELP)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace the model in DIR")
    text = "licence of the weights for the model card, as model hubs abbreviate it: mit, cc-by-4.0"
    parser.add_argument("--license", type=licence, metavar="ID", help=text)
    return export(parser.parse_args(argv))


if __name__ == "__main__":
    exits.run_script(main)
