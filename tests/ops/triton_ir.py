"""Runs kernels as Triton compiles them, on a CPU: each launch is lowered to Triton's IR, and NumPy computes that.

Triton's own interpreter runs the Python of a kernel, so it knows nothing of what the compiler makes of it: types that
do not fit, values that a loop should carry and does not. It has no 16-bit floats either. No GPU is needed here; what
comes later in the compiler is not tested: layouts, loads ahead of their use, rounding of products.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

_TYPES = {
    "i1": np.bool_, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64, "f16": np.float16,
    "bf16": np.float32, "f32": np.float32, "f64": np.float64,
}  # fmt: skip
"""NumPy has no bfloat16: such numbers are kept in float32, rounded when they become bfloat16."""

_NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int16: "i16", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip
_UNSIGNED = {np.dtype(f"i{size}"): np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


class BFloat:
    """Memory of bfloat16 numbers, read and written as float32."""

    dtype = np.dtype(np.float32)

    def __init__(self, bits: np.ndarray) -> None:
        self.bits = bits

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, at: Any) -> Any:
        return (self.bits[at].astype(np.uint32) << 16).view(np.float32)

    def __setitem__(self, at: Any, values: Any) -> None:
        self.bits[at] = rounded(values).view(np.uint32) >> 16


def rounded(values: Any) -> np.ndarray:
    """To the nearest bfloat16, ties to even."""
    x = np.ascontiguousarray(values, np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    near = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(x), x, near).astype(np.float32).reshape(np.shape(values))


class Pointer(NamedTuple):
    """Places in the memory of a tensor."""

    memory: np.ndarray | BFloat
    offset: Any


class Op(NamedTuple):
    """One operation."""

    results: tuple[str, ...]
    name: str
    text: str
    """All that follows its name, without its regions."""
    regions: tuple[list["Op"], ...]
    arguments: tuple[tuple[str, ...], ...]
    """Names of what each region is given."""


_OP = re.compile(r'(?:(?P<results>%[\w.$:, %-]+) = )?"?(?P<name>[a-z]+\.[\w.]+)"?(?P<text>.*)')


def parse(ir: str) -> list[Op]:
    """Read the operations of the one function of a module."""
    body = ir[ir.index("\n", ir.index("tt.func")) :]
    lines = (re.sub(r"\s*loc\([^()]*(\([^()]*\))?[^()]*\)", "", line).strip() for line in body.splitlines())
    return _block(line for line in lines if line)[0]


def _block(lines: Iterator[str]) -> tuple[list[Op], str, tuple[str, ...]]:
    """Operations up to the end of a region, the line that ends it, and what the region is given."""
    ops: list[Op] = []
    given: tuple[str, ...] = ()
    for line in lines:
        if line.startswith("}"):
            return ops, line, given
        if line.startswith("^bb"):
            names = tuple(re.findall(r"%[\w.$-]+", line.partition("//")[0]))
            given = given or names
            ops.append(Op(names, "label", line[: re.match(r"\^\w+", line).end()], (), ()))  # type: ignore[union-attr]
            continue
        ops.append(_op(line, lines))
    raise AssertionError("a region does not end")


def _op(line: str, lines: Iterator[str]) -> Op:
    found = _OP.match(line)
    assert found, line
    results = []
    for part in (found["results"] or "").split(","):
        name, _, count = part.strip().partition(":")
        results += [f"{name}#{i}" for i in range(int(count))] if count else [name] if name else []
    regions, arguments, text = [], [], found["text"]
    while line.endswith(("{", "({")):
        ops, line, given = _block(lines)
        regions.append(ops)
        arguments.append(given)
        text += f" {line}"
    return Op(tuple(results), found["name"], text, tuple(regions), tuple(arguments))


def _types(text: str) -> list[tuple[Any, tuple[int, ...] | None]]:
    """The types named in a text, each as element and shape; None as shape for a scalar, as element for a pointer."""
    found = []
    for shape, inside, alone in re.findall(
        r"tensor<((?:\d+x)+)(!tt\.ptr<\w+>|\w+)>|(!tt\.ptr<\w+>|\b(?:i|f|bf)\d+\b)", text
    ):
        sizes = tuple(int(size) for size in shape.split("x")[:-1]) if shape else None
        found.append((_TYPES.get(inside or alone), sizes))
    return found


def _spread(value: Any, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    """Change the shape of a value, or of the places of pointers."""
    if isinstance(value, Pointer):
        return Pointer(value.memory, change(np.asarray(value.offset)))
    return change(np.asarray(value))


def _divide(a: Any, b: Any) -> Any:
    """Towards zero, as C does."""
    safe = np.where(b == 0, 1, b)
    return (np.sign(a) * np.sign(safe) * (np.abs(a) // np.abs(safe))).astype(np.asarray(a).dtype)


def _unsigned(function: Callable[..., Any]) -> Callable[..., Any]:
    def compute(*values: Any) -> Any:
        arrays = [np.asarray(x) for x in values]
        result = function(*(x.view(_UNSIGNED.get(x.dtype, x.dtype)) for x in arrays))
        return result if result.dtype == np.bool_ else result.view(arrays[0].dtype)

    return compute


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "slt": np.less, "sle": np.less_equal, "sgt": np.greater,
    "sge": np.greater_equal, "ult": _unsigned(np.less), "ule": _unsigned(np.less_equal),
    "ugt": _unsigned(np.greater), "uge": _unsigned(np.greater_equal), "oeq": np.equal, "olt": np.less,
    "ole": np.less_equal, "ogt": np.greater, "oge": np.greater_equal,
    "une": np.not_equal,
}  # fmt: skip

_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "arith.addi": np.add, "arith.subi": np.subtract, "arith.muli": np.multiply, "arith.addf": np.add,
    "arith.subf": np.subtract, "arith.mulf": np.multiply, "arith.divf": np.divide, "arith.divsi": _divide,
    "arith.remsi": lambda a, b: a - _divide(a, b) * b, "arith.andi": np.bitwise_and, "arith.ori": np.bitwise_or,
    "arith.xori": np.bitwise_xor, "arith.shli": np.left_shift, "arith.shrsi": np.right_shift,
    "arith.shrui": _unsigned(np.right_shift), "arith.minsi": np.minimum, "arith.maxsi": np.maximum,
    "arith.minui": _unsigned(np.minimum), "arith.maxui": _unsigned(np.maximum), "arith.maxnumf": np.fmax,
    "arith.minnumf": np.fmin, "arith.maximumf": np.maximum, "arith.minimumf": np.minimum, "arith.negf": np.negative,
    "arith.select": np.where, "math.exp2": np.exp2, "math.log2": np.log2, "math.exp": np.exp, "math.absf": np.abs,
    "math.ceil": np.ceil, "math.sqrt": np.sqrt,
}  # fmt: skip

_CASTS = {"arith.extsi", "arith.trunci", "arith.sitofp", "arith.fptosi", "arith.extf", "arith.truncf"}


class Program:
    """One program of a grid."""

    def __init__(self, at: tuple[int, int, int], grid: tuple[int, int, int], values: dict[str, Any]) -> None:
        self.at, self.grid, self.values = at, grid, values

    def run(self, ops: list[Op]) -> tuple[Any, ...]:
        """Run the operations of a region; returns what it yields."""
        at = 0
        while at < len(ops):
            op = ops[at]
            at += 1
            if op.name in ("scf.yield", "scf.condition", "tt.reduce.return", "tt.scan.return", "tt.return"):
                return self._operands(op)
            if op.name in ("cf.br", "cf.cond_br"):
                at = self._jump(op, ops)
            elif op.name != "label":
                self.values.update(zip(op.results, self._one(op), strict=True))
        return ()

    def _jump(self, op: Op, ops: list[Op]) -> int:
        """Where the program goes on; values that a branch hands over get their new names."""
        targets = re.findall(r"(\^\w+)(?:\(([^:)]*)[^)]*\))?", op.text)
        chosen = 0
        if op.name == "cf.cond_br":
            condition = self.values[re.search(r"%[\w.$#-]+", op.text)[0]]  # type: ignore[index]
            chosen = 0 if condition else 1
        name, handed = targets[chosen]
        place = next(at for at, other in enumerate(ops) if other.name == "label" and other.text == name)
        values = [self.values[x] for x in re.findall(r"%[\w.$#-]+", handed)]
        self.values.update(zip(ops[place].results, values, strict=True))
        return place + 1

    def _operands(self, op: Op) -> tuple[Any, ...]:
        return tuple(self.values[name] for name in re.findall(r"%[\w.$#-]+", op.text))

    def _one(self, op: Op) -> tuple[Any, ...]:
        name = op.name
        if name in ("scf.for", "scf.while", "scf.if", "tt.reduce", "tt.scan"):
            return {"scf.for": self._for, "scf.while": self._while, "scf.if": self._if}.get(name, self._fold)(op)
        before, _, after = op.text.rpartition(" : ")
        values, kinds = self._operands(op), _types(after)
        if name == "arith.constant":
            return (self._constant(op.text, kinds),)
        if name in _ELEMENTWISE:
            return (np.asarray(_ELEMENTWISE[name](*values)).astype(kinds[-1][0], copy=False),)
        if name in _CASTS:
            cast = np.asarray(values[0]).astype(kinds[-1][0])
            return (rounded(cast) if re.search(r"bf16>?$", after.strip()) else cast,)
        if name in ("arith.extui", "arith.uitofp"):
            x = np.asarray(values[0])
            return (x.view(_UNSIGNED.get(x.dtype, x.dtype)).astype(kinds[-1][0]),)
        if name in ("arith.cmpi", "arith.cmpf"):
            with np.errstate(invalid="ignore"):
                return (_COMPARE[before.split()[0].rstrip(",")](*values),)
        return self._tensor(name, before, values, kinds)

    def _tensor(self, name: str, before: str, values: tuple[Any, ...], kinds: list[Any]) -> tuple[Any, ...]:
        element, shape = kinds[-1] if kinds else (None, None)
        axis = re.search(r"axis = (\d+)", before)
        if name in ("tt.get_program_id", "tt.get_num_programs"):
            return (np.int32((self.at if "program_id" in name else self.grid)["xyz".index(before.split()[0])]),)
        if name == "tt.make_range":
            end, start = (int(re.search(rf"{word} = (\d+)", before)[1]) for word in ("end", "start"))  # type: ignore[index]
            return (np.arange(start, end, dtype=np.int32),)
        if name in ("tt.splat", "tt.broadcast"):
            return (_spread(values[0], lambda x: np.broadcast_to(x, shape)),)
        if name == "tt.expand_dims":
            assert axis
            return (_spread(values[0], lambda x: np.expand_dims(x, int(axis[1]))),)
        if name == "tt.split":
            return tuple(np.moveaxis(np.asarray(values[0]), -1, 0))
        if name == "tt.reshape":
            return (_spread(values[0], lambda x: x.reshape(shape)),)
        if name == "tt.trans":
            order = [int(x) for x in re.search(r"array<i32: ([\d, ]+)>", before)[1].split(",")]  # type: ignore[index]
            return (_spread(values[0], lambda x: x.transpose(order)),)
        if name == "tt.bitcast":
            return (np.ascontiguousarray(values[0]).view(element).reshape(np.shape(values[0])),)
        if name == "tt.addptr":
            return (Pointer(values[0].memory, values[0].offset + np.asarray(values[1]).astype(np.int64)),)
        if name == "tt.dot":
            product = np.asarray(values[0], np.float64) @ np.asarray(values[1], np.float64) + values[2]
            return (product.astype(element),)
        if name == "tt.load":
            return (self._load(*values),)
        if name == "tt.descriptor_load":
            return (values[0].tile(tuple(int(x) for x in values[1:])),)
        if name == "tt.store":
            self._store(*values)
            return ()
        if name.endswith(".barrier"):  # programs have one thread here
            return ()
        if name == "tt.atomic_rmw":
            return (self._atomic(before, *values),)
        raise NotImplementedError(f"{name} {before}")

    def _constant(self, text: str, kinds: list[Any]) -> Any:
        element, shape = kinds[-1] if kinds else (np.bool_, None)
        literal = re.sub(r"dense<(.*)>$", r"\1", text.partition(" : ")[0].strip())
        if literal in ("true", "false"):
            value: Any = literal == "true"
        elif literal.startswith("0x"):  # the bits of a number that is no decimal
            size = np.dtype(element).itemsize
            value = np.array(int(literal, 16), f"u{size}").view(element)
        else:
            value = float(literal) if np.dtype(element).kind == "f" else int(literal)
        return np.full(shape or (), value, element)

    def _load(self, pointer: Pointer, mask: Any = True, other: Any = 0) -> Any:
        there = np.broadcast_to(mask, np.shape(pointer.offset))
        offset = np.where(there, pointer.offset, 0)
        if not ((offset >= 0) & (offset < len(pointer.memory)))[there].all():
            raise IndexError("a load outside of its tensor")
        return np.where(there, pointer.memory[offset], np.asarray(other, pointer.memory.dtype))

    def _store(self, pointer: Pointer, value: Any, mask: Any = True) -> None:
        there = np.broadcast_to(mask, np.shape(pointer.offset))
        offset = np.asarray(pointer.offset)[there]
        if not ((offset >= 0) & (offset < len(pointer.memory))).all():
            raise IndexError("a store outside of its tensor")
        pointer.memory[offset] = np.broadcast_to(value, there.shape)[there]

    def _atomic(self, before: str, pointer: Pointer, value: Any, mask: Any = True) -> Any:
        assert before.split()[0] in ("add,", "fadd,"), before
        shape = np.shape(pointer.offset)
        there, added = np.broadcast_to(mask, shape), np.broadcast_to(value, shape)
        old = np.zeros(shape, pointer.memory.dtype)
        if before.split()[0] == "fadd,":  # nobody asks what was there
            np.add.at(pointer.memory, np.asarray(pointer.offset)[there], added[there])
            return old
        for at in np.ndindex(shape):
            if there[at]:
                place = np.asarray(pointer.offset)[at]
                old[at] = pointer.memory[place]
                pointer.memory[place] += added[at]
        return old

    def _for(self, op: Op) -> tuple[Any, ...]:
        head = op.text.partition("->")[0]
        turn, first, last, step = re.match(
            r"\s*(%[\w.$-]+) = (%[\w.$#-]+) to (%[\w.$#-]+) step (%[\w.$#-]+)", head
        ).groups()  # type: ignore[union-attr]
        carried = re.findall(r"(%[\w.$-]+) = (%[\w.$#-]+)", head.partition("iter_args")[2])
        now = tuple(self.values[start] for _, start in carried)
        for at in range(*(int(self.values[x]) for x in (first, last, step))):
            self.values[turn] = np.asarray(at, np.asarray(self.values[first]).dtype)
            self.values.update(zip((name for name, _ in carried), now, strict=True))
            now = self.run(op.regions[0])
        return now

    def _while(self, op: Op) -> tuple[Any, ...]:
        carried = re.findall(r"(%[\w.$-]+) = (%[\w.$#-]+)", op.text.partition(" : ")[0])
        now = tuple(self.values[start] for _, start in carried)
        while True:
            self.values.update(zip((name for name, _ in carried), now, strict=True))
            goes_on, *handed = self.run(op.regions[0])
            if not goes_on:
                return tuple(handed)
            self.values.update(zip(op.arguments[1], handed, strict=True))
            now = self.run(op.regions[1])

    def _if(self, op: Op) -> tuple[Any, ...]:
        condition = self.values[re.search(r"%[\w.$#-]+", op.text)[0]]  # type: ignore[index]
        if condition:
            return self.run(op.regions[0])
        return self.run(op.regions[1]) if len(op.regions) > 1 else ()

    def _fold(self, op: Op) -> tuple[Any, ...]:
        """Reductions and scans, one element along the axis after the other."""
        values = [self.values[name] for name in re.findall(r"%[\w.$#-]+", op.text.partition("<{")[0])]
        axis = int(re.search(r"axis = (\d+)", op.text)[1])  # type: ignore[index]
        backwards = "reverse = true" in op.text
        parts = [np.moveaxis(np.asarray(x), axis, 0)[:: -1 if backwards else 1] for x in values]
        now, seen = tuple(x[0] for x in parts), []
        seen.append(now)
        for at in range(1, len(parts[0])):
            given = (*now, *(x[at] for x in parts))
            self.values.update(zip(op.arguments[0], given, strict=True))
            now = self.run(op.regions[0])
            seen.append(now)
        if op.name == "tt.reduce":
            return now
        whole = (np.stack(column)[:: -1 if backwards else 1] for column in zip(*seen, strict=True))
        return tuple(np.moveaxis(x, 0, axis) for x in whole)


def _memory(x: torch.Tensor) -> np.ndarray | BFloat:
    """All elements of a tensor's memory from its first on."""
    count = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    whole = torch.as_strided(x.detach(), (count,), (1,), x.storage_offset())
    return BFloat(whole.view(torch.uint16).numpy()) if x.dtype == torch.bfloat16 else whole.numpy()


