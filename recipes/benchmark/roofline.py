"""The speed that a rank's matrix products and attention allow: a bound for every method that uses the same kernels.

Runs one layer's kernels for seconds, so that a GPU at its power limit has the clock that it has in a real step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.monitor.device_metrics import StepClock
from recipes.planning.plan import DTYPES, Plan
from ring_attention.kernels import KernelParams, KernelSpec, SavedTensors, choose_kernel

MEASURED_S = {"cuda": 3.0, "cpu": 0.2}


def seconds_of_a_sequence(plan: Plan) -> float:
    """The kernel time of one sequence on this device alone: all layers without embedding, head, loss and optimizer."""
    clock, calls = StepClock(), layer_calls(plan)

    def times_s(num_rounds: int) -> list[float]:
        clock.restart()
        for _ in range(num_rounds):
            for call in calls:
                call()
                clock.tick()
        return clock.take()

    with torch.no_grad():
        times_s(1)  # kernels are chosen and compiled
        num_rounds = max(2, round(MEASURED_S[plan.device_type] / sum(times_s(1))))
        steady_s = times_s(num_rounds)[num_rounds // 2 * len(calls) :]  # the first half warms up
    return plan.config.model.num_layers * sum(statistics.median(steady_s[n :: len(calls)]) for n in range(len(calls)))


def layer_calls(plan: Plan) -> list[Callable[[], Any]]:
    """One layer's matrix products and causal attention of a random sequence, each before its gradients if it trains."""
    model, length, trains = plan.config.model, plan.config.data.sequence_length, plan.trains

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=plan.device_type).to(DTYPES[plan.config.engine.dtype])

    def products(num_in: int, num_out: int) -> list[Callable[[], Any]]:
        """y = x W^T + b and, in training, dx = dy W and dW = dy^T x."""
        x, weight, bias = draw(length, num_in), model.init_std * draw(num_out, num_in), draw(num_out)
        dy = draw(length, num_out)
        calls = [lambda: F.linear(x, weight, bias), lambda: dy @ weight, lambda: dy.T @ x]
        return calls if trains else calls[:1]

    def attention() -> list[Callable[[], Any]]:
        q, dout = (draw(1, length, model.num_heads, model.head_dim) for _ in range(2))
        k, v = (draw(1, length, model.num_kv_heads, model.head_dim) for _ in range(2))
        kernel, params = choose_kernel(KernelSpec.of(q, k, v))[0], KernelParams(None, 0, model.head_dim**-0.5)
        saved = SavedTensors(q, k, v, *kernel.forward(q, k, v, params))
        calls = [lambda: kernel.forward(q, k, v, params), lambda: kernel.backward(dout, saved, params)]
        return calls if trains else calls[:1]

    gated = 2 if model.mlp == "swiglu" else 1
    return [
        *products(model.hidden_size, (model.num_heads + 2 * model.num_kv_heads) * model.head_dim),
        *attention(),
        *products(model.num_heads * model.head_dim, model.hidden_size),
        *products(model.hidden_size, gated * model.mlp_size),
        *products(model.mlp_size, model.hidden_size),
    ]
