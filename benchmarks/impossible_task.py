"""The impossible task: every attention is trained on uniform noise, of which a causal model can learn nothing.

python -m benchmarks.impossible_task

The best loss on fresh noise is ln V. A model that sees the token it is to predict learns to copy it and falls below.
`leaky` is a control: full attention that is given one token too far, which must be found out.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import LlamaConfig, PreTrainedModel

from bsbr.evaluation.provenance import code_versions, cpu_name, without_folders
from bsbr.files import write_json
from bsbr.hf import build_model, count_parameters, match_parameters
from bsbr.peers import make

ATTENTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "bsbr": {"block_size": 8, "top_k": 2},
    "gated_delta": {},
    "nsa": {"block_size": 8, "top_k": 2, "window": 12},
    "linear": {},
    "window": {"window": 12},
    "moba": {"block_size": 8, "top_k": 2},
    "local": {"block_size": 8},
    "additive": {"block_size": 8},
    "additive, compressed": {"block_size": 8, "compression": 4},
    "bsbr, units of 4": {"block_size": 8, "retrieval_block_size": 4, "top_k": 3, "selection": "group"},
    "bsbr, states only": {"block_size": 8, "top_k": 0},
    "bsbr, state of each block": {"block_size": 8, "top_k": 0, "state": "block"},
    "bsbr, state for each token": {"block_size": 8, "top_k": 1, "state": "token"},
}
"""Name of each attention, up to a comma, and its settings: many block edges in a short window."""

VOCABULARY, LENGTH, ROWS = 32, 64, 8
BOUND = 0.01
"""How far below ln V the loss may lie, in nats."""
HELD_OUT = 64
"""Batches of fresh noise for the last figure."""


def main() -> None:
    """Train all that are not in the result file yet, and judge them."""
    options = _parser().parse_args()
    done = json.loads(options.output.read_text())["rows"] if options.resume else []
    names = options.attention or ["leaky", *ATTENTIONS]
    for name in names:
        if any(row["attention"] == name for row in done):
            continue
        row = measure(name, options.steps, options.seed)
        done.append(row)
        Console().print(f"{name}: {row['held_out_loss']:.4f} nats, {row['below_ln_v']:+.4f} below ln V")
        write_json(options.output, _document(done, options.steps))
    leaks = [row["attention"] for row in done if row["below_ln_v"] > BOUND]
    print(f"below ln V by more than {BOUND}: {', '.join(leaks) or 'none'}")


def measure(name: str, steps: int, seed: int) -> dict[str, Any]:
    """Train one attention on noise and take its loss on noise that it never saw.

    Args:
        name: of `ATTENTIONS`, or "leaky".
        steps: of AdamW, on `ROWS` windows each.
        seed: of the weights and the noise.
    Returns:
        One row of the result file.
    """
    attention = make("full") if name == "leaky" else make(name.split(",")[0], ATTENTIONS[name], seed=seed)
    config = match_parameters(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=LENGTH,
        ),
        attention,
    )  # fmt: skip
    model = build_model(config, attention, seed=seed)
    shift = 1 if name == "leaky" else 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(seed)
    curve, total = [], 0.0
    for step in range(1, steps + 1):
        loss = _loss(model, generator, shift)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.item()
        if step % 100 == 0:
            curve.append(round(total / 100, 5))
            total = 0.0
    model.eval()
    with torch.no_grad():
        losses = torch.stack([_loss(model, generator, shift) for _ in range(HELD_OUT)]).double()
    return {
        "attention": name,
        "settings": attention.to_dict(),
        "parameters": count_parameters(config, attention),
        "steps": steps,
        "seed": seed,
        "held_out_loss": losses.mean().item(),
        "standard_error": (losses.std() / HELD_OUT**0.5).item(),
        "below_ln_v": math.log(VOCABULARY) - losses.mean().item(),
        "training_loss_each_100_steps": curve,
    }


def _loss(model: PreTrainedModel, generator: torch.Generator, shift: int) -> torch.Tensor:
    """Mean loss of the next token on fresh noise; shifted by one, the model is given the token it is to predict."""
    noise = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    logits = model(noise[:, shift : LENGTH + shift], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), noise[:, 1:].flatten())


def _document(rows: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    return {
        "schema": {"name": "bsbr.benchmarks.impossible_task", "version": 1},
        "command": [without_folders(word) for word in sys.argv if word != "--resume"],
        "code": code_versions(),
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "device": "cpu", "dtype": "float32"},
        "protocol": f"Llama, 1 layer of 32, 4 query and 2 key heads, MLPs narrowed to equal parameters; {steps} steps "
        f"of AdamW (3e-3) on {ROWS} windows of {LENGTH} tokens drawn uniformly from {VOCABULARY}, all of them fresh; "
        f"then the mean loss over {HELD_OUT} more batches. The leaky control is given the token it is to predict",
        "ln_v": math.log(VOCABULARY),
        "bound": BOUND,
        "least_loss": min((row["held_out_loss"] for row in rows if row["attention"] != "leaky"), default=None),
        "rows": rows,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attention", nargs="+", choices=list(ATTENTIONS), help="None means all and the control")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/impossible_task.json"))
    parser.add_argument("--resume", action="store_true", help="keep what the result file holds")
    return parser


if __name__ == "__main__":
    main()
