"""Pure functions behind a run: loss rule, learning rate schedule, sizes, FLOPs, throughput, the plan."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from conf.schema import AttentionConfig, Config, DataConfig, EngineConfig, ModelConfig, OptimizerConfig
from recipes.model.transformer import Transformer, rotary_cos_sin
from recipes.planning.explain import banner, explanation
from recipes.planning.memory import num_parameters
from recipes.planning.plan import Plan
from recipes.planning.throughput import Work, forward_flops_per_token, peak_tflops, training_flops_per_token
from ring_attention import LocalAttention
from ring_attention.kernels import KERNELS
from tests.errors import is_named, names

SHAPES = [
    ModelConfig(),
    ModelConfig(mlp="gelu", norm="layernorm", bias=True),
    ModelConfig(tied_head=True, num_kv_heads=1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=["tiny", "gelu_layernorm_bias", "tied_mqa"])
def test_the_models_parameters_are_counted(shape: ModelConfig):
    model = Transformer(shape, LocalAttention("auto"))
    assert num_parameters(shape) == sum(parameter.numel() for parameter in model.parameters())


def test_the_papers_first_workload_costs_7_1_gflop_per_token():
    shape = ModelConfig(
        num_layers=4, hidden_size=8192, num_heads=16, num_kv_heads=16, head_dim=512, mlp_size=32768, mlp="gelu"
    )
    assert forward_flops_per_token(shape, 10_000) == pytest.approx(7.1e9, rel=0.01)


def test_flops_match_torchs_count():
    """Torch counts the matrix products; causal attention is added by hand."""
    from torch.utils.flop_counter import FlopCounterMode

    shape, length = ModelConfig(), 16
    model = Transformer(shape, lambda q, k, v, batch_dim_idx, mask: q)  # pyright: ignore[reportArgumentType]
    tokens = torch.zeros(1, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, torch.arange(length).unsqueeze(0))
    attention = sum(4 * shape.num_heads * shape.head_dim * (query + 1) for query in range(length)) * shape.num_layers
    assert forward_flops_per_token(shape, length) * length == counter.get_total_flops() + attention


@pytest.mark.parametrize(
    ("stage", "num_ranks", "accumulation", "multiplier"),
    [(0, 4, 1, 1), (1, 4, 1, 1), (2, 8, 3, 3), (3, 4, 1, 4), (3, 4, 2, 8)],
)
def test_the_loss_multiplier_cancels_deepspeeds_divisions(stage, num_ranks, accumulation, multiplier):
    from recipes.engine.deepspeed_engine import loss_multiplier

    assert loss_multiplier(stage, num_ranks, accumulation) == multiplier


def test_the_learning_rate_warms_up_and_decays_to_its_floor():
    from recipes.engine.optimizer import learning_rate_factor

    def factors(decay: str) -> list[float]:
        factor = learning_rate_factor(OptimizerConfig(warmup_fraction=0.2, min_lr_ratio=0.1, decay=decay), num_steps=10)
        return [round(factor(step), 3) for step in range(10)]

    assert factors("linear") == [0.333, 0.667, 1.0, 0.871, 0.743, 0.614, 0.486, 0.357, 0.229, 0.1]
    assert factors("constant") == [0.333, 0.667, *[1.0] * 8]
    cosine = factors("cosine")
    assert (cosine[2], cosine[-1]) == (1.0, 0.1)
    assert cosine[2:] == sorted(cosine[2:], reverse=True)


def test_only_fp16_has_a_loss_scale():
    from recipes.engine.base import Engine

    def loss_scaling(dtype: str) -> dict[str, float | None]:
        deepspeed = mock.Mock(skipped_steps=3, optimizer=mock.Mock(cur_scale=torch.tensor(1024.0)))
        engine = mock.Mock(spec=Engine, config=Config(engine=EngineConfig(dtype=dtype)), deepspeed=deepspeed)
        return Engine.loss_scaling.__get__(engine)

    assert loss_scaling("bf16") == {}
    assert loss_scaling("fp16") == {"loss_scale": 1024.0, "skipped_steps": 3}


def test_norms_biases_and_embeddings_have_no_weight_decay():
    from recipes.engine.optimizer import optimizer_arguments

    model = Transformer(ModelConfig(norm="layernorm", bias=True), LocalAttention("auto"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = optimizer_arguments(model, Config())["optimizer"]
    decayed, not_decayed = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert decayed == {
        n for n in names.values() if n.endswith("weight") and "norm" not in n and n != "embedding.weight"
    }
    assert not_decayed == set(names.values()) - decayed


def test_throughput_divides_by_all_ranks():
    config = Config(data=DataConfig(sequence_length=2000), engine=EngineConfig(micro_batch_size=2))
    plan = Plan(config, 4, "cuda", "NVIDIA H200", (9, 0), ranks_per_host=4)
    throughput = plan.throughput([0.5])
    assert throughput.tokens_per_s == 8000
    assert throughput.tokens_per_s_per_rank == 2000
    assert throughput.tpot_ms == 0.25
    # a token costs 6 x (2 layers x 196,608 weights + 32,896 of the head), and 3 x 1,024,512 in attention
    assert throughput.model_tflops_per_rank == pytest.approx(2000 * 5_630_208 / 1e12)
    assert throughput.mfu_pct == pytest.approx(100 * 0.011260416 / 989.4)


def test_throughput_counts_documents_without_padding_and_is_the_median_over_steps():
    config = Config(data=DataConfig(sequence_length=2000))
    plan = Plan(config, 1, "cuda", "NVIDIA H200", (9, 0), ranks_per_host=1)
    work = plan.work([500, 500, 900])
    per_token = [training_flops_per_token(config.model, length) for length in (500, 900)]
    assert work == Work(1900, 1000 * per_token[0] + 900 * per_token[1])
    steps = plan.throughput([1.0, 2.0, 0.5], [work, work, Work(10, 1e9)])
    assert steps.tokens_per_s == 950
    assert steps.model_tflops_per_rank == pytest.approx(sorted([work.flops, work.flops / 2, 2e9])[1] / 1e12)


def test_mfu_is_unknown_for_unknown_hardware():
    assert peak_tflops("NVIDIA H200", "bf16") == 989.4
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == 989.4
    assert peak_tflops("NVIDIA H200 NVL", "bf16") == peak_tflops("NVIDIA H100 NVL", "bf16") == 835.5
    assert peak_tflops("NVIDIA H100 PCIe", "bf16") == 756
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp16") == 312
    assert peak_tflops("NVIDIA H200 MIG 1g.18gb", "bf16") is None  # a seventh of a GPU
    assert peak_tflops("NVIDIA H200", "fp32") is None
    assert peak_tflops("CPU", "bf16") is None
    assert Plan(Config(), 1, "cpu", "CPU", None, ranks_per_host=1).throughput([1.0]).mfu_pct is None


def test_rotary_angles_are_exact_at_position_one_million():
    cos, _ = rotary_cos_sin(torch.tensor([[1_000_003]]), head_dim=2, theta=10000.0)
    assert cos.item() == pytest.approx(torch.tensor(1_000_003.0, dtype=torch.float64).cos().item(), abs=1e-7)


def test_the_explanation_shows_the_plan(tmp_path):
    plan = Plan(Config(), num_ranks=4, device_type="cpu", device_name="CPU", capability=None, ranks_per_host=4)
    text = "\n".join(explanation(plan, tmp_path))
    names(text, "1 data x 4 ring", "CPU", "512", "2,048", "0.46 M", "cpu_flash")
    [imbalance] = [line for line in text.splitlines() if "imbalance" in line]
    names(imbalance, "1.000")
    copies = Config(attention=AttentionConfig(transport="copy_engine"))
    for num_ranks, over in ((8, ["symmetric memory"]), (16, ["symmetric memory", "NCCL"])):
        text = "\n".join(banner(Plan(copies, num_ranks, "cuda", "NVIDIA H200", (9, 0), ranks_per_host=8), tmp_path))
        [attention] = [line for line in text.splitlines() if "copy_engine" in line]
        names(attention, "zigzag", *over)
        assert is_named(attention, "NCCL") == ("NCCL" in over)
    alone = Plan(Config(), num_ranks=1, device_type="cpu", device_name="CPU", capability=None, ranks_per_host=4)
    assert "whole sequences" not in text
    [ranks] = [line for line in banner(alone, tmp_path) if line.split()[0] == "ranks"]
    names(ranks, "1 data x 1 ring", "whole sequences")


@pytest.mark.parametrize("document_mask", [True, False])
def test_the_explanation_says_that_it_counts_one_document_a_sequence(tmp_path, document_mask):
    plan = Plan(Config(data=DataConfig(document_mask=document_mask)), 4, "cpu", "CPU", None, ranks_per_host=4)
    [layout] = [line for line in explanation(plan, tmp_path) if line.startswith("layout")]
    assert is_named(layout, "one document a sequence") == document_mask


@pytest.mark.parametrize("method", ["ring", "all_gather"])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("num_ranks", [4, 32])
def test_an_explanation_is_short_on_any_number_of_ranks(tmp_path, method, layout, num_ranks):
    config = Config(attention=AttentionConfig(method, layout=layout), data=DataConfig(sequence_length=2**14))
    lines = explanation(Plan(config, num_ranks, "cuda", "NVIDIA H200", (9, 0), 8, 2**37), tmp_path)
    assert len(lines) <= 60
    assert len("\n".join(lines)) < 6000
    if layout == "zigzag":  # equal work
        [work] = [line for line in lines if line.startswith("  ring rank")]
        assert work.startswith(f"  ring ranks 0-{num_ranks - 1}: ")
    else:
        assert any(line.startswith("  ring rank 0: ") for line in lines)
        assert any(line.startswith(f"  ring rank {num_ranks - 1}: ") for line in lines)
    assert any("MiB backward" in line for line in lines) == (method == "ring")


@pytest.mark.parametrize(
    ("kernel", "num_kv_heads", "sent"),
    [  # the first rank sends K,V of 8,192 tokens with 2 x 64 numbers a head, the second returns their gradients
        ("cudnn", 2, "4.00 to 4.00"),
        ("flash_attn_4", 2, "4.00 to 8.00"),  # gradients travel as the kernel's fp32 sums
        ("flash_attn_4", 4, "8.00 to 8.00"),  # without grouped heads the kernel has none
    ],
)
def test_an_explanation_counts_gradients_as_they_travel(tmp_path, monkeypatch, kernel, num_kv_heads, sent):
    monkeypatch.setattr(KERNELS["flash_attn_4"], "refusal", lambda spec: None)
    config = Config(
        model=ModelConfig(num_heads=4, num_kv_heads=num_kv_heads, head_dim=64),
        attention=AttentionConfig("ring", layout="contiguous", kernel=kernel),
        data=DataConfig(sequence_length=2**14),
    )
    lines = explanation(Plan(config, 2, "cuda", "NVIDIA H200", (9, 0), 2, 2**37), tmp_path)
    [line] = [line for line in lines if "MiB backward" in line]
    assert line.endswith(f", {sent} MiB backward")
