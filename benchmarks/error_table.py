"""What each summary of a block gets wrong, on real queries and keys: block mass and attention output, by kind of head.

python -m benchmarks.error_table --model gpt2-30m --text books-val.txt.xz --length 1024 --top-k 2 \
    --output benchmarks/results/error_table_gpt2-30m.json
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from benchmarks.block_summaries import BLOCK, Entries, Layer, blocks_of, is_past, table
from bsbr.data.text import read_documents
from bsbr.evaluation.fidelity import spread_windows
from bsbr.evaluation.provenance import describe_model, header, texts_digest
from bsbr.files import write_json
from bsbr.hf import load_model, load_tokenizer
from bsbr.ops import UNCALIBRATED

STEPS = 80
FITTED, HELD_OUT = slice(0, None, 2), slice(1, None, 2)


class Truth(NamedTuple):
    """Exact attention of the sampled queries, block by block."""

    mass: Tensor
    """Log-mass of each past block, -inf elsewhere, [HQ, S, N]."""
    output: Tensor
    """Output of each block, [HQ, S, N, Dv]."""
    own_mass: Tensor
    """Log-mass of the own local block, [HQ, S]."""
    own_output: Tensor
    """Its output, [HQ, S, Dv]."""
    target: Tensor
    """Output over the whole past, [HQ, S, Dv]."""


def truth(layer: Layer, unit: int) -> Truth:
    """Compute exact attention in parts."""
    position = torch.arange(layer.k.shape[1])
    scores = layer.q @ layer.k.mT
    causal = scores.masked_fill(position > layer.at[:, None], -math.inf)
    blocked = scores[:, :, : scores.shape[2] // unit * unit].unflatten(2, (-1, unit))
    mass = blocked.logsumexp(-1)
    output = torch.einsum("hsnu,hnuv->hsnv", (blocked - mass[..., None]).exp(), blocks_of(layer.v, unit))
    own = causal.masked_fill(position // BLOCK != (layer.at // BLOCK)[:, None], -math.inf)
    past = mass.masked_fill(~is_past(layer, unit), -math.inf)
    return Truth(past, output, own.logsumexp(-1), own.softmax(-1) @ layer.v, causal.softmax(-1) @ layer.v)


def estimate(entries: Entries, exact: Truth, scalars: Tensor, top_k: int, drops: bool) -> tuple[Tensor, Tensor]:
    """Block sparse attention of the sampled queries: output [HQ, S, Dv], and the estimated log-masses [HQ, S, N]."""
    a, sigma, lam, gamma, beta = scalars[:, :, None, None].unbind(1)
    past = exact.mass > -math.inf
    mass = (entries.log_count + a + sigma * entries.m1 + lam * entries.m2).masked_fill(~past, -math.inf)
    read = torch.zeros_like(past).scatter(2, mass.topk(min(top_k, mass.shape[2]), -1).indices, True) & past
    far = torch.full_like(mass, -math.inf) if drops else mass.masked_fill(read, -math.inf)
    logits = torch.cat([exact.own_mass[..., None], exact.mass.masked_fill(~read, -math.inf), far], -1)
    own, near, rest = logits.softmax(-1).split([1, past.shape[2], past.shape[2]], -1)
    value = gamma[..., None] * entries.value + beta[..., None] * entries.correction
    output = own * exact.own_output + torch.einsum("hsn,hsnv->hsv", near, exact.output)
    return output + torch.einsum("hsn,hsnv->hsv", rest, value.expand(*rest.shape, -1)), mass


def errors(entries: Entries, exact: Truth, scalars: Tensor, top_k: int, drops: bool, rows: slice) -> dict[str, Tensor]:
    """Relative error of the output, and error of the log-mass weighted by the true share of a block, [HQ] each."""
    output, mass = estimate(entries, exact, scalars, top_k, drops)
    wrong, right = (output - exact.target)[:, rows], exact.target[:, rows]
    share = exact.mass.softmax(-1)
    off = torch.where(share > 0, mass - exact.mass, 0)[:, rows]
    return {
        "output_error": (wrong.square().sum((1, 2)) / right.square().sum((1, 2))).sqrt(),
        "mass_error": (share[:, rows] * off.square()).sum(-1).mean(-1).sqrt(),
    }


def calibrated(entries: Entries, exact: Truth, top_k: int) -> Tensor:
    """Fit the five scalars of each head to every other query, by Adam from several starts."""
    plain = torch.tensor(UNCALIBRATED).repeat(len(exact.mass), 1)
    best, least = plain, errors(entries, exact, plain, top_k, False, FITTED)["output_error"]
    for lam, beta in ((1.0, 1.0), (0.0, 0.5)):
        scalars = plain.clone()
        scalars[:, 2], scalars[:, 4] = lam, beta
        scalars.requires_grad_()
        optimizer = torch.optim.Adam([scalars], lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            optimizer.zero_grad()
            errors(entries, exact, scalars, top_k, False, FITTED)["output_error"].square().sum().backward()
            optimizer.step()
            schedule.step()
        found = errors(entries, exact, scalars.detach(), top_k, False, FITTED)["output_error"]
        best = torch.where((found < least)[:, None], scalars.detach(), best)
        least = torch.minimum(found, least)
    return best


def traits(layer: Layer) -> Tensor:
    """Where a head's mass lies: share of the first token, share of the own block, keys it is spread over, [3, HQ]."""
    position = torch.arange(layer.k.shape[1])
    share = (layer.q @ layer.k.mT).masked_fill(position > layer.at[:, None], -math.inf).softmax(-1)
    first = share[..., 0].mean(-1)
    own = (share * (position // BLOCK == (layer.at // BLOCK)[:, None])).sum(-1).mean(-1)
    keys = torch.special.entr(share).sum(-1).mean(-1).exp()
    return torch.stack([first, own, keys])


def kinds(found: Tensor) -> list[str]:
    """What each head does, by its traits."""
    names = []
    for on_first, inside, many in found.T.tolist():
        far = "peaked" if many < 64 else "broad"
        names.append("sink-like" if on_first > 0.4 else "local" if inside > 0.6 else far)
    return names


def capture(model: PreTrainedModel, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    """Run the dense model once, and keep what every layer's attention is given: q, k, v and the scale."""
    seen: list[tuple[Tensor, Tensor, Tensor, float]] = []

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any) -> Any:
        seen.append((q[0], k[0], v[0], more["scaling"]))
        return sdpa_attention_forward(module, q, k, v, mask, **more)

    AttentionInterface.register("bsbr_error_table", attend)
    AttentionMaskInterface.register("bsbr_error_table", sdpa_mask)
    model.set_attn_implementation("bsbr_error_table")
    with torch.no_grad():
        model.base_model(input_ids=ids[None], use_cache=False)
    return seen


def unrotated(model: PreTrainedModel, x: Tensor) -> Tensor:
    """Take the rotary positions off queries or keys, [H, T, D]."""
    position = torch.arange(x.shape[1], device=x.device)[None]
    cos, sin = model.base_model.rotary_emb(x[None], position)
    first, second = x.chunk(2, -1)
    return x * cos[0] - torch.cat([-second, first], -1) * sin[0]


def sample(q: Tensor, k: Tensor, v: Tensor, scale: float, first: int, queries: int) -> Layer:
    """Take queries evenly from the sparse part."""
    group, length = q.shape[0] // k.shape[0], q.shape[1]
    at = torch.linspace(first, length - 1, queries).long()
    k, v = (x.repeat_interleave(group, 0).float() for x in (k, v))
    return Layer(q[:, at].float() * scale, k, v, at, q[:, at // BLOCK * BLOCK - 1].float() * scale)


def measure(model: PreTrainedModel, windows: list[Tensor], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each layer, head, method and calibration: means over the windows."""
    sums: dict[tuple[Any, ...], list[Tensor]] = {}
    heads: dict[tuple[int, str], list[Tensor]] = {}
    first = (args.top_k + 1) * BLOCK  # from there on blocks are left out
    for ids in windows:
        for number, (q, k, v, scale) in enumerate(track(capture(model, ids), "layers", console=Console(stderr=True))):
            layers = {"kept": sample(q, k, v, scale, first, args.queries)}
            if rotary(model):
                layers["undone"] = sample(unrotated(model, q), unrotated(model, k), v, scale, first, args.queries)
            for rotation, layer in layers.items():
                heads.setdefault((number, rotation), []).append(traits(layer))
                for (name, fitted, size), found in methods(layer, args.top_k).items():
                    sums.setdefault((number, rotation, name, fitted, size), []).append(found)
    kind = {where: kinds(torch.stack(found).mean(0)) for where, found in heads.items()}
    return [
        {
            "layer": number, "head": head, "kind": kind[number, rotation][head], "rotation": rotation, "summary": name,
            "calibrated": fitted, "bytes_per_token": size, "output_error": output, "mass_error": mass,
        }
        for (number, rotation, name, fitted, size), found in sums.items()
        for head, (output, mass) in enumerate(torch.stack(found).mean(0).T.tolist())
    ]  # fmt: skip


def methods(layer: Layer, blocks: int) -> dict[tuple[str, str, float], Tensor]:
    """Errors of every method on one layer: (name, calibrated, bytes per token) to output and mass errors, [2, HQ]."""
    found = {}
    for name, method in table(BLOCK).items():
        top_k = blocks * BLOCK // method.unit
        with torch.no_grad():
            entries, exact = method.make(layer, method.unit), truth(layer, method.unit)
        # without a far field the mean keys alone are kept, to choose by
        size = 4 * entries.numbers / method.unit / (2 if method.drops else 1)
        fits = {"no": torch.tensor(UNCALIBRATED).repeat(len(layer.q), 1)}
        if not method.drops:
            fits["yes"] = calibrated(entries, exact, top_k)
        for fitted, scalars in fits.items():
            with torch.no_grad():
                both = errors(entries, exact, scalars, top_k, method.drops, HELD_OUT)
            found[name, fitted, size] = torch.stack([both["output_error"], both["mass_error"]])
    return found


def rotary(model: PreTrainedModel) -> bool:
    """Whether positions are turned into the queries and keys."""
    return getattr(model.config, "rope_parameters", None) is not None


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the model and its tokenizer")
    parser.add_argument("--text", required=True, type=Path, help="one window of each of its first documents")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--top-k", type=int, default=2, help=f"blocks of {BLOCK}; smaller units read as many tokens")
    parser.add_argument("--queries", type=int, default=64, help="sampled of each head; half are fitted")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Measure and write JSON; `benchmarks.error_table_page` makes tables of it."""
    args = arguments()
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    documents = read_documents(args.text)[: args.documents]
    windows = [window for own in spread_windows(tokenizer, documents, args.length, 1) for window in own]
    rows = measure(model, windows, args)
    protocol = {"length": args.length, "block_size": BLOCK, "top_k": args.top_k, "queries": args.queries}
    protocol |= {"windows": len(windows)}
    protocol |= {"steps": STEPS, "errors": "on the half of the queries that was not fitted; mass weighted by share"}
    head = header(
        status="complete",
        command=["python", "-m", "benchmarks.error_table", *sys.argv[1:]],
        model=describe_model(model, name=Path(args.model).name) | {"rotary": rotary(model)},
        data={"text": {"name": args.text.name, "sha256": texts_digest(documents)}},
        protocol=protocol,
        config={},
        device="cpu",
        dtype="float32",
    )
    write_json(args.output, head | {"rows": rows})


if __name__ == "__main__":
    main()
