"""Every flipped bit and every truncation of what was saved is noticed.

python -m tests.long.damage
"""

import argparse
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.reliability import record

from bsbr.errors import UserError
from bsbr.evaluation.provenance import cpu_name
from bsbr.evaluation.records import RecordStore
from bsbr.hf.loading import load_model, load_tokenizer
from bsbr.manifest import write_manifest
from bsbr.training.checkpoint import load_checkpoint, save_checkpoint
from bsbr.training.hub_trainer import newest_checkpoint
from tests.long.tiny import commands, make

Load = Callable[[Path], object]


def saved(folder: Path, train: bool = True) -> dict[str, tuple[Path, Load]]:
    """Folders of each kind that can be damaged, and how each is loaded.

    Args:
        folder: where to make them.
        train: also make those that take training.
    Returns:
        Kind to folder and loader.
    """
    given = make(folder / "given")
    work = commands(given)
    for name in ("convert --calibrate", "pretrain", "finetune") if train else ():
        work[name](folder / name.split()[0], False)
    write_manifest(given / "converted")  # as `bsbr convert` does, tokenizer included
    tensors = {"weights": {"w": torch.arange(100.0)}, "optimizer": {"m": torch.ones(10)}}
    save_checkpoint(folder / "checkpoint", 7, tensors, {"note": 1})
    with RecordStore(folder / "records" / "records.jsonl", "protocol") as store:
        for index in range(20):
            store.append((index,), {"value": index / 7})
    if train:
        stages = sorted((folder / "finetune" / "checkpoints").iterdir())
        newest = max(stages[-1].glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        shutil.copytree(newest, folder / "stage" / newest.name)

    def model(place: Path) -> None:
        load_model(place)
        load_tokenizer(place)

    def checkpoint(place: Path) -> None:
        load_checkpoint(place)

    def stage(place: Path) -> None:
        newest_checkpoint(place)

    def records(place: Path) -> object:
        with RecordStore(place / "records.jsonl", "protocol", resume=True) as store:
            if store.resumed < 20:  # lines that are gone are measured again: nothing wrong is taken up
                raise UserError("lines dropped")
            return [store.get((index,)) for index in range(20)]

    kinds: dict[str, tuple[Path, Load]] = {
        "converted model": (folder / "convert" if train else given / "converted", model),
        "checkpoint of pretrain": (folder / "checkpoint", checkpoint),
        "evaluation records": (folder / "records", records),
    }
    trained = {
        "pretrained model": (folder / "pretrain", model),
        "checkpoint of finetune": (folder / "stage", stage),
    }
    return kinds | trained if train else kinds


def harm(folder: Path, load: Load, flips: int, cuts: int, draw: random.Random) -> list[str]:
    """Damage one file at a time and load.

    Args:
        folder: what was saved.
        load: loads it; must raise a UserError or warn, or return exactly what it returned before.
        flips: how many bits to flip, one at a time.
        cuts: how many truncations.
        draw: chooses file, place and bit.
    Returns:
        Damage that went unnoticed, or was said in more than a line.
    """
    good_state = load(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "training.json")
    faults = []
    for number in range(flips + cuts):
        path = draw.choice(files)
        good = path.read_bytes()
        place = draw.randrange(len(good))
        bad = bytearray(good)
        if number < flips:
            bad[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bad if number < flips else good[:place])
        said, state = [], None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                state = load(folder)
            except UserError as error:
                said.append(str(error))
            except Exception as error:
                faults.append(f"{path.name} at {place}: {type(error).__name__}")
        said += [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
        if not said and state is not None and state == good_state:
            pass  # another way to write the same number
        elif not said or any("\n" in line for line in said):
            kind = "bit flipped" if number < flips else "cut"
            faults.append(f"{path.name} {kind} at {place} of {len(good)}: {said or 'unnoticed'}")
        path.write_bytes(good)
    load(folder)
    return faults


def main() -> int:
    """Damage everything and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=200, help="of each kind of folder")
    parser.add_argument("--cuts", type=int, default=100, help="of each kind of folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started, faults, kinds = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        for kind, (place, load) in saved(Path(folder)).items():
            found = harm(place, load, args.flips, args.cuts, random.Random(f"{args.seed} {kind}"))
            print(
                f"{kind}: {args.flips} flips, {args.cuts} cuts, {len(found)} unnoticed", *found, sep="\n  ", flush=True
            )
            faults += [f"{kind}: {fault}" for fault in found]
            kinds += 1
    record(
        "damage",
        section="Persistence",
        claim="A flipped bit or a truncation in a file of a saved model, a checkpoint or the records "
        "of an evaluation is "
        "noticed when it is loaded, and said in one line.",
        cases=kinds * (args.flips + args.cuts),
        failures=len(faults),
        measured=f"{args.flips} flipped bits and {args.cuts} truncations of each of {kinds} kinds of folder",
        mended=[
            "A flipped bit in the weights of a saved model loaded without a word: models now carry a manifest with the "
            "SHA-256 of each file.",
            "A flipped bit in the records of an evaluation could change a figure: each record now "
            "has a digest of its own.",
        ],
        not_covered=[
            "Folders without a manifest (saved by transformers alone) are not checked; neither are models that "
            "AutoModelForCausalLM fetches from the hub by name (`bsbr.hf.load_model` checks those).",
            "Of settings and tokenizers, which people edit, a difference is a warning and not an error.",
            "Result files and reports: `bsbr evaluate` with `--replay` checks the digest of a result file, "
            "`bsbr report` does not.",
        ],
        command=f"python -m tests.long.damage --flips {args.flips} --cuts {args.cuts} --seed {args.seed}",
        conditions=f"CPU ({cpu_name()}); one damage at a time, in a random file at a random place",
        seed=args.seed,
        seconds=time.monotonic() - started,
        details={"unnoticed": faults},
    )
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
