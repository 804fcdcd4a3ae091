"""Language models from random weights with different attentions, the same tokens in the same order: held-out loss.

python -m benchmarks.from_scratch prepare --text books-train.txt.xz --val books-val.txt.xz --tokenizer DIR data
python -m benchmarks.from_scratch run data rows --attention full bsbr window gated_delta --seeds 0 1 2
python -m benchmarks.from_scratch gather rows benchmarks/results/from_scratch.json

A run that is there already is not made again, so that the second command goes on where it was stopped.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5

from benchmarks.spread import spread
from benchmarks.training_rows import add_parts, conditions, read_rows, write_row
from bsbr.data.text import read_text, split_documents, text_digest
from bsbr.data.tokenizer import ENDOFTEXT_ID, encode_documents, load_tokenizer, token_byte_lengths
from bsbr.files import write_json
from bsbr.hf import peers
from bsbr.peers import gated_delta_attention, gated_delta_layer
from bsbr.training.batches import TextBatches
from bsbr.training.build import build_model, parse_attention
from bsbr.training.corpus import Corpus, save_tokenizer
from bsbr.training.language_model import save_model, token_nll
from bsbr.training.progress import TrainingProgress
from bsbr.training.recipe import PretrainConfig
from bsbr.training.trainer import Trainer, total_steps

ATTENTIONS = {
    "full": "full",
    "bsbr": "bsbr:block_size=64,top_k=8,dense_below=0",
    "window": "window:window=576",
    "linear": "linear",
    "gated_delta": "gated_delta",
    "local": "local:block_size=64",
    "moba": "moba:block_size=64,top_k=8",
    "nsa": "nsa",
    "none": "full",
}
"""What each name stands for, `none` in a shape without attention; a window of 576 tokens is what 8 retrieved blocks and
the own block of 64 are."""

RECIPE: dict[str, Any] = {
    "context": 4096, "batch_tokens": 32_768, "lr": 4e-3, "muon_lr": 8e-3, "weight_decay": 0.1, "warmup_steps": 50,
    "val_interval": 128, "val_windows": 16, "documents": "joined", "checkpoint_interval": 1 << 30,
    "match_parameters": True,
}  # fmt: skip
_SHAPE = Path(__file__).parent / "configs" / "llama_28m.json"
_TOGETHER = 32
"""Documents encoded at once, so that all cores have work."""
_LAST = 1024
"""Positions at the end of a window whose loss is stated apart."""


def main() -> None:
    """Prepare, run or gather."""
    options = _parser().parse_args()
    options.act(options)


def prepare(options: argparse.Namespace) -> None:
    """Encode whole documents in random order until there are tokens enough: a part that is like the whole."""
    tokenizer, folder = load_tokenizer(options.tokenizer), Path(options.data)
    save_tokenizer(tokenizer, folder)
    record = {}
    for role, path, count in (("train", options.text, options.tokens), ("held_out", options.val, options.val_tokens)):
        text = read_text(path)
        documents = split_documents(text)
        parts: list[np.ndarray] = []
        order = np.random.default_rng(0).permutation(len(documents))
        for first in range(0, len(order), _TOGETHER):
            if sum(map(len, parts)) <= count:
                chosen = [documents[i] for i in order[first : first + _TOGETHER]]
                parts.append(encode_documents(tokenizer, chosen))
        ids = np.concatenate(parts)[: count + 1]
        np.save(folder / f"{role}.npy", ids)
        record[role] = {
            "name": Path(path).name, "sha256": text_digest(text), "documents": int((ids == ENDOFTEXT_ID).sum()),
            "tokens": len(ids),
        }  # fmt: skip
    write_json(folder / "text.json", record)


def run(options: argparse.Namespace) -> None:
    """Train every attention with every seed, and write a row after each."""
    corpus = load_corpus(Path(options.data), torch.device(options.device))
    if options.compile_layer:
        compile_layer_alone()
    for name in options.attention:
        torch.compiler.reset()  # PyTorch compiles one function for so many models only
        for seed in options.seeds:
            target = Path(options.rows) / f"{name}-{seed}.json"
            if target.exists():
                continue
            try:
                row, model = train(name, seed, corpus, options)
                if options.keep:  # before the row, which says that both are there
                    save_model(model.float(), Path(options.keep) / f"{name}-{seed}")
                write_row(target, row)
            except Exception:  # one run that fails must not cost the others
                traceback.print_exc()


def compile_layer_alone() -> None:
    """Compile what Gated DeltaNet does in a layer as one graph for all layers, ours and Qwen 3.5's.

    Within a whole model its graph is three times the size of another attention's, and takes the compiler minutes.
    """
    compiled = torch.compile(gated_delta_layer, dynamic=False)

    def layer(*given: Any) -> torch.Tensor:
        # other shapes come without gradients, and are few
        return compiled(*given) if torch.is_grad_enabled() else gated_delta_layer(*given)

    peers.gated_delta_layer = layer  # type: ignore[assignment]
    modeling_qwen3_5.torch_chunk_gated_delta_rule = gated_delta_rule(
        torch.compile(gated_delta_attention, dynamic=False)
    )


def gated_delta_rule(attention: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """Make what Qwen 3.5's layers call of our Gated DeltaNet; transformers' own goes from chunk to chunk in Python."""

    def rule(
        q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, initial_state: None, output_final_state: bool,
        use_qk_l2norm_in_kernel: bool, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        assert initial_state is None
        assert use_qk_l2norm_in_kernel
        assert not output_final_state
        group = v.shape[2] // k.shape[2]  # values that share a key: some versions repeat it before the call
        q, k = (x.repeat_interleave(group, 2).float() for x in (q, k))
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        return attention(q * q.shape[-1] ** -0.5, k, v, g, beta).to(v.dtype), None

    return rule


def load_corpus(folder: Path, device: torch.device) -> Corpus:
    """Read what `prepare` wrote."""
    tokenizer = load_tokenizer(folder)
    streams = {
        x: torch.from_numpy(np.load(folder / f"{x}.npy").astype(np.int32)).to(device) for x in ("train", "held_out")
    }
    lengths = torch.from_numpy(token_byte_lengths(tokenizer)).to(device)
    record = json.loads((folder / "text.json").read_text())
    return Corpus(tokenizer=tokenizer, byte_lengths=lengths, record=record, **streams)


def train(name: str, seed: int, corpus: Corpus, options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Train one model and measure it."""
    recipe = PretrainConfig(
        architecture=options.shape, attention=parse_attention(ATTENTIONS[name], seed), tokens=options.tokens, seed=seed,
        compile=options.compile, **RECIPE | json.loads(options.recipe),
    )  # fmt: skip
    model = build_model(recipe, len(corpus.tokenizer)).to(corpus.train.device)
    batches = TextBatches(corpus, recipe, total_steps(recipe))
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, TrainingProgress() as progress:
        trainer = Trainer(config=recipe, model=model, batches=batches, folder=Path(scratch), progress=progress)
        trainer.train()
    seconds = time.monotonic() - begun
    losses = held_out(model, corpus, recipe.context, options.val_windows)
    row = {
        "attention": name, "seed": seed, "recipe": {**recipe.to_dict(), "architecture": Path(options.shape).name},
        "shape": json.loads(Path(options.shape).read_text()),
        "parameters": sum(p.numel() for p in model.parameters()), "steps": trainer.step,
        "tokens": trainer.step * recipe.batch_tokens, "precision": trainer.precision, "text": corpus.record,
        "seconds_beside_other_runs": round(seconds, 1), "history": trainer.history,
        "nll": losses.mean().item(), "nll_last": losses[:, -_LAST:].mean().item(),
        "nll_by_eighth": [x.mean().item() for x in losses.chunk(8, 1)],
        "windows": {"nll": losses.mean(1).tolist(), "nll_last": losses[:, -_LAST:].mean(1).tolist()},
        **conditions(sys.argv, corpus.train.device),
    }  # fmt: skip
    return row, model


