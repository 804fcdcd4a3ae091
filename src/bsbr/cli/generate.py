"""`bsbr generate`: a model continues a prompt or a document."""

import argparse
import sys
from typing import Any

from bsbr.cli.options import check_device
from bsbr.errors import UserError

HELP = "Continue a prompt or a long document with a model, and show its speed and the memory of its cache."

CACHES = ("full", "offload", "states")
"""What of the past is kept: all on the device, past blocks on the host, or summaries alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the sub-command."""
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of the model, converted or not, or embedded")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", metavar="TEXT", help="text to continue")
    text.add_argument("--file", metavar="PATH", help="file to continue; .xz and .gz are unpacked; - reads from a pipe")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="tokens to write at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--cache", default=CACHES[0], help="full; offload: past blocks on the host; states: none kept")
    parser.add_argument("--max-length", type=int, help="tokens the model must take; extends its positions")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")


def run(args: argparse.Namespace) -> None:
    """Generate."""
    _check(args)
    text = _read(args)
    args.after_interrupt = "The text so far is all there is"
    args.if_out_of_memory = "Give less text, --dtype bfloat16, or --cache offload on a GPU"
    check_device(args.device)
    from bsbr.cli.models import load
    from bsbr.hf.positions import check_length, extend_positions

    model, tokenizer = load(args.model, args.dtype, args.device)
    if args.max_length is not None:
        model = extend_positions(model, args.max_length)
    ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    if not ids.shape[1]:
        raise UserError("the prompt holds no token: nothing to continue. Give some text")
    check_length(model, ids.shape[1] + args.max_new_tokens)
    _generate(args, model, tokenizer, ids)


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers out of range before anything is loaded."""
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    if args.max_length is not None and args.max_length < 1:
        raise UserError(f"--max-length {args.max_length}: must be at least 1")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature {args.temperature}: must be 0 or a positive number, as 0.8")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p}: must be above 0 and at most 1")
    if args.cache not in CACHES:
        raise UserError(f'--cache "{args.cache}": expected one of {", ".join(CACHES)}')


def _read(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    if args.file != "-":
        from bsbr.data.text import read_text

        return read_text(args.file)
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--file -: byte at offset {error.start} is not UTF-8. Send UTF-8 text") from error


def _generate(args: argparse.Namespace, model: Any, tokenizer: Any, ids: Any) -> None:
    import time

    import torch

    from bsbr.cli.streaming import TerminalStreamer
    from bsbr.hf.cache import CACHE_ARGUMENT

    cache = _cache(model, args.cache)
    if sys.stderr.isatty():  # a long text takes a while before the first word
        print(f"reading {ids.shape[1]:,} tokens ...", file=sys.stderr)
    streamer = TerminalStreamer(tokenizer)
    draw = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    torch.manual_seed(args.seed)
    started = time.perf_counter()
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.max_new_tokens, streamer=streamer,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0, **{CACHE_ARGUMENT: cache},
        **(draw if args.temperature else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}),
    )  # fmt: skip
    written, ended = output.shape[1] - ids.shape[1], time.perf_counter()
    first = streamer.first_token or ended
    speed = f"{(written - 1) / (ended - first):.1f} tokens/s" if written > 1 else "one token"
    print(
        f"{ids.shape[1]:,} tokens read in {first - started:.2f} s, {written} written, {speed}, {_memory(cache)}",
        file=sys.stderr,
    )


def _cache(model: Any, mode: Any) -> Any:
    """The cache asked for; transformers' own for what a BSBRCache cannot hold."""
    from transformers import DynamicCache

    from bsbr.hf.cache import BSBRCache, keeps_summaries
    from bsbr.hf.modeling import BSBRModelMixin

    if isinstance(model, BSBRModelMixin) and keeps_summaries(model.config):
        return BSBRCache(model.config, mode)
    if mode != CACHES[0]:
        raise UserError(f'--cache "{mode}": this model is not converted to BSBR attention. Run bsbr convert first')
    return DynamicCache(config=model.config)


def _memory(cache: Any) -> str:
    from bsbr.hf.cache import BSBRCache

    if isinstance(cache, BSBRCache):
        used = cache.num_bytes()
        host = f" and {used['host'] / 1e6:.1f} MB on the host" if used["host"] else ""
        return f"BSBR cache {used['device'] / 1e6:.1f} MB{host}"
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
    return f"dense cache {size / 1e6:.1f} MB"
