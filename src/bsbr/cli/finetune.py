"""`bsbr finetune`: a converted model learns from its original."""

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from bsbr.cli.deterministic import add_deterministic_argument

if TYPE_CHECKING:
    from rich.table import Table

HELP = "Fine-tune a converted model: attention transfer, distillation from the original, language modelling."

FIELDS = (
    "scope", "transfer_tokens", "distill_tokens", "language_tokens", "length", "batch_windows", "accumulation", "lr",
    "scalar_lr", "lora_rank", "precision", "eval_interval", "eval_windows", "save_interval", "seed",
)  # fmt: skip
"""Fields of the recipe that people set."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the sub-command."""
    from bsbr.training.finetune_recipe import FinetuneConfig

    parser.add_argument("model", metavar="MODEL", help="folder of a model that bsbr convert made")
    parser.add_argument("output", metavar="DIR", help="folder of the trained model, its figures and its plot")
    parser.add_argument("--text", metavar="FILE", required=True, help="training text, or embedded")
    parser.add_argument("--val", metavar="FILE", help="held-out text; None: the last twentieth of --text")
    for field in dataclasses.fields(FinetuneConfig):
        if field.name in FIELDS:
            flag = "--" + field.name.replace("_", "-")
            parser.add_argument(flag, type=type(field.default), default=field.default, help="see `FinetuneConfig`")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--log-to", nargs="*", default=[], metavar="NAME", help="tensorboard, trackio ...")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    add_deterministic_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Train, save, show."""
    args.after_interrupt = "Go on with the same command and --resume"
    args.if_out_of_memory = "Lower --length or --batch-windows, or add --gradient-checkpointing; then --resume"
    from bsbr.training.finetune_recipe import FinetuneConfig

    config = FinetuneConfig(
        gradient_checkpointing=args.gradient_checkpointing, **{name: getattr(args, name) for name in FIELDS}
    )
    from rich.console import Console

    from bsbr.cli.models import load, read_calibration_text, save
    from bsbr.cli.options import check_device, check_output
    from bsbr.data.text import read_text
    from bsbr.files import write_atomic
    from bsbr.report.plots.finetuning import draw_finetuning
    from bsbr.terminal import harmless
    from bsbr.training.finetune import finetune

    output = check_output(args.output, "finetune.json", resume=args.resume)
    model, tokenizer = load(args.model, device=str(_device(args.device, check_device)))
    text = read_calibration_text(args.text) or ""
    held_out = None if args.val is None else read_text(args.val)
    trained, record = finetune(
        model, config, text=text, tokenizer=tokenizer, held_out=held_out, output=output, resume=args.resume,
        report_to=args.log_to, command=["bsbr", *sys.argv[1:]],
    )  # fmt: skip
    save(trained.cpu(), tokenizer, output)
    write_atomic(output / "finetune.png", draw_finetuning(record))
    Console().print(summary(record))
    print(harmless(f"saved in {output}; finetune.png shows quality against tokens"))


def summary(record: dict[str, Any]) -> "Table":
    """Make the table that ends a run.

    Args:
        record: content of `finetune.json`.
    Returns:
        KL, top-1 agreement and perplexity ratio of the model and its controls, before and after.
    """
    from rich.table import Table

    table = Table("held-out windows", "KL to the original", "top-1 agreement", "perplexity")
    names = {"converted": "converted", "dense": "same weights, dense", "retrieval_off": "retrieval off"}
    for when in ("before", "after"):
        for key, name in names.items():
            found = record[when][key]
            table.add_row(
                f"{name}, {when}", f"{found['kl']:.5f}", f"{found['top1_agreement']:.2%}", f"x{found['ppl_ratio']:.4f}"
            )
    return table


def _device(name: str, check: Any) -> Any:
    import torch

    return check(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
