"""Foreign text on a terminal: what a terminal would obey is shown, not sent."""


def harmless(text: str) -> str:
    r"""Write control characters out, line ends and tabs excepted.

    Args:
        text: from a model, a file's name, an error.
    Returns:
        Text that moves no cursor, sets no colours and turns no reading direction.

    Example:
        >>> harmless("a\x1b[31mb\n")
        'a\\x1b[31mb\n'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str, length: int = 400) -> str:
    """Make a text one harmless line; of a long one the middle is left out.

    Args:
        text: an error's message, for instance.
        length: most characters.
    Returns:
        The line.

    Example:
        >>> one_line("a\\n b" + "c" * 500, 20)
        'a bcccccc ... cccccc'
    """
    text = harmless(" ".join(text[:20_000].split()))
    if len(text) <= length:
        return text
    tail = length // 3
    return f"{text[: length - tail - 5]} ... {text[-tail:]}"
