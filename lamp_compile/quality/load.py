"""Load a model from a local folder: safetensors only, no code from the folder, nothing downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lamp_compile.errors import InputError, ModelError
from lamp_compile.quality import windows
from lamp_compile.quality.windows import Encode


def model_folder(path: str | Path) -> Path:
    """Check that ``path`` is a model folder that can be read safely.

    Raises:
        InputError: It is no folder, has no config.json, or holds no safetensors weights.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(
            f"{str(path)!r} is no folder",
            where="MODEL",
            fix="a local folder with config.json and *.safetensors; nothing is downloaded",
        )
    if not (folder / "config.json").is_file():
        raise InputError("the folder has no config.json", where=str(folder), fix="a folder written by save_pretrained")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        raise InputError(
            f"the folder has no safetensors weights, only {pickled[0]}"
            if pickled
            else "the folder has no safetensors weights",
            where=str(folder),
            fix="convert them: pickled weights run code when they are read"
            if pickled
            else "a folder written by save_pretrained",
        )
    return folder


def load_model(
    path: str | Path, *, dtype: torch.dtype | str = torch.float32, device: str | torch.device = "cpu"
) -> Any:
    """The causal language model of a local folder, in evaluation mode. ``dtype="auto"`` takes the one it is stored in.

    Raises:
        InputError: See ``model_folder``.
        ModelError: transformers is missing, or cannot load the model.
    """
    folder = model_folder(path)
    transformers = _transformers()
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"cannot load the model: {reason[0]}", where=str(folder), fix="a causal language model of transformers"
        ) from error
    # transformers makes up what it does not find and only warns; numbers measured on that would mean nothing.
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{len(missing)} weights are not in the folder, the first is {missing[0]}",
            where=str(folder),
            fix="a folder whose weights belong to its config.json",
        )
    assert isinstance(model, nn.Module)
    return model.to(checked_device(device)).eval()


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a local folder.

    Raises:
        InputError: See ``model_folder``; or the folder has none.
        ModelError: transformers is missing.
    """
    folder = model_folder(path)
    transformers = _transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            "the folder has no usable tokenizer", where=str(folder), fix="give text as *.u16 token ids"
        ) from error


def encoder(path: str | Path) -> Encode:
    """The folder's tokenizer, without special tokens and without its warning about long texts.

    Raises:
        InputError, ModelError: See ``load_tokenizer``.
    """
    tokenizer = load_tokenizer(path)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return encode


def load_windows(model: Any, folder: str | Path, text: str | Path, context: int, count: int) -> Tensor:
    """``count`` windows of ``context`` tokens of a file, int64 ``[count, context]``; text is read by the folder's
    tokenizer.

    Raises:
        InputError: See ``windows.token_ids`` and ``windows.spread``.
    """
    encode = None if str(text).endswith(".u16") else encoder(folder)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return windows.spread(windows.token_ids(text, encode, vocabulary=vocabulary), context, count, where=str(text))


def checked_device(device: str | torch.device) -> torch.device:
    """The device, if it is there.

    Raises:
        InputError: Unknown, or not available here.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device {device!r}", where="device", fix="cpu or cuda") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "no CUDA or ROCm device is available", where="device", fix="device cpu; `lamp-compile doctor` says more"
        )
    return found


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            "transformers is not installed", where="MODEL", fix="pip install 'lamp_compile[hf]'"
        ) from error
    return transformers
