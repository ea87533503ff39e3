"""Packed documents on one GPU: flash-attn-4's own varlen call, a ring of one, and the slowest rank of a simulated ring.

    python -m tests.tools.packed_speed --json FILE [--length 524288] [--mixes log-normal]

needs a Hopper GPU and flash-attn-4. Llama 3.1 8B's heads, bf16, causal within documents. A simulated rank has the tiles
and merges of a ring of 8 but no messages. Rounds of varlen and of each of ours alternate: a GPU's clock depends on what
ran before. The passes are also replayed as CUDA graphs: their times have no host in them, as where it is ahead of the
GPU in a training step.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.schema import Config, DataConfig, document_lengths
from recipes.benchmark.rank_alone import rank_alone
from ring_attention import CAUSAL, Mask
from ring_attention.direct import attend_over_ring
from ring_attention.direct_plan import direct_plan
from ring_attention.kernels import KERNELS, Scores
from ring_attention.layout import Layout
from ring_attention.ring import forward_calls

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, DEGREE, ROUNDS = 32, 8, 128, 8, 5
TIMED_MS = 120.0


def mixes(length: int) -> dict[str, list[int]]:
    """Lengths of documents."""
    config = Config(recipe="bench_attention", documents="lognormal", data=DataConfig(sequence_length=length))
    equal = {f"{length // size:,} of {size:,}": [size] * (length // size) for size in (length, 8192, 2048, 256)}
    return {**equal, "log-normal": list(document_lengths(config))}


def ours(layout: Layout, mask: Mask, rank: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    ring = rank_alone(layout, mask, rank, KERNELS["flash_attn_4"], Scores(HEAD_DIM**-0.5))
    return lambda q, k, v: attend_over_ring(q, k, v, None, ring)


def num_calls(layout: Layout, mask: Mask, rank: int) -> int:
    """Kernel calls of a forward pass."""
    arguments = (layout, mask, rank, 1, KERNELS["flash_attn_4"])
    plan = direct_plan(*arguments)
    return sum(map(len, forward_calls(*arguments) if plan is None else (plan.whole_calls, plan.rest_calls)))


def milliseconds(call: Callable[[], Any], total_ms: float = TIMED_MS) -> float:
    """Of one call, over so many milliseconds."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measured(number: int) -> float:
        start.record()
        for _ in range(number):
            call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / number

    measured(1)
    return measured(max(2, round(total_ms / measured(1))))


@functools.cache
def warm_up_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def replayed(call: Callable[[], Any]) -> Callable[[], None]:
    """The same work as a CUDA graph."""
    with torch.cuda.stream(warm_up_stream()):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def passes(attend: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, Callable[[], Any]]:
    q, k, v, dout = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return {
        "forward": lambda: attend(q, k, v),
        "with backward": lambda: torch.autograd.grad(attend(*leaves), leaves, dout),
    }


def side_by_side(varlen: Callable[[], Any], ours: Callable[[], Any]) -> dict[str, Any]:
    rounds = [(milliseconds(varlen), milliseconds(ours)) for _ in range(ROUNDS)]
    times = dict(zip(("varlen", "ours"), zip(*rounds, strict=True), strict=True))
    medians = {f"{who}_ms": statistics.median(own) for who, own in times.items()}
    return medians | {f"{who}_all": own for who, own in times.items()}


def slowest_rank(varlen: Callable[[], Any], of_ranks: list[Callable[[], Any]]) -> dict[str, Any]:
    rounds = [[milliseconds(call, TIMED_MS / 4) for call in of_ranks] for _ in range(ROUNDS)]
    medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
    slowest = medians.index(max(medians))
    return {"slowest_rank": slowest, "of_ranks_ms": medians, **side_by_side(varlen, of_ranks[slowest])}


def measure(name: str, lengths: list[int], inputs: list[Tensor]) -> dict[str, Any]:
    from flash_attn.cute.interface import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    length, ends = sum(lengths), tuple(itertools.accumulate(lengths, initial=0))
    mask = CAUSAL.packed(ends) if len(lengths) > 1 else CAUSAL
    cumulative = torch.tensor(ends, dtype=torch.int32, device="cuda")

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes = {"cu_seqlens_q": cumulative, "cu_seqlens_k": cumulative}
        sizes |= {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
        out = flash_attn_varlen_func(q[0], k[0], v[0], causal=True, **sizes)
        return (out[0] if isinstance(out, tuple) else out)[None]

    one = ours(Layout("zigzag", 1, length), mask, 0)
    expected = varlen(*inputs[:3]).float()
    row: dict[str, Any] = {"mix": name, "num_documents": len(lengths)}
    row["error"] = ((one(*inputs[:3]).float() - expected).norm() / expected.norm()).item()
    of_varlen, of_one = passes(varlen, inputs), passes(one, inputs)
    row |= {kind: side_by_side(of_varlen[kind], of_one[kind]) for kind in of_varlen}
    for layout_name in ("zigzag", "balanced"):
        layout = Layout(layout_name, DEGREE, length, documents=ends if layout_name == "balanced" else None)
        of_ranks = [passes(ours(layout, mask, rank), shards(layout, rank, inputs)) for rank in range(DEGREE)]
        simulated: dict[str, Any] = {"calls": [num_calls(layout, mask, rank) for rank in range(DEGREE)]}
        for kind, varlen_pass in of_varlen.items():
            calls = [of_rank[kind] for of_rank in of_ranks]
            simulated[kind] = slowest_rank(varlen_pass, calls)
            if layout_name == "balanced":
                simulated[f"{kind}, replayed"] = slowest_rank(replayed(varlen_pass), [*map(replayed, calls)])
        row[f"ring of {DEGREE}, {layout_name}"] = simulated
    return row


def shards(layout: Layout, rank: int, inputs: list[Tensor]) -> list[Tensor]:
    q, k, v, dout = (layout.shard(x, rank, dim=1) for x in inputs)
    return [q, *torch.stack((k, v)).unbind(0), dout]  # K and V side by side, as the recipe's model has them


def main() -> None:
    parser = argparse.ArgumentParser(description="Packed documents: varlen and ours.")
    parser.add_argument("--json", type=Path, required=True, help="write the rows to this file")
    parser.add_argument("--length", type=int, default=65536, help="tokens of the sequence")
    parser.add_argument("--mixes", nargs="*", help="names of the mixes; default: all")
    options = parser.parse_args()
    torch.manual_seed(0)
    heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS, NUM_HEADS)
    inputs = [torch.randn(1, options.length, n, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for n in heads]
    rows = []
    for name, lengths in mixes(options.length).items():
        if not options.mixes or name in options.mixes:
            rows.append(measure(name, lengths, inputs))
            print(rows[-1], flush=True)
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
