"""How long calibration takes, on a GPU or on a few CPU cores.

python -m benchmarks.calibration_time --model llama-28m --text books-train.txt.xz --length 8192 --top-k 8 \
    --device cuda --output benchmarks/results/calibration_time_cuda.json
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from bsbr import BSBRConfig, calibrate, convert
from bsbr.data.text import read_text, text_digest
from bsbr.evaluation.provenance import describe_model, header
from bsbr.evaluation.rows import row
from bsbr.evaluation.speed import time_estimate
from bsbr.files import write_json
from bsbr.hf import load_model, load_tokenizer


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the original model and its tokenizer")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--length", type=int, default=None, help="tokens of a window; None: what suits the model")
    parser.add_argument("--top-k", type=int, default=BSBRConfig.top_k)
    parser.add_argument("--retrieval-block-size", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--queries", type=int, default=512, help="sampled of each head")
    parser.add_argument("--repeats", type=int, default=2, help="the first warms up, if there are others")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Calibrate several times, and write the seconds."""
    args = arguments()
    original, tokenizer = load_model(args.model).to(args.device), load_tokenizer(args.model)
    text = read_text(args.text)
    config = BSBRConfig(retrieval_block_size=args.retrieval_block_size, top_k=args.top_k, dense_below=0)
    seconds = []
    for _ in range(args.repeats):
        model = convert(original, config)
        if args.device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        calibrate(
            model, text, tokenizer=tokenizer, tokens=args.tokens, length=args.length, queries_per_head=args.queries
        )
        if args.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        print(f"{seconds[-1]:.1f} s", flush=True)
    head = header(
        status="complete",
        command=["python", "-m", "benchmarks.calibration_time", *sys.argv[1:]],
        model=describe_model(original, name=Path(args.model).name),
        data={"text": {"name": args.text.name, "sha256": text_digest(text)}},
        protocol={
            "tokens": args.tokens, "length": args.length, "queries_per_head": args.queries, "repeats": args.repeats,
            "seconds": [round(x, 2) for x in seconds],
            "interval": "20-80 % quantiles of the repeats after the first; the model on its device before, "
            "reading the text's tokens, sampling, spreading, fitting and the check on held-out windows inside",
        },
        config=config.to_dict(),
        device=args.device,
        dtype="float32",
    )  # fmt: skip
    where = {"tokens": args.tokens, "top_k": args.top_k, "retrieval_block_size": config.unit}
    kept = seconds[1:] or seconds
    write_json(
        args.output, head | {"rows": [row("calibration", "time_s", "converted", where, time_estimate(kept), "s")]}
    )


if __name__ == "__main__":
    main()
