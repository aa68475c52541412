"""The trained encoder out of a run, written as a file for other programs, with its model card beside it.

    python -m varscale.export --checkpoint runs/cifar10-varcon --out encoder.safetensors
    python -m varscale.export --checkpoint runs/cifar10-varcon --out encoder.onnx

A .safetensors file holds the encoder alone, under the names of torchvision's or timm's model without its classifier;
its header says how images must be prepared. An .onnx file holds the same, and is compared with torch before it is kept.
"""

import argparse
import os
import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn

from varscale import __version__
from varscale.encoder.card import model_card
from varscale.encoder.description import Description
from varscale.encoder.names import NAMES, loading_code
from varscale.encoder.onnx import OPSET, TOLERANCE, check_installed, onnx_code, onnx_difference, write_onnx
from varscale.encoder.runs import trained_encoder, training_data
from varscale.engine.launch import report_user_error
from varscale.engine.rundir import find_checkpoint
from varscale.errors import UserError

SUFFIXES = (".safetensors", ".onnx")


def export_encoder(
    run: Path,
    out: Path,
    *,
    names: str | None = None,
    data: Path | None = None,
    overwrite: bool = False,
) -> dict[str, str]:
    """Write the encoder of a run to `out`, its card to `out`.md, and return the header's metadata.

    Each file appears whole or not at all, the card first: there is no encoder without one.

    Args:
        run: a run, or one checkpoint in it.
        out: the suffix decides on the format, .safetensors or .onnx.
        names: the parameters' in a .safetensors file, "torchvision" (as where it is None) or "timm".
        data: where the run's data set lies, if no longer where its configuration says; only its description is read.
        overwrite: replace what is there.

    Raises:
        UserError: as trained_encoder; `out` is of no known kind, exists and may not be overwritten, or cannot be
            written; a package is missing; onnxruntime computes other features than torch.
    """
    card = out.with_name(f"{out.name}.md")
    _check_place(out, card, names, overwrite)
    run, checkpoint = find_checkpoint(run)
    encoder, config, step = trained_encoder(checkpoint)
    info = training_data(run, config, *([data] if data else []))
    description = Description.of_run(config, info, encoder.feature_dim, step)
    metadata = description.header() | {"varscale": __version__}
    aside = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in (card, out)}
    try:
        if out.suffix == ".onnx":
            code = onnx_code(out.name)
            metadata |= _write_checked_onnx(encoder, description, aside[out], metadata)
        else:
            names = names or "torchvision"
            code = loading_code(description, names, out.name)
            metadata |= {"format": "pt", "names": names, "load": code}
            tensors = {NAMES[names](key): tensor.contiguous() for key, tensor in encoder.state_dict().items()}
            aside[out].write_bytes(save(tensors, metadata))  # save_file's would be its owner's alone to read
        text = model_card(run, checkpoint, description, info, file=out.name, code=code)
        aside[card].write_text(text, encoding="utf-8")
        for path, written in aside.items():
            written.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out}: cannot be written ({error})") from None
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)
    return metadata


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m varscale.export", description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="a run, or one checkpoint in it")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the .safetensors or .onnx file to write; FILE.md too"
    )
    parser.add_argument("--names", choices=[*NAMES], help="of a .safetensors file's parameters (default: torchvision)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE and FILE.md if they exist")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the run's data set, if it was moved")
    options = parser.parse_args(arguments)
    try:
        metadata = export_encoder(
            options.checkpoint, options.out, names=options.names, data=options.data, overwrite=options.overwrite
        )
    except UserError as error:
        return report_user_error(error)
    print(f"{options.out}  {options.out.stat().st_size / 2**20:.1f} MiB, model card {options.out}.md")
    for key, value in metadata.items():
        if key != "load":
            print(f"  {key:<14} {value}")
    return 0


def _check_place(out: Path, card: Path, names: str | None, overwrite: bool) -> None:
    """Refuse what cannot be written, before anything is loaded. Raises UserError."""
    for path in (out, card):
        if path.exists() and (path.is_dir() or not overwrite):
            hint = "choose another name" if path.is_dir() else "add --overwrite or choose another name"
            raise UserError(f"--out {out}: {path} exists already; {hint}")
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: its suffix is {out.suffix!r}, but must be {' or '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")
    if out.suffix == ".onnx":
        if names:
            raise UserError(f"--names {names}: belongs to a .safetensors file; an .onnx file is its own model")
        check_installed()


def _write_checked_onnx(
    encoder: nn.Module, description: Description, path: Path, metadata: dict[str, str]
) -> dict[str, str]:
    """Write it, compare it with torch, and return what is to be told of that. Raises UserError where they differ."""
    write_onnx(encoder, description.image_size, path, metadata)
    difference, largest = onnx_difference(encoder, description.image_size, path)
    if not difference <= TOLERANCE * largest:
        raise UserError(
            f"onnxruntime's features differ from torch's by up to {difference:.2g} (largest feature {largest:.2g}): "
            "nothing was written; try other versions of onnxscript and onnxruntime"
        )
    return {"opset": str(OPSET), "difference": f"{difference:.1e} from torch at most, largest feature {largest:.2g}"}


if __name__ == "__main__":
    sys.exit(main())
