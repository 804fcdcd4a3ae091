"""Measurements kept as they are made: one JSON line each, so that an interrupted run loses at most one."""

import base64
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bsbr.errors import UserError
from bsbr.files import write_atomic, write_error

SCHEMA = "bsbr.records"
VERSION = 2


def digest(*parts: Any) -> str:
    """SHA-256 of anything JSON can hold, the same on every machine.

    Args:
        parts: nested dicts, lists, strings, numbers.
    Returns:
        64 hexadecimal digits.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def pack(values: ArrayLike) -> str:
    """Hold a vector of numbers in a short string, in float32 precision.

    Args:
        values: numbers, [T].
    Returns:
        base64 of the deflated little-endian float32 values.

    Example:
        >>> unpack(pack([0.5, 2.0])).tolist()
        [0.5, 2.0]
    """
    raw = np.asarray(values, dtype="<f4").tobytes()
    return base64.b64encode(zlib.compress(raw, 6)).decode("ascii")


def unpack(text: str) -> np.ndarray:
    """Give back what `pack` held.

    Args:
        text: from `pack`.
    Returns:
        A float32 vector, [T].
    """
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<f4")


class RecordStore:
    """An append-only file of measurements, keyed, that a later run of the same protocol can go on from.

    The first line names the protocol digest; every other line is one record with its key. Each line is handed
    to the system in one write, so a kill leaves at most a torn last line, which the next run drops. Each record has the
    SHA-256 of itself, so that a damaged one is not taken up.

    Args:
        path: the file, made with its folder if missing.
        protocol: digest of everything that decides the measurements (models, texts, settings).
        resume: go on from what the file holds; otherwise it starts empty.
    Raises:
        UserError: the file cannot be written, is damaged, or belongs to another protocol.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with RecordStore(Path(folder) / "records.jsonl", "abc") as store:
        ...         store.append(("speed", 128), {"time_s": 1.5})
        ...     with RecordStore(Path(folder) / "records.jsonl", "abc", resume=True) as store:
        ...         store.get(("speed", 128))
        {'time_s': 1.5}
    """

    def __init__(self, path: str | Path, protocol: str, *, resume: bool = False) -> None:
        self.path = Path(path)
        self._records: dict[str, dict[str, Any]] = {}
        kept = self._read(protocol) if resume and self.path.exists() else 0
        self.resumed = len(self._records)
        """How many records an earlier run had left."""
        header = {"schema": {"name": SCHEMA, "version": VERSION}, "protocol": protocol}
        if not kept:
            write_atomic(self.path, json.dumps(header) + "\n")
        try:
            # an object and no bare descriptor: one that Ctrl-C leaves behind is closed with it
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            if kept:
                self._file.truncate(kept)
        except OSError as error:
            raise write_error("records", Path(self.path.name), error) from error

    def __enter__(self) -> "RecordStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return _key(key) in self._records

    def get(self, key: tuple[Any, ...]) -> dict[str, Any]:
        """Return the record of a key.

        Args:
            key: strings and integers.
        Returns:
            The content given to `append`.
        Raises:
            KeyError: nothing was measured under that key.
        """
        return self._records[_key(key)]

    def append(self, key: tuple[Any, ...], content: dict[str, Any]) -> None:
        """Keep one measurement.

        Args:
            key: strings and integers that name the item; once only.
            content: what JSON can hold, without NaN.
        Raises:
            UserError: the disk is full or the file went away.
            ValueError: the key is already there, or the content holds NaN.
        """
        name = _key(key)
        if name in self._records:
            raise ValueError(f"record {name} is already kept: each item is measured once")
        # Digested and kept as a later run would read it, so that resuming cannot change a digit or an order.
        made = json.loads(json.dumps({"key": list(key), "content": content}, allow_nan=False))
        line = json.dumps(made | {"sha256": digest(made)}, sort_keys=True, allow_nan=False) + "\n"
        data = line.encode()
        try:
            while data:
                data = data[os.write(self._file.fileno(), data) :]
        except OSError as error:
            raise write_error("records", Path(self.path.name), error) from error
        self._records[name] = made["content"]

    def close(self) -> None:
        """Flush to the disk and close; a second call does nothing."""
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise write_error("records", Path(self.path.name), error) from error
        finally:
            self._file.close()

    def _read(self, protocol: str) -> int:
        """Load the whole lines and return how many bytes they take."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise UserError(f'records "{self.path.name}" cannot be read: {error.strerror or error}') from error
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                if number == 1:
                    self._check(entry["schema"], entry["protocol"], protocol)
                elif entry.pop("sha256") != digest(entry):
                    raise ValueError("a value was changed")
                else:
                    self._records[_key(tuple(entry["key"]))] = entry["content"]
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f'records "{self.path.name}" line {number} is damaged. Start anew without --resume'
                ) from error
        return len(whole)

    def _check(self, schema: Any, found: str, wanted: str) -> None:
        if schema != {"name": SCHEMA, "version": VERSION}:
            raise UserError(f'records "{self.path.name}" have another format: {schema}. Start anew without --resume')
        if found != wanted:
            raise UserError(
                f'records "{self.path.name}" belong to another run (other models, texts or settings). '
                "Repeat the earlier settings, choose another --output, or start anew without --resume"
            )


def _key(key: tuple[Any, ...]) -> str:
    return json.dumps(list(key), separators=(",", ":"))
