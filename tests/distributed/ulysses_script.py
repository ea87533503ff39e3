"""A DeepSpeed-Ulysses user's script. The test changes only the import, the class name and its first argument."""

import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from deepspeed.sequence.layer import DistributedAttention


class CoreAttention(torch.nn.Module):
    def forward(self, query, key, value):  # [batch, whole sequence, local heads, head size]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)


class Attention(torch.nn.Module):
    def __init__(self, hidden_size, num_heads, num_kv_heads, group):
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.query = torch.nn.Linear(hidden_size, hidden_size)
        self.key = torch.nn.Linear(hidden_size, num_kv_heads * self.head_dim)
        self.value = torch.nn.Linear(hidden_size, num_kv_heads * self.head_dim)
        self.core = DistributedAttention(CoreAttention(), group, scatter_idx=2, gather_idx=1)

    def forward(self, hidden):  # [batch, this rank's part of the sequence, hidden size]
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.head_dim)) for projection in (self.query, self.key, self.value)
        )
        return self.core(query, key, value, 0).flatten(2)


def train():
    torch.manual_seed(0)
    group = dist.get_world_group()
    model = Attention(hidden_size=64, num_heads=4, num_kv_heads=2, group=group)
    sequence = torch.randn(2, 30, 64)
    part = sequence.chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)]
    out = model(part)
    out.square().sum().backward()
    return [out.detach(), *(parameter.grad for parameter in model.parameters())]
