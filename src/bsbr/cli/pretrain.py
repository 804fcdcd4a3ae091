"""`bsbr pretrain`: a language model from random weights."""

import argparse
import dataclasses
from typing import Any

from bsbr.cli.deterministic import add_deterministic_argument

HELP = "Train a causal language model from random weights, on a text or a synthetic task, with any attention."

FIELDS = (
    "architecture", "layers", "heads", "kv_heads", "hidden", "context", "vocab", "documents", "batch_tokens",
    "accumulation", "optimizer", "lr", "muon_lr", "weight_decay", "warmup_steps", "seed", "precision", "val_interval",
    "val_windows", "checkpoint_interval",
)  # fmt: skip
"""Fields of the recipe that people set."""

_TYPES = {"kv_heads": int}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the sub-command."""
    from bsbr.training.recipe import PretrainConfig

    parser.add_argument("--text", metavar="NAME", help="training text: a file, a folder, or datasets:NAME")
    parser.add_argument("--val", metavar="NAME", help="held-out text, likewise")
    parser.add_argument("--task", metavar="TASK[:key=value,...]", help="train on a synthetic task instead, as mqar")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the trained model")
    parser.add_argument("--tokenizer", metavar="DIR", help="use this tokenizer; None trains one")
    parser.add_argument(
        "--attention", metavar="NAME[:key=value,...]", default="full", help="full, bsbr:block_size=64,top_k=8 ..."
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--tokens", type=int, help="tokens to train on; reproducible")
    length.add_argument("--minutes", type=float, help="minutes to train")
    parser.add_argument(
        "--curriculum", metavar="LENGTH:SHARE", nargs="*", default=[], help="shorter windows first, as 512:0.3"
    )
    defaults = {field.name: field.default for field in dataclasses.fields(PretrainConfig)}
    for name in FIELDS:
        flag, default = "--" + name.replace("_", "-"), defaults[name]
        parser.add_argument(flag, type=_TYPES.get(name, type(default)), default=default, help="see `PretrainConfig`")
    parser.add_argument("--match-parameters", action="store_true", help="as many parameters as with full attention")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="None means on CUDA only")
    parser.add_argument(
        "--sample", metavar="PROMPT", nargs="*", default=[], help="continue these at each held-out loss"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that make a task's examples ahead of time")
    parser.add_argument("--log-to", nargs="*", default=[], choices=["tensorboard"], help="where else the curves go")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    add_deterministic_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Train, save, draw the report."""
    args.after_interrupt = "Go on with the same command and --resume"
    args.if_out_of_memory = (
        "Raise --accumulation, or lower --batch-tokens, --context, --hidden, --layers or --vocab; "
        "what was trained up to the last checkpoint is kept"
    )
    from bsbr.report.pretraining import render_pretraining
    from bsbr.training.build import parse_attention
    from bsbr.training.pretrain import PretrainConfig, run_pretrain

    given: dict[str, Any] = {name: getattr(args, name) for name in FIELDS}
    config = PretrainConfig(
        tokens=args.tokens, minutes=args.minutes, attention=parse_attention(args.attention, args.seed),
        match_parameters=args.match_parameters, compile=args.compile,
        curriculum=tuple(_stage(text) for text in args.curriculum),
        task=None if args.task is None else _task(args.task, args.context), **given,
    )  # fmt: skip
    record = run_pretrain(
        config, text=args.text, val=args.val, output=args.output, tokenizer=args.tokenizer, resume=args.resume,
        device=args.device, samples=args.sample, workers=args.workers, log_to_tensorboard="tensorboard" in args.log_to,
    )  # fmt: skip
    if record:  # on the first process
        print(render_pretraining(args.output))


def _stage(text: str) -> tuple[int, float]:
    length, _, share = text.partition(":")
    try:
        return int(length), float(share)
    except ValueError:
        raise ValueError(f"--curriculum {text!r}: expected LENGTH:SHARE, as 512:0.3") from None


def _task(text: str, context: int) -> dict[str, Any]:
    """Settings of a task from `TASK:key=value,...`; a distance is written low-high."""
    from bsbr.data.tasks import TaskConfig

    name, _, rest = text.partition(":")
    values: dict[str, Any] = {"task": name, "length": context}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        numbers = value.split("-")
        if not equals or not all(number.strip().isdigit() for number in numbers):
            raise ValueError(f"--task {text!r}: {part!r} is no key=number. Write as mqar:pairs=64,vocab=1024")
        values[key.strip()] = int(numbers[0]) if len(numbers) == 1 else tuple(int(x) for x in numbers)
    return TaskConfig.from_dict(values).to_dict()
