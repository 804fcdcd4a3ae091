"""What a result file says about how it was made: enough to run it again, nothing about who ran it."""

import functools
import hashlib
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch

from bsbr import __version__

SCHEMA = "bsbr.evaluation"
VERSION = 1


def header(
    *,
    status: str,
    command: Sequence[str],
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    protocol: Mapping[str, Any],
    config: Mapping[str, Any],
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """The keys that every result file opens with.

    Args:
        status: "complete" or "partial".
        command: the arguments that started the run; folders are taken off absolute paths.
        model: from `describe_model`.
        data: texts with their digests.
        protocol: how it was measured.
        config: what was measured.
        device, dtype: where and in which type.
    Returns:
        A dict of what JSON can hold, the same for every file of a run.
    Raises:
        ValueError: an unknown status.
    """
    if status not in ("complete", "partial"):
        raise ValueError(f"status must be complete or partial, got {status!r}")
    return {
        "schema": {"name": SCHEMA, "version": VERSION},
        "status": status,
        "command": [without_folders(word) for word in command],
        "code": code_versions(),
        "machine": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "device": device_name(device),
            "dtype": dtype,
        },
        "model": dict(model),
        "data": dict(data),
        "protocol": dict(protocol),
        "config": dict(config),
    }


def describe_model(model: Any, *, name: str | None = None) -> dict[str, Any]:
    """Identify a model by its weights.

    Args:
        model: a Hugging Face model.
        name: what to call it; None takes the name it was loaded by, without folders.
    Returns:
        name, type, parameters, positions, vocabulary, sha256 of the weights.
    """
    config = model.config
    positions = getattr(config, "max_position_embeddings", None)
    return {
        "name": without_folders(name or getattr(config, "_name_or_path", "") or type(model).__name__),
        "type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "positions": positions,
        "vocabulary": config.vocab_size,
        "sha256": weights_digest(model.state_dict().items()),
    }


def weights_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of named tensors: names, types, shapes and bytes, in the order of the names.

    Args:
        tensors: names and tensors, for instance of a state dict.
    Returns:
        64 hexadecimal digits.

    Example:
        >>> weights_digest([("w", torch.zeros(2))]) == weights_digest([("w", torch.ones(2))])
        False
    """
    total = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        value = tensor.detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        total.update(value.view(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return total.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer does.

    Args:
        tokenizer: a Hugging Face tokenizer.
    Returns:
        64 hexadecimal digits: of the fast tokenizer's own description, or of the vocabulary of a slow one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def texts_digest(texts: Iterable[str]) -> str:
    """SHA-256 of a list of texts, their borders included.

    Args:
        texts: source texts.
    Returns:
        64 hexadecimal digits.
    """
    total = hashlib.sha256()
    for text in texts:
        data = text.encode()
        total.update(f"{len(data)}\n".encode() + data)
    return total.hexdigest()


def without_folders(word: str) -> str:
    """Take the folders off an absolute path, or a `--flag=` before one; other words stay.

    Args:
        word: an argument or a model name.
    Returns:
        The word, free of the names of a machine's folders.

    Example:
        >>> without_folders("/private/gpt2"), without_folders("--out=/a/b"), without_folders("org/name")
        ('gpt2', '--out=b', 'org/name')
    """
    flag, equals, value = word.partition("=")
    if not (equals and flag.startswith("-")):
        flag, equals, value = "", "", word
    if value.startswith("~") or PurePosixPath(value).is_absolute():
        value = PurePosixPath(value).name
    elif PureWindowsPath(value).drive:
        value = PureWindowsPath(value).name
    return flag + equals + value


@functools.cache
def code_versions() -> dict[str, str]:
    """Versions of the code that measures; the commit where the package runs from a git checkout.

    Returns:
        bsbr, torch, transformers, python, and commit where there is one.
    """
    versions = {
        "bsbr": __version__,
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "python": platform.python_version(),
    }
    commit = _commit()
    return versions | ({"commit": commit} if commit else {})


@functools.cache
def cpu_name() -> str:
    """The processor's model name, as the system states it.

    Returns:
        A name, or the architecture where the system states none.
    """
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """Name the device that computes.

    Args:
        device: "cpu", "cuda", "cuda:0" ...
    Returns:
        "cpu", or the accelerator's kind and model.
    """
    kind = torch.device(device).type
    return f"cuda ({torch.cuda.get_device_name(device)})" if kind == "cuda" else kind


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    """Commit of the checkout this file lies in, with "+" if its tracked files were changed."""
    folder = Path(__file__).resolve().parent
    root = next((parent for parent in folder.parents if (parent / ".git").exists()), None)
    if root is None or not (root / "src" / "bsbr").is_dir():
        return None
    words = {"head": ["rev-parse", "HEAD"], "changed": ["status", "--porcelain", "--untracked-files=no"]}
    try:
        said = {
            key: subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for key, arguments in words.items()
        }
    except (OSError, subprocess.SubprocessError):
        # No git, or no commit yet: the key is left out, as the header allows.
        return None
    return said["head"] + ("+" if said["changed"] else "")
