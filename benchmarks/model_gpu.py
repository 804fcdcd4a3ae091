"""A whole model of Llama's shape with 1.2 billion random weights on a GPU: reading a text, decoding, cache memory.

python -m benchmarks.model_gpu --length 131072
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks.attention_gpu import summary
from bsbr import BSBRConfig, convert
from bsbr.evaluation.provenance import code_versions, without_folders
from bsbr.files import write_json
from bsbr.hf import BSBRCache

BACKENDS = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
SPARE = 128
"""Tokens that caches have room for beyond the text."""


@torch.no_grad()
def main() -> None:
    """Measure every part, and write one JSON file."""
    options = _parser().parse_args()
    config = BSBRConfig(block_size=options.block_size, top_k=options.top_k, dense_below=options.dense_below)
    original = make_model(options)
    converted = convert(original, config)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "prefill": lambda: prefill(original, converted, options.length, options.peers),
        "decode": lambda: decode(original, converted, options.length),
        "memory": lambda: memory(original, config, options.length),
    }
    found: dict[str, Any] = {}
    for name in options.parts:
        found[name] = parts[name]()
        gc.collect()
        torch.cuda.empty_cache()
        print(name, found[name], flush=True)
        write_json(options.output, _header(options, config, original) | found)


def make_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """Llama 3.2's 1 billion shape, random weights in bfloat16."""
    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=4 * options.hidden, num_hidden_layers=options.layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=options.hidden // 32, vocab_size=options.vocabulary,
        max_position_embeddings=options.length + SPARE, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, attn_implementation="sdpa",
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    with torch.device(options.device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(before)
    return model


def prefill(original: Any, converted: Any, length: int, peers: list[str]) -> dict[str, Any]:
    """Read a text into a fresh cache, logits of the last token; and how much of it is attention."""
    generator = torch.Generator(original.device).manual_seed(0)
    ids = torch.randint(original.config.vocab_size, (1, length), generator=generator, device=original.device)

    def read(model: Any, cache: Callable[[], Any]) -> Callable[[], object]:
        return lambda: model(ids, past_key_values=cache(), use_cache=True, logits_to_keep=1).logits

    def with_backend(backend: SDPBackend, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with sdpa_kernel(backend):
                return call()

        return run

    dense = read(original, lambda: DynamicCache(config=original.config))
    calls = {"bsbr": ("bsbr", read(converted, lambda: BSBRCache(converted.config)))}
    calls |= {name: ("sdpa", with_backend(backend, dense)) for name, backend in BACKENDS.items() if name in peers}
    times: dict[str, Any] = {}
    shares: dict[str, float] = {}
    for name, (implementation, call) in calls.items():
        samples = [timed(implementation, call) for _ in range(4)][1:]
        times[name] = summary([whole for whole, _ in samples])
        shares[name] = statistics.median(attention / whole for whole, attention in samples)
    best = min((name for name in times if name != "bsbr"), key=lambda name: times[name]["median"])
    speedup = {name: x["median"] / times["bsbr"]["median"] for name, x in times.items() if name != "bsbr"}
    return {"time_ms": times, "attention_share": shares, "best_baseline": best, "speedup": speedup}


def timed(implementation: str, call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of a call, and of those between events around each layer's attention function."""
    functions = AttentionInterface()
    inner, events = functions[implementation], []

    def attend(*args: Any, **kwargs: Any) -> Any:
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        result = inner(*args, **kwargs)
        pair[1].record()
        events.append(pair)
        return result

    AttentionInterface.register(implementation, attend)
    try:
        whole = _milliseconds(call)
    finally:
        AttentionInterface.register(implementation, inner)
    return whole, sum(start.elapsed_time(end) for start, end in events)


def decode(original: Any, converted: Any, length: int) -> dict[str, Any]:
    """One step after `length` tokens of random keys and values: called by Python, and as a CUDA graph."""
    config, device = original.config, original.device
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    position = torch.full((1, 1), length, device=device)
    times: dict[str, Any] = {}

    def step(model: Any, cache: Any) -> Tensor:
        return model(token, past_key_values=cache, position_ids=position, use_cache=True).logits

    for name in ("bsbr", "static", "dynamic"):
        caches = {
            "bsbr": lambda: BSBRCache(converted.config),
            "static": lambda: StaticCache(config=config, max_cache_len=length + SPARE),
            "dynamic": lambda: DynamicCache(config=config),
        }
        model, cache = converted if name == "bsbr" else original, caches[name]()
        for layer in range(config.num_hidden_layers):
            fill(cache, layer, config, length, device)
        if name == "bsbr":
            cache.reserve(length + SPARE)
        call = lambda model=model, cache=cache: step(model, cache)  # noqa: E731
        times[f"{name}, called"] = summary([_milliseconds(call) for _ in range(14)][4:])
        if name != "dynamic" and device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            graph.replay()

            def replay(cache: Any = cache, graph: torch.cuda.CUDAGraph = graph) -> None:
                graph.replay()
                if isinstance(cache, BSBRCache):
                    cache.replayed()

            times[f"{name}, graph"] = summary([_milliseconds(replay) for _ in range(24)][4:])
            del graph, replay
        del cache, call
        gc.collect()
        torch.cuda.empty_cache()
    times["ready, graph"] = ready(original, length, token, position)
    ratios = {name: x["median"] / times["bsbr, graph"]["median"] for name, x in times.items() if "graph" in name}
    return {"time_ms": times, "speedup_of_graphs": ratios}


def ready(original: Any, length: int, token: Tensor, position: Tensor) -> dict[str, Any]:
    """The dense step if keeping a cache were free: cuDNN's attention to ready keys and values, as a CUDA graph."""
    config, functions = original.config, AttentionInterface()
    shape = 1, config.num_key_value_heads, length, config.head_dim
    held = [
        [torch.randn(shape, device=original.device, dtype=torch.bfloat16) for _ in range(2)]
        for _ in range(config.num_hidden_layers)
    ]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        k, v = held[module.layer_idx]
        with sdpa_kernel(BACKENDS["sdpa-cudnn"]):
            return scaled_dot_product_attention(query, k, v, enable_gqa=True).transpose(1, 2), None

    inner = functions["sdpa"]
    AttentionInterface.register("sdpa", attend)
    try:
        call = lambda: original(token, position_ids=position, use_cache=False).logits  # noqa: E731
        for _ in range(2):
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    finally:
        AttentionInterface.register("sdpa", inner)
    return summary([_milliseconds(graph.replay) for _ in range(24)][4:])


def fill(cache: Any, layer: int, config: Any, length: int, device: torch.device) -> None:
    """Put random keys and values of `length` tokens into a layer of a cache."""
    generator = torch.Generator(device).manual_seed(layer)
    shape = 1, config.num_key_value_heads, length, config.head_dim
    k, v = (torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2))
    if isinstance(cache, BSBRCache):
        cache.layers[layer].fill(k, v)  # type: ignore[union-attr]
    else:
        cache.update(k, v, layer)


def memory(original: Any, config: BSBRConfig, length: int) -> dict[str, Any]:
    """Bytes of a full cache in every mode, as the cache counts them and as the GPU's allocator does."""
    dense = 2 * original.config.num_hidden_layers * 8 * length * original.config.head_dim * 2
    states = BSBRConfig(block_size=config.block_size, top_k=0, dense_below=0)
    used: dict[str, Any] = {"dense": {"device": dense, "host": 0}}
    for mode, settings in (("full", config), ("offload", config), ("states", states)):
        model = convert(original, settings)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        cache = BSBRCache(model.config, mode)  # type: ignore[arg-type]
        for layer in range(original.config.num_hidden_layers):
            fill(cache, layer, original.config, length, original.device)
        used[mode] = cache.num_bytes() | {"allocated": torch.cuda.memory_allocated() - before}
        used[mode]["of_dense"] = used[mode]["device"] / dense
        del cache, model
    return used


def _milliseconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = call()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end)


def _header(options: argparse.Namespace, config: BSBRConfig, model: Any) -> dict[str, Any]:
    return {
        "schema": {"name": "bsbr.benchmarks.model_gpu", "version": 1},
        "command": [without_folders(word) for word in sys.argv],
        "code": code_versions(),
        "machine": {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "dtype": "bfloat16"},
        "config": config.to_dict(),
        "length": options.length,
        "model": {
            "shape": f"{options.layers} layers of {options.hidden}, 32 query and 8 key heads of {options.hidden // 32}",
            "parameters": sum(x.numel() for x in model.parameters()),
        },
        "protocol": {
            "prefill": "random tokens into a fresh cache, logits of the last one; events around the call, median of 3",
            "attention_share": "events around every layer's attention function; projections and rotation are outside",
            "decode": "one token after random keys and values; `static` and `dynamic` are transformers' caches with "
            "its sdpa attention, `ready` cuDNN's attention to ready tensors "
            "with no cache at all; `called` as users call the model, `graph` the same step captured and replayed",
            "memory": "device: what the cache counts as on the GPU; allocated: what the allocator gave",
        },
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--length", type=int, default=131072, help="tokens of the text")
    parser.add_argument("--parts", nargs="+", choices=("prefill", "decode", "memory"),
                        default=("prefill", "decode", "memory"))  # fmt: skip
    parser.add_argument("--peers", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="what prefill is beside")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dense-below", type=int, default=BSBRConfig.dense_below, help="positions below it are exact")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/model_gpu.json"))
    return parser


if __name__ == "__main__":
    main()
