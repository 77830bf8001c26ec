"""Directories that people give in place of a checkpoint: what each is called, and what to do instead."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from checkpoint.atomic import TEMPORARY
from core.errors import UserError
from core.files import require_folder

ADAPTER = ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json")  # as peft saves one
FORMATS = {
    ".gguf": "GGUF, llama.cpp's format; get the safetensors files that it was made from",
    ".onnx": "ONNX; get the safetensors files that it was made from",
    ".h5": "TensorFlow's format; get the safetensors files",
    ".msgpack": "Flax's format; get the safetensors files",
} | dict.fromkeys(
    (".bin", ".pt", ".pth"), "pickles, which can run code and are not read; save them as safetensors (save_pretrained)"
)
SHOWN = 3  # directories that a message names


def require_checkpoint(folder: Path) -> None:
    """Raises UserError unless this is a directory, and where it holds something else than a checkpoint: the message
    says what it is and what to give. A checkpoint with something missing passes."""
    if (format := FORMATS.get(folder.suffix)) and folder.is_file():
        raise UserError(f"{folder}: {format}")
    require_folder(folder)
    names = sorted(os.listdir(folder))
    weights = [name for name in names if name.endswith(".safetensors") and name not in ADAPTER]
    if adapter := next((name for name in ADAPTER if name in names and not (weights and name == ADAPTER[-1])), None):
        beside = "beside the weights" if weights else "and no whole model"
        how = "merge it into its base model (peft: merge_and_unload), save that, and give its directory"
        raise UserError(f"{folder}: {adapter} is an adapter's, {beside}; {how}")
    if file := next((name for name in names if name.startswith(("model_index.json", "diffusion_pytorch_model"))), None):
        raise UserError(f"{folder}: {file} is a diffusers pipeline's, not a language model's; give another checkpoint")
    if weights or any(name.startswith(TEMPORARY) for name in names):
        return
    if not names:
        raise UserError(f"{folder}: empty; give the directory of a checkpoint")
    if "snapshots" in names and "blobs" in names:
        where = f"one of its snapshots, {_listed(found)}" if (found := list(_snapshots(folder))) else "a snapshot"
        lack = "" if found else "; it has none: download the model again"
        raise UserError(f"{folder}: a cache of the Hugging Face Hub; give {where}{lack}")
    for name in names:
        if (format := FORMATS.get(os.path.splitext(name)[1])) and (folder / name).is_file():
            shown = name if name.isprintable() else repr(name)
            raise UserError(f"{folder}: no .safetensors files; {shown} is {format}")
    if below := list(_checkpoints_below(folder)):
        raise UserError(f"{folder}: no checkpoint itself; give {_listed(below)}")


def _listed(folders: Iterable[Path]) -> str:
    paths = [str(path) if str(path).isprintable() else repr(str(path)) for path in folders]
    more = f" or one of {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return " or ".join(paths[:SHOWN]) + more


def _snapshots(cache: Path) -> Iterator[Path]:
    """The snapshots of a model in the Hub's cache, that of the branch `main` first."""
    try:
        main = (cache / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = ""
    folders = sorted(_folders(cache / "snapshots"), key=lambda path: (path.name != main, path.name))
    return (path for path in folders if _has_weights(path))


def _checkpoints_below(folder: Path) -> Iterator[Path]:
    for path in _folders(folder):
        if _has_weights(path):
            yield path
        elif path.name.startswith("models--"):
            yield from list(_snapshots(path))[:1]


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())
    except OSError:
        return []


def _has_weights(folder: Path) -> bool:
    try:
        return any(name.endswith(".safetensors") for name in os.listdir(folder))
    except OSError:
        return False
