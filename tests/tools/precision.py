"""How the error of the ring grows with its degree: `python -m tests.tools.precision [--device cuda] [--json FILE]`.

bf16 attention against fp64 from the same rounded inputs, causal, zigzag. Ranks are threads of one process that run the
ring's own loops, with queues as their transport. The error is ||got - expected|| / ||expected|| over the whole tensor.
The goal is at most 1.2 times that of one rank.
"""

from __future__ import annotations

import argparse
import copy
import json
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ring_attention import CAUSAL, Layout, Mask
from ring_attention.kernels import DqSum, KernelSpec, Scores, choose_kernel
from ring_attention.kv import KeysValues
from ring_attention.ring import Ring, ring_backward, ring_forward
from ring_attention.transport import P2PMessage
from tests.tools.measure import QUANTITIES, dense_attention, relative_error

RING_DEGREES = (1, 2, 4, 8, 16)
GOAL = 1.2


@dataclass
class QueueTransfer:
    receives: list[tuple[Tensor, Any]]

    def wait(self) -> None:
        for buffer, messages in self.receives:
            buffer.copy_(messages.get(timeout=60))


class QueueTransport:
    """The transport of one simulated rank. All ranks share `queues[source, target]`."""

    def __init__(self, ring_rank: int, ring_degree: int, queues: dict[tuple[int, int], Any]) -> None:
        self.ring_rank, self.ring_degree, self._queues = ring_rank, ring_degree, queues

    def receive_buffer(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=device)

    def post(self, purpose: str, sends: list[P2PMessage], receives: list[P2PMessage]) -> QueueTransfer:
        for send in sends:
            self._queues[self.ring_rank, send.peer].put(send.tensor.clone())
        return QueueTransfer([(receive.tensor, self._queues[receive.peer, self.ring_rank]) for receive in receives])


def lock_calls(holder: Any, names: tuple[str, ...], lock: threading.Lock) -> None:
    """Let one thread at a time call these methods."""

    def locked(call: Callable[..., Any]) -> Callable[..., Any]:
        def call_alone(*arguments: Any) -> Any:
            with lock:
                return call(*arguments)

        return call_alone

    for name in names:
        setattr(holder, name, locked(getattr(holder, name)))


def simulated_ring(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float, mask: Mask = CAUSAL
) -> list[Tensor]:
    """out, dq, dk, dv of the global sequence, computed by simulated ranks."""
    degree = layout.ring_degree
    queues = {(source, target): queue.Queue() for source in range(degree) for target in range(degree)}
    kernel = copy.copy(choose_kernel(KernelSpec.of(q, k, v))[0])
    lock = threading.Lock()  # flash-attn-4 compiles in its first call, which is not thread-safe
    make_sum = kernel.dq_sum

    def locked_sum(*inputs: Tensor) -> DqSum | None:
        dq_sum = make_sum(*inputs)
        if dq_sum is not None:
            lock_calls(dq_sum, ("add", "result", "round_keys"), lock)
        return dq_sum

    lock_calls(kernel, ("forward_to", "backward_to"), lock)
    setattr(kernel, "dq_sum", locked_sum)  # noqa: B010

    def rank(ring_rank: int) -> list[Tensor]:
        transport: Any = QueueTransport(ring_rank, degree, queues)
        ring = Ring(layout, mask, transport, kernel, Scores(scale))
        local_q, local_k, local_v, local_dout = (layout.shard(x, ring_rank, dim=1) for x in (q, k, v, dout))
        kv = KeysValues.of_parts(local_k, local_v)
        out, lse = ring_forward(ring, local_q, kv)
        return [out, *ring_backward(ring, local_dout, local_q, kv, out, lse)]

    with ThreadPoolExecutor(degree) as ranks:
        shards = list(ranks.map(rank, range(degree)))
    return [layout.unshard(parts, dim=1) for parts in zip(*shards, strict=True)]


def curve(
    device: str, length: int, num_seeds: int, log: Callable[[str], None], ring_degrees: tuple[int, ...] = RING_DEGREES
) -> list[dict[str, Any]]:
    """Per ring degree and quantity: mean, least and greatest error over seeds, and the mean over that of one rank."""
    errors: dict[int, list[list[float]]] = {degree: [] for degree in ring_degrees}
    causal = torch.ones(1, length, length, dtype=torch.bool, device=device).tril()
    for seed in range(num_seeds):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(1, length, heads, 64) for heads in (4, 2, 2, 4)]
        q, k, v, dout = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes)
        expected = dense_attention(q, k, v, dout, causal, 64**-0.5).values
        for degree in ring_degrees:
            got = simulated_ring(Layout("zigzag", degree, length), q, k, v, dout, 64**-0.5)
            errors[degree].append([relative_error(*pair) for pair in zip(got, expected, strict=True)])
        log(f"seed {seed + 1} of {num_seeds} done")
    rows = []
    for degree, seed_errors in errors.items():
        for index, name in enumerate(QUANTITIES[:4]):
            values = [quantities[index] for quantities in seed_errors]
            mean = sum(values) / num_seeds
            one_rank = sum(quantities[index] for quantities in errors[ring_degrees[0]]) / num_seeds
            row = {"ring_degree": degree, "quantity": name, "error": mean, "ratio": mean / one_rank}
            rows.append({**row, "min": min(values), "max": max(values)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="The error of the ring in bf16 against its degree.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the curve to this file")
    options = parser.parse_args()
    rows = curve(options.device, options.length, options.seeds, lambda line: print(line, flush=True))
    for degree in RING_DEGREES:
        cells = [
            f"{row['quantity']} {row['error']:.2e} ({row['ratio']:.2f})" for row in rows if row["ring_degree"] == degree
        ]
        print(f"ring of {degree:2}: " + ", ".join(cells))
    if options.json:
        device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
        about = {"device": device, "torch": torch.__version__, "length": options.length, "seeds": options.seeds}
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1))
    worst = max(row["ratio"] for row in rows)
    print(f"worst error over that of one rank: {worst:.2f} (goal {GOAL})")
    raise SystemExit(worst > GOAL)


if __name__ == "__main__":
    main()
