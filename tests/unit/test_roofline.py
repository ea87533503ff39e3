"""The calls that the roofline measures are those that a layer's floating-point operations are counted for."""

from unittest.mock import patch

import pytest
from torch.utils.flop_counter import FlopCounterMode

from conf.schema import Config, DataConfig, ModelConfig
from recipes.benchmark import roofline
from recipes.planning.plan import Plan
from recipes.planning.throughput import attention_flops_per_token, forward_flops_per_token

LENGTH = 48


class CountedKernel:
    """Computes nothing, so that only the matrix products have operations."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def forward(self, q, *_):
        self.calls.append("forward")
        return q, q

    def backward(self, *_):
        self.calls.append("backward")


@pytest.mark.parametrize("trains", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_a_layer_has_all_its_matrix_products_and_attention(mlp: str, trains: bool):
    model, kernel = ModelConfig(mlp=mlp), CountedKernel()
    recipe = "pretrain" if trains else "forward"
    config = Config(recipe=recipe, model=model, data=DataConfig(sequence_length=LENGTH))
    with patch.object(roofline, "choose_kernel", return_value=(kernel, "")):
        calls = roofline.layer_calls(Plan(config, 1, "cpu", "CPU", None, 1))
    kernel.calls.clear()
    with FlopCounterMode(display=False) as counter:
        for call in calls:
            call()
    head = 2 * model.vocab_size * model.hidden_size
    layers = forward_flops_per_token(model, LENGTH) - head
    products = LENGTH * (layers / model.num_layers - attention_flops_per_token(model, LENGTH))
    assert counter.get_total_flops() == pytest.approx((3 if trains else 1) * products)
    assert kernel.calls == (["forward", "backward"] if trains else ["forward"])


def test_a_sequence_takes_as_long_as_its_layers():
    config = Config(recipe="forward", data=DataConfig(sequence_length=LENGTH))
    plan = Plan(config, 1, "cpu", "CPU", None, 1)

    class Clock:
        """Every call takes a millisecond, except in the first half of the rounds, which is twice as slow."""

        def __init__(self) -> None:
            self.ticks = 0

        def restart(self) -> None:
            self.ticks = 0

        def tick(self) -> None:
            self.ticks += 1

        def take(self) -> list[float]:
            slow = self.ticks // 2
            return [2e-3] * slow + [1e-3] * (self.ticks - slow)

    with patch.object(roofline, "StepClock", Clock):
        num_calls = len(roofline.layer_calls(plan))
        assert roofline.seconds_of_a_sequence(plan) == pytest.approx(config.model.num_layers * num_calls * 1e-3)
