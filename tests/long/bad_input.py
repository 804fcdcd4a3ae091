"""Every bad call of the command line and every senseless config: one line, quickly, nothing left behind.

python -m tests.long.bad_input
"""

import logging
import tempfile
import time
from pathlib import Path

import huggingface_hub.constants
from benchmarks.reliability import record

from bsbr.evaluation.provenance import cpu_name
from tests.long.tiny import make
from tests.security.places import make_bad
from tests.security.test_bad_calls import CALLS, ask, fault
from tests.security.test_bad_configs import CASES, HARMLESS, models, outcome

MENDED = [
    "`--flag=--` gave an option the empty list on Python 3.11, past its type: refused before parsing.",
    "`bsbr pretrain` found an output folder that cannot be written only after it had trained a tokenizer.",
    "`bsbr evaluate` with a `--window` beyond the model's positions was refused only after calibration.",
    "Shards named in model.safetensors.index.json could lie outside the model's folder.",
    "A folder with adapter_config.json made transformers load the model which that file names.",
    "A config with a thousand million layers was built before its weights were looked at.",
    "A tokenizer with code of its own made transformers ask a question and wait 15 seconds.",
]


def main() -> int:
    """Make all calls, load all configs, write two results."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        return _calls(place) | _configs(place)


def _calls(place: Path) -> int:
    given = make(place / "given")
    here = make_bad(place / "bad", given / "model")
    places = {"model": given / "model", "converted": given / "converted", "text": given / "text.txt", "here": here}
    for warm in CALLS[::40]:  # imports are paid once by every process, not by every call
        ask(warm, places, place / f"warm{CALLS.index(warm)}")
    started, faults, seconds = time.monotonic(), [], []
    for number, call in enumerate(CALLS):
        answer = ask(call, places, place / str(number))
        seconds.append(answer.seconds)
        if found := fault(answer):
            faults.append(f"{[word[:40] for word in call]}: {found}")
    slow = sorted(seconds)
    record(
        "bad_calls",
        section="Input and security",
        claim="A call of the command line that cannot be right is answered with one line on standard "
        "error and exit code 2, "
        "without a traceback, and leaves nothing behind.",
        cases=len(CALLS),
        failures=len(faults),
        measured=f"median {slow[len(slow) // 2]:.3f} s, slowest {slow[-1]:.2f} s in a process that has its imports; "
        f"{sum(x >= 1 for x in slow)} took a second or more",
        mended=MENDED,
        not_covered=[
            "The first call of a process also imports PyTorch where a model is looked at, which takes seconds.",
            "A text that is too short for `bsbr pretrain` is found when it is encoded, after lines of progress.",
        ],
        command="python -m tests.long.bad_input",
        conditions=f"CPU ({cpu_name()}), a machine shared with other work; seven commands, tiny models",
        seconds=time.monotonic() - started,
        details={"faults": faults},
    )  # fmt: skip
    print(f"{len(CALLS)} calls, {len(faults)} faults, slowest {slow[-1]:.2f} s", *faults[:20], sep="\n  ", flush=True)
    return int(bool(faults))


def _configs(place: Path) -> int:
    known, started, faults, seconds = models(place / "configs"), time.monotonic(), [], []
    for number, (family, field, value) in enumerate(CASES):
        found, took = outcome(known[family], field, value, place / f"config{number}")
        seconds.append(took)
        if found != ("loaded" if (family, field, value) in HARMLESS else ""):
            faults.append(f"{family} {field} = {value}: {found}")
    slow, refused = sorted(seconds), len(CASES) - len(HARMLESS)
    record(
        "bad_configs",
        section="Input and security",
        claim="A config.json with a value that makes no sense is refused in one line, before memory is taken.",
        cases=refused,
        failures=len(faults),
        measured=f"median {slow[len(slow) // 2]:.3f} s, slowest {slow[-1]:.2f} s; {len(HARMLESS)} "
        f"further values that look odd and "
        "mean something (null for as many key heads as heads, a top_k above all blocks) loaded",
        not_covered=["Values that are possible and wrong, as another number of heads of the same width."],
        command="python -m tests.long.bad_input",
        conditions=f"CPU ({cpu_name()}), a machine shared with other work; GPT-2, Llama and a "
        f"converted GPT-2; 20 fields, 15 values",
        seconds=time.monotonic() - started,
        details={"faults": faults},
    )  # fmt: skip
    print(f"{refused} configs, {len(faults)} faults, slowest {slow[-1]:.2f} s", *faults[:20], sep="\n  ", flush=True)
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
