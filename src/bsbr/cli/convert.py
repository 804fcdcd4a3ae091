"""`bsbr convert`: a pretrained model in, a converted and calibrated one out."""

import argparse

from bsbr.cli.options import add_attention_arguments, attention_config, check_device, check_output
from bsbr.config import BSBRConfig
from bsbr.data.embedded import EMBEDDED
from bsbr.terminal import harmless

HELP = "Convert a pretrained causal language model, calibrate it and save it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the sub-command."""
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of the model, or embedded")
    parser.add_argument("output", metavar="DIR", help="folder to save the converted model in")
    parser.add_argument("--calibrate", metavar="TEXT", default=EMBEDDED, help="text file, embedded, or none")
    parser.add_argument("--calibration-tokens", type=int, default=32768, help="tokens of the text to calibrate on")
    parser.add_argument("--calibration-length", type=int, help="tokens of a window of it; None: what suits the model")
    parser.add_argument("--calibration-queries", type=int, default=512, help="queries of each head it samples")
    parser.add_argument("--max-length", type=int, help="tokens the result must take; extends its positions")
    parser.add_argument("--layers", type=_layers, metavar="0,1,...", help="layers to convert; the others stay dense")
    parser.add_argument(
        "--even-top-k", action="store_true", help="each key head reads --top-k blocks; else they are spread by need"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the calibration")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for the calibration")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    add_attention_arguments(parser, top_k=BSBRConfig.top_k)


def run(args: argparse.Namespace) -> None:
    """Convert, calibrate, save."""
    args.if_out_of_memory = "Use --calibrate none, a smaller --max-length or a smaller model"
    config = attention_config(args)
    check_device(args.device)
    output = check_output(args.output, "config.json", overwrite=args.overwrite)
    from bsbr.cli.models import load, read_calibration_text, save
    from bsbr.hf.convert import convert
    from bsbr.training.calibrate import calibrate

    model, tokenizer = load(args.model, device=args.device)
    text = read_calibration_text(args.calibrate)
    converted = convert(model, config, max_length=args.max_length, layers=args.layers)
    if text is not None and config.far != "drop":
        calibrate(
            converted, text, tokenizer=tokenizer, tokens=args.calibration_tokens, length=args.calibration_length,
            queries_per_head=args.calibration_queries, spread_top_k=not args.even_top_k, seed=args.seed, progress=True,
        )  # fmt: skip
    save(converted.cpu(), tokenizer, output)
    kind = converted.config.model_type
    print(harmless(f"saved {kind} in {output}; load it with AutoModelForCausalLM after `import bsbr`"))


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected layer numbers such as 0,2,5, got {text!r}") from None
