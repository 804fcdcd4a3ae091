"""Models and texts by the names users give them."""

from pathlib import Path
from typing import Any

from bsbr.data.embedded import EMBEDDED, EMBEDDED_MODEL, calibration_text, evaluation_texts
from bsbr.data.text import read_documents, read_text
from bsbr.errors import UserError
from bsbr.hf.loading import load_model, load_tokenizer
from bsbr.hf.saving import save_whole


def load(name: str, dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Args:
        name: a folder, a hub name, or "embedded".
        dtype: torch name of the weights' dtype.
        device: where to put the model.
    Returns:
        The model in eval mode, and the tokenizer.
    Raises:
        UserError: it cannot be loaded.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar per load says nothing a user waits for
    place = EMBEDDED_MODEL if name == EMBEDDED else name
    return load_model(place, dtype=dtype, device=device), load_tokenizer(place)


def read_calibration_text(name: str) -> str | None:
    """Return the text to calibrate on.

    Args:
        name: a file, "embedded", or "none".
    Returns:
        The text, or None for "none".
    Raises:
        UserError: the file cannot be read.
    """
    if name == "none":
        return None
    return calibration_text() if name == EMBEDDED else read_text(name)


def load_with_texts(
    name: str, files: list[str] | None, dtype: str = "float32", device: str = "cpu"
) -> tuple[Any, Any, dict[str, list[str]]]:
    """Load a model, its tokenizer and the texts to evaluate on; files are read first, as they fail faster.

    The published experiment read WikiText-103; a hub model without files does too, through `datasets`.

    Args:
        name: the model's, as for `load`.
        files: text files, or None.
        dtype: as for `load`.
        device: as for `load`.
    Returns:
        The model in eval mode, the tokenizer, and name of each text to its documents.
    Raises:
        UserError: a file cannot be read, the model cannot be loaded, or the data set cannot be had.
    """
    texts = {Path(file).name.split(".")[0]: read_documents(file) for file in files or ()}
    model, tokenizer = load(name, dtype, device)
    if not texts:
        stays_here = name == EMBEDDED or Path(name).is_dir()
        texts = evaluation_texts() if stays_here else {"wikitext": _wikitext_103()}
    return model, tokenizer, texts


def _wikitext_103() -> list[str]:
    advice = "Give --text FILE, or run: bsbr evaluate embedded"
    try:
        from datasets import load_dataset
        from huggingface_hub.utils import logging
    except ImportError:
        raise UserError(f"WikiText-103 needs the package datasets: pip install 'bsbr[datasets]'. {advice}") from None
    logging.set_verbosity_error()  # each failed try would be a line
    try:
        lines = load_dataset("Salesforce/wikitext", "wikitext-103-raw-v1", split="test")["text"]
    except Exception as error:  # whatever the hub, the network or the cache raise: the user needs one line
        raise UserError(f"WikiText-103 cannot be had ({type(error).__name__}): no hub access? {advice}") from error
    from bsbr.data.text import split_articles

    return split_articles("".join(lines))


def save(model: Any, tokenizer: Any, output: Path) -> None:
    """Save a model and its tokenizer so that the folder is whole or untouched.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        output: the folder; its files of the same names are replaced.
    Raises:
        UserError: the folder cannot be written.
    """

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    save_whole(output, write)
