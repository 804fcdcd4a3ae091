"""What the sources themselves promise: one atomic writer, no pickle, no code of others."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "src" / "bsbr"
FILES = sorted(SOURCES.rglob("*.py"))

WRITERS = {
    "files.py",  # the writer itself
    "evaluation/records.py",  # a log that only grows: a torn last line is dropped, see its docstring
    "evaluation/speed.py",  # a switch of the kernel under /proc
    "cli/__init__.py",  # the null device
}
"""Files that may open something for writing, and why."""

SAVERS = {"hf/modeling.py", "cli/models.py", "training/corpus.py", "training/language_model.py"}
"""Files that may call `save_pretrained`: into a folder whose files are moved or copied by the writer."""

FORBIDDEN = {
    ("torch", "save"), ("torch", "load"), ("np", "save"), ("np", "load"), ("json", "dump"), ("shutil", "copy"),
    ("shutil", "copyfile"), ("shutil", "copytree"), ("shutil", "move"),
}  # fmt: skip
MODULES = {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "yaml"}


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str, str]]:
    """Every call with the name it is called by and what stands before the dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                before = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                yield node, node.func.attr, before
            elif isinstance(node.func, ast.Name):
                yield node, node.func.id, ""


def mode_of(call: ast.Call, before: str) -> str:
    """The mode that a call of `open` names; "?" where it is no plain text."""
    place = 0 if before not in ("", "lzma", "gzip", "io") else 1
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] + call.args[place : place + 1]
    if not given:
        return "r"
    return str(given[0].value) if isinstance(given[0], ast.Constant) else "?"


def writes(tree: ast.AST) -> list[str]:
    """Calls that write a file by other means than the one writer."""
    found = []
    for call, name, before in calls(tree):
        where = f"line {call.lineno}: {before}.{name}"
        opens = (name == "open" and before != "os" and set(mode_of(call, before)) & set("wax+?")) or (
            name == "open"
            and before == "os"
            and any(word in ast.unparse(call) for word in ("O_WRONLY", "O_RDWR", "O_CREAT"))
        )
        saves = name == "savefig" and not any(keyword.arg == "format" for keyword in call.keywords)
        if opens or saves or name in ("write_text", "write_bytes", "save_file", "touch", "symlink_to"):
            found.append(where)
        if (before, name) in FORBIDDEN:
            found.append(where)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCES)))
def test_files_are_written_by_the_one_writer_and_no_code_of_others_is_read(path: Path) -> None:
    tree, name = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(SOURCES).as_posix()
    if name not in WRITERS:
        assert not writes(tree)
    for call, called, _ in calls(tree):
        where = f"line {call.lineno}: {called}"
        assert called not in ("eval", "exec") or not isinstance(call.func, ast.Name), where
        assert called != "save_pretrained" or name in SAVERS, where
        for keyword in call.keywords:
            if keyword.arg == "trust_remote_code":
                assert isinstance(keyword.value, ast.Constant), where
                assert keyword.value.value is False, where
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {module.split(".")[0] for module in modules} & MODULES


@pytest.mark.parametrize(
    "source",
    [
        "open(path, 'w')", "open(path, mode='ab')", "path.open('w')", "path.write_text(x)", "figure.savefig(path)",
        "os.open(path, os.O_WRONLY)", "torch.save(x, path)", "json.dump(x, file)", "save_file(x, path)",
        "open(path, mode)",
        "gzip.open(path, 'wb')",
    ],
)  # fmt: skip
def test_the_check_sees_writes(source: str) -> None:
    assert writes(ast.parse(source))


@pytest.mark.parametrize(
    "source", ["open(path)", "open(path, 'rb')", "path.open()", "lzma.open(path, 'rb')", "f.savefig(x, format='png')"]
)
def test_the_check_lets_readers_pass(source: str) -> None:
    assert not writes(ast.parse(source))
