"""What one device's matrix products and attention alone allow, in a comparison or by itself:

    python -m recipes.benchmark.roofline --model paper_10k --dtype fp16 --length 10000

A layer's parts in their order, over and over for some seconds, nothing between them: a GPU at its power limit then has
the clock that it would have in a model. No method that computes the same with the same kernels is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from conf.schema import ModelConfig
from recipes.monitor.device_metrics import StepClock
from recipes.planning.plan import DTYPES, Plan
from recipes.planning.throughput import attention_flops_per_token
from ring_attention.kernels import KernelParams, KernelSpec, SavedTensors, choose_kernel

MEASURED_S, CPU_MEASURED_S = 3.0, 0.2  # in a comparison
MODELS = Path(__file__).parents[2] / "conf" / "model"


@dataclass(frozen=True)
class Part:
    """One kernel call of a layer, and the floating-point operations it is counted for."""

    name: str
    operations: float
    run: Callable[[], Any]


def parts_of_a_layer(model: ModelConfig, length: int, dtype: torch.dtype, device: str, trains: bool) -> list[Part]:
    """On random tensors, one sequence of `length` tokens, causal attention counted once."""
    q, k, v, dout = (
        torch.randn(1, length, heads, model.head_dim, device=device).to(dtype)
        for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads, model.num_heads)
    )
    block, scale = choose_kernel(KernelSpec.of(q, k, v))[0], model.head_dim**-0.5
    params = KernelParams(None, 0, scale)
    out, lse = block.forward(q, k, v, params)
    operations = length * attention_flops_per_token(model, length)
    attention = [Part(f"attention ({block.name})", operations, lambda: block.forward(q, k, v, params))]
    gated = 2 if model.mlp == "swiglu" else 1
    sizes = {
        "qkv": (model.hidden_size, (model.num_heads + 2 * model.num_kv_heads) * model.head_dim),
        "out": (model.num_heads * model.head_dim, model.hidden_size),
        "up": (model.hidden_size, gated * model.mlp_size),
        "down": (model.mlp_size, model.hidden_size),
    }
    products = {
        name: _products(name, length, *size, model.init_std, dtype, device, trains) for name, size in sizes.items()
    }
    if trains:
        saved = SavedTensors(q, k, v, out, lse)
        attention.append(Part("attention, backward", 2.5 * operations, lambda: block.backward(dout, saved, params)))
    order = [products["qkv"], attention, products["out"], products["up"], products["down"]]
    return [part for of_one in order for part in of_one]


def _products(
    name: str, length: int, num_in: int, num_out: int, std: float, dtype: torch.dtype, device: str, trains: bool
) -> list[Part]:
    """y = x W^T + b and, in training, dx = dy W and dW = dy^T x."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x, weight, bias, operations = draw(length, num_in), std * draw(num_out, num_in), draw(num_out), 2.0
    operations *= length * num_in * num_out
    parts = [Part(name, operations, lambda: F.linear(x, weight, bias))]
    if trains:
        dy = draw(length, num_out)
        parts.append(Part(f"{name}, input's gradient", operations, lambda: dy @ weight))
        parts.append(Part(f"{name}, weight's gradient", operations, lambda: dy.T @ x))
    return parts


def measure(parts: list[Part], seconds: float) -> list[float]:
    """Median seconds of each part; the first half of the rounds warms up."""
    clock = StepClock()

    def rounds(number: int) -> list[float]:
        clock.restart()
        for _ in range(number):
            for part in parts:
                part.run()
                clock.tick()
        return clock.take()

    rounds(1)
    number = max(2, round(seconds / sum(rounds(1))))
    times_s = rounds(number)[number // 2 * len(parts) :]
    return [statistics.median(times_s[index :: len(parts)]) for index in range(len(parts))]


def seconds_of_a_sequence(plan: Plan, device: str) -> float:
    """What all layers' parts of one sequence take on this device alone, embedding, head, loss and update left out."""
    model, trains = plan.config.model, plan.trains
    seconds = MEASURED_S if device == "cuda" else CPU_MEASURED_S
    with torch.no_grad():
        length, dtype = plan.config.data.sequence_length, DTYPES[plan.config.engine.dtype]
        return model.num_layers * sum(measure(parts_of_a_layer(model, length, dtype, device, trains), seconds))


def ceilings(
    model: ModelConfig, dtype: str, length: int, device: str, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Rates of the parts, forward and in training, and the tokens per second that they allow."""
    result: dict[str, Any] = {"model": model.name, "dtype": dtype, "length": length}
    result["device"] = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    for kind in ("forward", "training"):
        parts = parts_of_a_layer(model, length, DTYPES[dtype], device, kind == "training")
        say(f"{kind}: rounds of {sum(part.operations for part in parts) / 1e12:,.3g} TFLOP on {result['device']} ...")
        times_s = measure(parts, seconds)
        tokens_per_s = length / (model.num_layers * sum(times_s))
        rows = [
            {"part": part.name, "ms": 1e3 * time_s, "tflops": part.operations / time_s / 1e12}
            for part, time_s in zip(parts, times_s, strict=True)
        ]
        result[kind] = {"parts": rows, "tokens_per_s": tokens_per_s}
        say(f"{kind}: {tokens_per_s:,.0f} tokens/s by these parts alone")
        for row in rows:
            say(f"  {row['part']:28} {row['ms']:9.3f} ms {row['tflops']:8.3g} TFLOP/s")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="What one device's matrix products and attention alone allow.")
    parser.add_argument("--model", default="paper_10k", choices=sorted(path.stem for path in MODELS.glob("*.yaml")))
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--length", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--json", type=Path, help="also write the rates to this file")
    options = parser.parse_args()
    model = ModelConfig(**yaml.safe_load((MODELS / f"{options.model}.yaml").read_text()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        result = ceilings(
            model, options.dtype, options.length, device, options.seconds, lambda line: print(line, flush=True)
        )
    if options.json:
        options.json.write_text(json.dumps({**result, "torch": torch.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    main()
