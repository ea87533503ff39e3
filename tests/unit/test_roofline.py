"""The parts whose speed `python -m recipes.benchmark.roofline` measures are all that a layer's operations are counted for."""

import pytest

from conf.schema import ModelConfig
from recipes.benchmark.roofline import ceilings
from recipes.planning.throughput import forward_flops_per_token

LENGTH = 48


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_the_parts_have_a_layers_operations_and_allow_what_their_times_sum_to(mlp: str):
    model = ModelConfig(mlp=mlp)
    said: list[str] = []
    result = ceilings(model, "fp32", LENGTH, "cpu", 0.01, said.append)
    expected = LENGTH * (forward_flops_per_token(model, LENGTH) - 2 * model.vocab_size * model.hidden_size)
    for kind, factor in (("forward", 1), ("training", 3)):
        rows = result[kind]["parts"]
        operations = sum(row["tflops"] * 1e9 * row["ms"] for row in rows)
        attention = sum(row["tflops"] * 1e9 * row["ms"] for row in rows if row["part"].startswith("attention ("))
        extra = 0.5 * attention if kind == "training" else 0  # a backward pass has five products, counted as four
        assert model.num_layers * (operations - extra) == pytest.approx(factor * expected)
        seconds = sum(row["ms"] for row in rows) / 1e3
        assert result[kind]["tokens_per_s"] == pytest.approx(LENGTH / (model.num_layers * seconds))
    assert len(said) == 4 + len(result["forward"]["parts"]) + len(result["training"]["parts"])
