"""A thousand requests of ragged batches through one model object, each row equal to its lone run.

python -m tests.long.ragged
"""

import argparse
import gc
import logging
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.reliability import record
from transformers import LlamaConfig, LlamaForCausalLM

from bsbr import BSBRConfig
from bsbr.evaluation.provenance import cpu_name
from bsbr.hf.convert import convert

NEW, LONGEST, VOCABULARY = 4, 96, 300
SPARSE = BSBRConfig(block_size=8, top_k=2, dense_below=0)


class Found(NamedTuple):
    """What a request's rows were like beside their lone runs."""

    rows: int
    flips: int
    """Generated tokens that differ."""
    error: float
    """Largest difference of a logit."""


def originals() -> dict[str, Any]:
    """A dense model with rotary positions and one with grouped heads: the same each time."""
    made = {}
    for name, heads in (("llama", 4), ("llama, grouped heads", 2)):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=heads, bos_token_id=0, **sizes)
        config.eos_token_id = None
        made[name] = LlamaForCausalLM(config).eval()
        for parameter in made[name].parameters():
            parameter.data *= 4  # random weights attend to everything alike: sharpen
    return made


def request(model: Any, lone: Any, draw: random.Random) -> Found:
    """Send one batch of prompts of unequal length, padded at the left, and each of them alone.

    Args:
        model: the object under test, used for all requests.
        lone: another object on equal weights.
        draw: makes the request.
    Returns:
        How they compare.
    """
    lengths = [draw.randint(1, LONGEST) for _ in range(draw.randint(1, 4))]
    width = max(lengths) + draw.randint(0, 9)
    ids = torch.tensor([[draw.randrange(1, VOCABULARY) for _ in range(width)] for _ in lengths])
    mask = torch.tensor([[int(place >= width - length) for place in range(width)] for length in lengths])
    options: dict[str, Any] = {
        "max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
        "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    batch = model.generate(ids, attention_mask=mask, **options)
    flips, error = 0, 0.0
    for row, length in enumerate(lengths):
        own = ids[row : row + 1, width - length :]
        alone = lone.generate(own, attention_mask=torch.ones_like(own), **options)
        flips += int((alone.sequences[0, length:] != batch.sequences[row, width:]).sum())
        pairs = zip(alone.logits, batch.logits, strict=True)
        error = max(error, max(float((a[0] - b[row]).abs().max() / a.abs().max()) for a, b in pairs))
    return Found(len(lengths), flips, error)


def run(requests: int, seed: int, minutes: float) -> tuple[list[Found], float]:
    """Send requests to each model object in turn.

    Args:
        requests: how many in all.
        seed: of the requests.
        minutes: no request is sent after so many.
    Returns:
        What each was like, and by how much the process's memory grew after the first fifth, in percent.
    """
    dense = originals()
    pairs = [(convert(model, SPARSE), convert(model, SPARSE)) for model in dense.values()]
    found, after_warm_up = [], 0
    started = time.monotonic()
    for number in range(requests):
        if time.monotonic() - started > 60 * minutes:
            break
        found.append(request(*pairs[number % len(pairs)], random.Random(f"{seed} {number}")))
        if not after_warm_up and (number >= requests // 5 or time.monotonic() - started > 12 * minutes):
            after_warm_up = resident()
    return found, 100 * (resident() / after_warm_up - 1)


def resident() -> int:
    """Resident memory of this process, in bytes, after what is free was given back."""
    import ctypes

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> int:
    """Send all requests and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    started = time.monotonic()
    found, grown = run(args.requests, args.seed, args.minutes)
    worst = max(each.error for each in found)
    failures = sum(each.flips > 0 or each.error > 1e-5 for each in found)
    record(
        "ragged_requests",
        section="Soak",
        claim="Ragged batches sent one after the other to one model object generate, row by row, "
        "what each prompt generates "
        "alone.",
        cases=len(found),
        failures=failures,
        measured=f"{sum(each.rows for each in found)} rows, {NEW} tokens each: "
        f"{sum(each.flips for each in found)} other tokens; "
        f"largest difference of a logit {worst:.1e} of the largest logit; resident memory "
        f"{grown:+.1f} % after the first fifth",
        not_covered=["Equal to the last bit: rows of another width are other matrix products."],
        command=f"python -m tests.long.ragged --requests {args.requests} --seed {args.seed} --minutes {args.minutes:g}",
        conditions=f"CPU ({cpu_name()}), float32; two converted Llama models of two layers; 1 to 4 "
        f"prompts of 1 to {LONGEST} tokens, "
        "up to 9 further columns of padding filled with random tokens, greedy",
        seed=args.seed,
        seconds=time.monotonic() - started,
    )  # fmt: skip
    print(f"{len(found)} requests, {failures} failures, error {worst:.2e}, memory {grown:+.2f} %")
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
