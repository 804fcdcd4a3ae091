"""How near a converted model is to its original without training: agreement, KL and perplexity on held-out text.

python -m benchmarks.fidelity --model gpt2-30m --text books-val.txt.xz --calibration-text books-train.txt.xz \
    --length 1024 --after 256 --top-k 2 --output benchmarks/results/fidelity_gpt2-30m.json
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from bsbr import BSBRConfig, calibrate, convert
from bsbr.data.text import read_documents, read_text, text_digest
from bsbr.errors import UserError
from bsbr.evaluation.fidelity import (
    METRICS,
    compare_predictions,
    position_buckets,
    predict,
    spread_windows,
    sum_by_position,
)
from bsbr.evaluation.provenance import describe_model, header, texts_digest
from bsbr.evaluation.rows import row
from bsbr.evaluation.statistics import Estimate, paired_bootstrap, ratio_mean, transformed
from bsbr.files import write_json
from bsbr.hf import load_model, load_tokenizer
from bsbr.hf.exact import prepare_dense

Ranges = dict[str, tuple[int, int]]


@torch.no_grad()
def measure(
    models: dict[str, PreTrainedModel], windows: list[list[Tensor]], ranges: Ranges, at_once: int
) -> dict[str, Any]:
    """Sum each metric of each model over ranges of positions of each document, in float64; windows go `at_once`."""
    empty = {"n": 0.0} | dict.fromkeys(METRICS, 0.0)
    sums = {name: {bucket: [dict(empty) for _ in windows] for bucket in ranges} for name in models}
    todo = [(i, own[j : j + at_once]) for i, own in enumerate(windows) for j in range(0, len(own), at_once)]
    for document, own in track(todo, "windows", console=Console(stderr=True)):
        ids = torch.stack(own).to(models["original"].device)
        original = predict(models["original"], ids, 0)
        for name, model in models.items():
            predicted = original if name == "original" else predict(model, ids, 0)
            compared = compare_predictions(original, predicted, ids[:, 1:].flatten())
            for bucket, found in sum_by_position(compared, len(own), ranges).items():
                for metric, total in found.items():
                    sums[name][bucket][document][metric] += total
    return {name: {bucket: columns(rows) for bucket, rows in of.items()} for name, of in sums.items()}


def columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """Turn a dict for each document into a list over documents for each metric."""
    return {metric: [row[metric] for row in rows] for metric in rows[0]}


def estimates(measured: dict[str, Any], name: str, bucket: str) -> dict[str, Estimate]:
    """The figures of one model over a range of positions, with intervals clustered by document."""
    sums, original = measured[name][bucket], measured["original"][bucket]
    counts = sums["n"]
    return {
        "top1_agreement": ratio_mean(sums["top1_agreement"], counts),
        "kl": ratio_mean(sums["kl"], counts),
        "perplexity": transformed(ratio_mean(sums["nll"], counts), math.exp),
        "ppl_ratio": paired_bootstrap(original["nll"], sums["nll"], counts, statistic="exp_difference"),
    }


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the original model and its tokenizer")
    parser.add_argument("--text", required=True, type=Path, help="evaluated text")
    parser.add_argument("--calibration-text", required=True, type=Path, help="other text, for calibration")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--after", type=int, default=256, help="first position that counts")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--retrieval-block-size", type=int, default=None)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--selection", default="head", choices=("head", "group", "recent"))
    parser.add_argument("--even-top-k", action="store_true", help="each key head reads --top-k blocks")
    parser.add_argument("--windows", type=int, default=3, help="windows of each document")
    parser.add_argument("--batch-tokens", type=int, default=1, help="tokens at once, in whole windows of a document")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--calibration-queries", type=int, default=512, help="sampled queries of each head")
    parser.add_argument("--finetuned", default=None, help="folder that bsbr finetune wrote, to be measured beside")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def make_models(original: PreTrainedModel, args: argparse.Namespace) -> tuple[BSBRConfig, dict[str, PreTrainedModel]]:
    """The conversions that are compared, none of them calibrated yet."""
    config = BSBRConfig(
        block_size=args.block_size,
        retrieval_block_size=args.retrieval_block_size,
        top_k=args.top_k,
        selection=args.selection,
        dense_below=0,
    )
    dropped = BSBRConfig.from_dict({**config.to_dict(), "far": "drop", "state": "none"})
    settings = {"converted": config, "uncalibrated": config, "moba": dropped}
    if args.top_k and args.selection != "recent":
        settings["moba_spread"] = dropped
    else:  # nothing but the own block, or a window
        settings["local"] = settings.pop("moba")
    models = {"original": original} | {name: convert(original, its) for name, its in settings.items()}
    if args.finetuned is not None:
        finetuned = load_model(args.finetuned).to(args.device)
        its = BSBRConfig.from_dict(
            {x: y for x, y in finetuned.config.bsbr.items() if x != "mixer"} | {"dense_below": 0}
        )
        models["finetuned"] = convert(finetuned, its)
    return config, models


def make_rows(measured: dict[str, Any], args: argparse.Namespace, ranges: Ranges) -> tuple[list[dict[str, Any]], Table]:
    """The result file's rows, by range of positions, and a table of the first range."""
    rows, table = [], Table("", "top-1", "KL", "perplexity")
    units = {"top1_agreement": "share", "kl": "nats", "perplexity": "perplexity", "ppl_ratio": "ratio"}
    for name in measured:
        for bucket in ranges:
            found = estimates(measured, name, bucket)
            where = {"length": args.length, "bucket": bucket}
            rows += [row("fidelity", metric, name, where, found[metric], unit) for metric, unit in units.items()]
        found = estimates(measured, name, next(iter(ranges)))
        top1, kl, ratio = found["top1_agreement"], found["kl"], found["ppl_ratio"]
        table.add_row(
            name,
            f"{top1.value:.2%} [{top1.low:.2%}, {top1.high:.2%}]",
            f"{kl.value:.5f} [{kl.low:.5f}, {kl.high:.5f}]",
            f"x{ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]",
        )
    return rows, table


