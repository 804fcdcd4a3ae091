"""What steps will read, made by other processes while the device works on the steps before."""

import multiprocessing
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection

import numpy as np
from safetensors.numpy import load, save

Arrays = Mapping[str, np.ndarray]


class Ahead:
    """Arrays that are a function of the step, made ahead of time, each by the process whose turn it is.

    The processes end with this one, however it ends: each waits on a pipe whose other end only this one holds.

    Args:
        make: arrays of a step, from 0; a function that other processes can import.
        workers: processes; 0 makes what is asked for when it is asked for, in this one.
        depth: steps that are made ahead.

    Example:
        >>> Ahead(lambda step: {"double": np.array([2 * step])}, workers=0).at(3)["double"]
        array([6])
    """

    def __init__(self, make: Callable[[int], Arrays], *, workers: int, depth: int = 16) -> None:
        self._make, self._depth = make, depth
        self._pipes: list[Connection] = []
        self._next = self._asked = 0  # the step whose arrays come next, and the first that is not asked for
        # a fork would copy threads and a device that cannot be shared
        context = multiprocessing.get_context("spawn")
        for _ in range(workers):
            ours, theirs = context.Pipe()
            context.Process(target=_serve, args=(make, theirs), daemon=True).start()
            theirs.close()
            self._pipes.append(ours)

    def at(self, step: int) -> Arrays:
        """Return the arrays of a step, soonest where steps are asked for in order."""
        if not self._pipes:
            return self._make(step)
        if step != self._next:
            while self._next < self._asked:
                self._take()
            self._next = self._asked = step
        while self._asked < step + self._depth:
            self._pipe(self._asked).send_bytes(str(self._asked).encode())
            self._asked += 1
        return load(self._take())

    def _take(self) -> bytes:
        found = self._pipe(self._next).recv_bytes()
        self._next += 1
        return found

    def _pipe(self, step: int) -> Connection:
        return self._pipes[step % len(self._pipes)]


def _serve(make: Callable[[int], Arrays], pipe: Connection) -> None:
    while True:
        try:
            pipe.send_bytes(save(dict(make(int(pipe.recv_bytes())))))
        except (EOFError, BrokenPipeError, ConnectionResetError):  # the trainer has ended
            return
