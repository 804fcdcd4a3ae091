"""`bsbr pretrain`: a language model from random weights."""

import argparse
import dataclasses

from bsbr.cli.deterministic import add_deterministic_argument

HELP = "Train a GPT-2-architecture language model from random weights on a text; the embedded model's recipe."

FIELDS = ("layers", "heads", "hidden", "context", "vocab", "batch_tokens", "lr", "muon_lr", "warmup_steps", "seed")
"""Fields of the recipe that people sweep."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the sub-command."""
    from bsbr.training.recipe import PretrainConfig

    parser.add_argument("--text", metavar="FILE", required=True, help="training text; .xz and .gz are unpacked")
    parser.add_argument("--val", metavar="FILE", required=True, help="held-out text")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the trained model")
    parser.add_argument("--tokenizer", metavar="DIR", help="use this tokenizer; None trains one")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--tokens", type=int, help="tokens to train on; reproducible")
    length.add_argument("--minutes", type=float, help="minutes to train")
    defaults = {field.name: field.default for field in dataclasses.fields(PretrainConfig)}
    for name in FIELDS:
        flag, default = "--" + name.replace("_", "-"), defaults[name]
        parser.add_argument(flag, type=type(default), default=default, help="see `PretrainConfig`")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    add_deterministic_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Train."""
    args.after_interrupt = "Go on with the same command and --resume"
    args.if_out_of_memory = "Lower --batch-tokens, --context, --hidden, --layers or --vocab"
    from bsbr.training.recipe import PretrainConfig

    config = PretrainConfig(tokens=args.tokens, minutes=args.minutes, **{name: getattr(args, name) for name in FIELDS})
    from bsbr.training.pretrain import run_pretrain

    run_pretrain(
        config, text=args.text, val=args.val, output=args.output, tokenizer=args.tokenizer, resume=args.resume,
        device=args.device,
    )  # fmt: skip