def main() -> None:
    """Convert, calibrate, measure, and write the result."""
    args = arguments()
    original, tokenizer = prepare_dense(load_model(args.model).to(args.device)), load_tokenizer(args.model)
    documents, calibration_text = read_documents(args.text), read_text(args.calibration_text)
    windows = spread_windows(tokenizer, documents, args.length, args.windows)
    if sum(map(bool, windows)) < 2:
        raise UserError(f"{args.text.name}: two documents of {args.length} tokens are needed. Lower --length")
    config, models = make_models(original, args)
    chosen = {
        "tokens": args.calibration_tokens,
        "queries_per_head": args.calibration_queries,
        "length": args.length,
        "seed": args.seed,
        "spread_top_k": not args.even_top_k,
    }
    start = time.perf_counter()
    calibrate(models["converted"], calibration_text, tokenizer=tokenizer, progress=True, **chosen)
    calibration_s = time.perf_counter() - start
    if "moba_spread" in models:
        calibrate(models["moba_spread"], calibration_text, tokenizer=tokenizer, progress=True, **chosen)
    ranges = position_buckets(args.length, first=args.block_size, after=args.after)
    measured = measure(models, windows, ranges, max(1, args.batch_tokens // args.length))
    rows, table = make_rows(measured, args, ranges)
    head = header(
        status="complete",
        command=["python", "-m", "benchmarks.fidelity", *sys.argv[1:]],
        model=describe_model(original, name=Path(args.model).name),
        data={
            "text": {"name": args.text.name, "sha256": texts_digest(documents), "documents": len(documents)},
            "calibration_text": {"name": args.calibration_text.name, "sha256": text_digest(calibration_text)},
        },
        protocol={
            "length": args.length,
            "positions_from": args.after,
            "windows": sum(map(len, windows)),
            "windows_per_document": args.windows,
            "positions": int(sum(measured["original"][next(iter(ranges))]["n"])),
            "calibration": chosen | {"seconds": round(calibration_s, 1)},
            "top_k_per_head": {
                name: models[name].config.bsbr["top_k_per_head"] for name in models if name != "original"
            },
            "finetuned": None if args.finetuned is None else models["finetuned"].config.bsbr,
        },
        config=config.to_dict(),
        device=args.device,
        dtype="float32",
    )
    Console().print(table)
    write_json(args.output, head | {"rows": rows, "documents": measured})


if __name__ == "__main__":
    main()