@torch.no_grad()
def held_out(model: Any, corpus: Corpus, length: int, windows: int) -> torch.Tensor:
    """Loss of every token of the held-out windows, [windows, length] float64 on the CPU; bfloat16 on a GPU."""
    count = min(windows, (len(corpus.held_out) - 1) // length)
    found = []
    device = corpus.held_out.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for first in range(0, count, 4):
            rows = [corpus.held_out[i * length : (i + 1) * length + 1] for i in range(first, min(count, first + 4))]
            found.append(token_nll(model, torch.stack(rows).long()).double().cpu())
    return torch.cat(found)


def gather(options: argparse.Namespace) -> None:
    """Join the rows, and state means and spreads over seeds, and differences from full attention of the same seed."""
    rows = read_rows(options.rows)
    by_name: dict[str, dict[int, Any]] = {}
    for row in rows:
        by_name.setdefault(row["attention"], {})[row["seed"]] = row
    summary = {name: _summarise(found, by_name.get("full", {})) for name, found in by_name.items()}
    first = rows[0]
    content = {
        "schema": {"name": "bsbr.benchmarks.from_scratch", "version": 1},
        "protocol": {
            "loss": "nats per token over held-out windows that do not overlap; `last` is of the last 1,024 positions",
            "difference": "of one seed's runs, which start from the same weights and read the same tokens in the same "
            "order; mean and standard deviation over seeds",
        },
        "code": first["code"], "machine": first["machine"], "command": first["command"],
        "attentions": {name: ATTENTIONS[name] for name in by_name}, "summary": summary, "rows": rows,
    }  # fmt: skip
    write_json(options.output, content)
    print(table(summary))


def _summarise(found: dict[int, Any], full: dict[int, Any]) -> dict[str, Any]:
    summary: dict[str, Any] = {"seeds": sorted(found), "parameters": next(iter(found.values()))["parameters"]}
    for key in ("nll", "nll_last"):
        summary[key] = spread([row[key] for row in found.values()])
        both = sorted(found.keys() & full.keys())
        if both:
            summary[f"{key}_minus_full"] = spread([found[seed][key] - full[seed][key] for seed in both])
    return summary


def table(summary: dict[str, Any]) -> str:
    """Write the summary as a Markdown table."""
    lines = ["| attention | held-out loss | minus full | last 1,024 | minus full |", "|---|---|---|---|---|"]
    for name, found in sorted(summary.items(), key=lambda item: item[1]["nll"]["mean"]):
        cells = [
            f"{found[key]['mean']:{'+' if 'minus' in key else ''}.4f} ± {found[key]['sd']:.4f}" if key in found else ""
            for key in ("nll", "nll_minus_full", "nll_last", "nll_last_minus_full")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts, running = add_parts(parser, run, gather)
    part = parts.add_parser("prepare")
    part.add_argument("data")
    for name in ("--text", "--val", "--tokenizer"):
        part.add_argument(name, required=True)
    part.add_argument("--tokens", type=int, default=1 << 24)
    part.add_argument("--val-tokens", type=int, default=1 << 20)
    part.set_defaults(act=prepare)
    part = running
    part.add_argument("data")
    part.add_argument("rows")
    part.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=["full", "bsbr", "window", "linear"])
    part.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    part.add_argument("--tokens", type=int, default=1 << 24)
    part.add_argument("--val-windows", type=int, default=256)
    part.add_argument("--shape", default=str(_SHAPE), help="configuration of the model, JSON")
    part.add_argument("--recipe", default="{}", help="fields of PretrainConfig that differ, JSON")
    part.add_argument("--compile", action="store_true")
    part.add_argument("--compile-layer", action="store_true", help="compile Gated DeltaNet's part of a layer alone")
    part.add_argument("--keep", metavar="DIR", help="save the models here, as NAME-SEED")
    return parser


if __name__ == "__main__":
    main()