_COMPILED: dict[Any, list[Op]] = {}


def lowered(source: Any, options: dict[str, Any], stage: str = "ttir") -> str:
    """Triton's IR of a kernel, after the passes over it."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    parsed = backend.parse_options(options | source.parse_options())
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    functions = backend.get_codegen_implementation(parsed), backend.get_module_map(), context
    return str(stages[stage](source.make_ir(target, parsed, *functions), {}))


def launch(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
    """Do what `kernel[grid](*args, **kwargs)` does; takes the place of `triton.runtime.jit.JITFunction.run`."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    from tests.ops import gluon_ir

    program = gluon_ir.GluonProgram if kernel.is_gluon() else Program
    given = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in kernel.arg_names}
    kept = {param.name for param in kernel.params if param.do_not_specialize}
    signature: dict[str, str] = {}
    constants = {}
    for at, param in enumerate(kernel.params):
        value = given[param.name]
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1 and param.name not in kept):
            signature[param.name], constants[at,] = "constexpr", value
        elif hasattr(value, "block_shape"):
            layout = f",{value.layout!r}" if kernel.is_gluon() else ""
            signature[param.name] = f"tensordesc<{_NAMES[value.base.dtype]}{list(value.block_shape)}{layout}>"
        elif isinstance(value, torch.Tensor):
            signature[param.name] = f"*{_NAMES[value.dtype]}"
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
    key = kernel.fn.__qualname__, kernel.fn.__module__, tuple(signature.items()), tuple(constants.items())
    if key not in _COMPILED:
        options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
        if kernel.is_gluon():
            _COMPILED[key] = gluon_ir.lower(lowered(GluonASTSource(kernel, signature, constants), options, "ttgir"))
        else:
            _COMPILED[key] = parse(lowered(ASTSource(kernel, signature, constants), options))
    sizes = grid(given) if callable(grid) else grid
    whole = (*(int(size) for size in sizes), 1, 1)[:3]
    start = {}
    for param in kernel.params:
        value = given[param.name]
        if isinstance(value, torch.Tensor):
            start[f"%{param.name}"] = Pointer(_memory(value), np.int64(0))
        elif hasattr(value, "block_shape"):
            memory = _memory(value.base)
            start[f"%{param.name}"] = gluon_ir.Descriptor(memory, tuple(value.shape), tuple(value.block_shape))
        elif signature[param.name] != "constexpr":
            start[f"%{param.name}"] = np.asarray(value, _TYPES[signature[param.name].replace("fp", "f")])
    with np.errstate(all="ignore"):
        for x in range(whole[0]):
            for y in range(whole[1]):
                for z in range(whole[2]):
                    program((x, y, z), whole, dict(start)).run(_COMPILED[key])
