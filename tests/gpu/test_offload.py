"""Activations that lie on the host meanwhile, from a GPU: gradients bit for bit, and a lower peak."""

from __future__ import annotations

import pytest
import torch

from conf.schema import ModelConfig
from recipes.transformer import Transformer
from ring_attention import LocalAttention

pytestmark = pytest.mark.gpu
NUM_LAYERS, HIDDEN, LENGTH = 8, 1024, 16384
KEPT_BYTES = {"full": 2 * HIDDEN * LENGTH, "selective": (4 * HIDDEN + 4 * 8) * LENGTH}  # per layer


def train(recompute: str, offload: bool) -> tuple[list[torch.Tensor], int, list[int]]:
    """Gradients after three steps, each with micro-batches of two lengths; peak, and what is left after each step."""
    config = ModelConfig(
        num_layers=NUM_LAYERS, hidden_size=HIDDEN, num_heads=8, num_kv_heads=8, head_dim=128, mlp_size=2048
    )
    with torch.device("cuda"):
        model = Transformer(config, LocalAttention("auto"), recompute=recompute, offload=offload).bfloat16()
    generator = torch.Generator().manual_seed(1)
    torch.cuda.reset_peak_memory_stats()
    left = []
    for _ in range(3):
        model.zero_grad()
        for length in (LENGTH, LENGTH // 2):
            tokens = torch.randint(257, (1, length), generator=generator).cuda()
            loss = model(tokens, torch.arange(length, device="cuda").unsqueeze(0), tokens)
            loss.backward()
            del loss
        left.append(torch.cuda.memory_allocated())
    gradients = [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None]
    return gradients, torch.cuda.max_memory_allocated(), left


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_gradients_are_bit_equal_and_the_peak_is_lower(recompute: str):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        train(recompute, offload=False)  # compiles kernels, and makes what libraries keep
        kept, kept_peak, _ = train(recompute, offload=False)
        offloaded, peak, left = train(recompute, offload=True)
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, expected in zip(offloaded, kept, strict=True):
        assert torch.equal(ours, expected)
    assert len(set(left)) == 1
    assert kept_peak - peak > 0.8 * (NUM_LAYERS - 2) * KEPT_BYTES[recompute]
