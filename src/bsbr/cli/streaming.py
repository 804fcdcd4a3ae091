"""Text of a model on a terminal, word by word; what a terminal would obey is shown, not sent."""

import sys
import time
from typing import Any

from transformers import TextStreamer

from bsbr.terminal import harmless


class TerminalStreamer(TextStreamer):
    """Prints what a model writes to standard output as soon as a word is whole, without the prompt.

    Args:
        tokenizer: turns tokens into text; special tokens are left out.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.first_token: float | None = None
        """Time of the first token, on the clock of `time.perf_counter`."""

    def put(self, value: Any) -> None:
        """Take the next tokens; transformers sends the prompt first."""
        if not self.next_tokens_are_prompt and self.first_token is None:
            self.first_token = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of text."""
        sys.stdout.write(harmless(text) + ("\n" if stream_end else ""))
        sys.stdout.flush()
