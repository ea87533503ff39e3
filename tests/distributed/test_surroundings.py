"""The attention modules in use: checkpointing, compilers, no_grad, several groups, Ulysses scripts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conf.schema import ModelConfig
from recipes.model.transformer import Layer, rotary_cos_sin
from ring_attention import (
    CAUSAL,
    FULL,
    AllGatherAttention,
    HybridAttention,
    LocalAttention,
    Mask,
    RingAttention,
    UlyssesAttention,
)
from ring_attention.checkpointing import selective_checkpointing
from ring_attention.sequence_attention import SequenceAttention
from ring_attention.transport.collectives import all_gather, new_subgroup
from tests.cases import Case, check, draw
from tests.errors import refused
from tests.pool import WorkerPool, parallel_groups
from tests.tools.measure import relative_error

LENGTH, NUM_RANKS = 64, 2
MODEL = ModelConfig(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=96)


def world() -> Any:
    import deepspeed.comm as dist

    return dist.get_world_group()


def layer_and_input(kind: Any) -> tuple[Layer, SequenceAttention, tuple]:
    attention = kind("auto", world())
    torch.manual_seed(0)
    layer = Layer(MODEL, attention)
    positions = attention.layout(LENGTH).positions(attention.sequence_rank).unsqueeze(0)
    x = attention.layout(LENGTH).shard(torch.randn(2, LENGTH, 64), attention.sequence_rank, dim=1)
    return layer, attention, (x, *rotary_cos_sin(positions, 16, 10000.0))


def gradients(layer: nn.Module, call: Any, arguments: tuple) -> list[Tensor]:
    layer.zero_grad()
    x = arguments[0].clone().requires_grad_()
    out = call(x, *arguments[1:])
    out.square().sum().backward()
    leaves = [x, *layer.parameters()]
    return [out.detach(), *(leaf.grad.clone() for leaf in leaves if leaf.grad is not None)]


def checkpointed(kind: type[SequenceAttention], use_reentrant: bool) -> bool:
    layer, _, arguments = layer_and_input(kind)
    plain = gradients(layer, layer, arguments)
    again = gradients(layer, lambda *args: checkpoint(layer, *args, use_reentrant=use_reentrant), arguments)
    return all(torch.equal(*pair) for pair in zip(plain, again, strict=True))


@pytest.mark.parametrize("kind", [RingAttention, UlyssesAttention, AllGatherAttention])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_no_bit(pool: WorkerPool, kind, use_reentrant: bool):
    assert pool.run(checkpointed, kind, use_reentrant, num_ranks=NUM_RANKS) == [True] * NUM_RANKS


def compiled(kind: type[SequenceAttention]) -> tuple[float, int, int]:
    """Worst difference to the plain layer, graphs after the first pass, graphs after passes with other masks."""
    from torch._dynamo.utils import counters

    layer, attention, arguments = layer_and_input(kind)
    plain = gradients(layer, layer, arguments)
    torch._dynamo.reset()
    counters.clear()
    compiled_layer = torch.compile(layer, backend="aot_eager")
    again = gradients(layer, compiled_layer, arguments)
    graphs = counters["stats"]["unique_graphs"]
    for mask in (FULL, Mask(left=3), CAUSAL.packed([0, 20, LENGTH])):
        attention._mask = mask
        gradients(layer, compiled_layer, arguments)
    worst = max(relative_error(*pair) for pair in zip(again, plain, strict=True))
    return worst, graphs, counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [RingAttention, UlyssesAttention])
def test_a_compiled_layer_breaks_around_the_attention_and_never_recompiles(pool: WorkerPool, kind):
    for worst, graphs, graphs_later in pool.run(compiled, kind, num_ranks=NUM_RANKS):
        assert worst < 1e-6
        assert graphs > 0
        assert graphs_later == graphs


def without_gradients(kind: type[SequenceAttention]) -> tuple[float, bool]:
    layer, _, arguments = layer_and_input(kind)
    plain = gradients(layer, layer, arguments)[0]
    with torch.no_grad():
        out = layer(*arguments)
    return relative_error(out, plain), out.requires_grad


@pytest.mark.parametrize("kind", [RingAttention, UlyssesAttention, AllGatherAttention])
def test_no_grad(pool: WorkerPool, kind):
    assert pool.run(without_gradients, kind, num_ranks=NUM_RANKS) == [(0.0, False)] * NUM_RANKS


def several_at_once() -> list[list[Tensor]]:
    """On 4 ranks: rings of 4 and of 2, a hybrid, and Ulysses of 2, with interleaved forward and backward passes."""
    pairs = parallel_groups(data_degree=2, sequence_degree=2).get_sequence_parallel_group()
    modules = [
        RingAttention("auto", world(), layout="zigzag"),
        RingAttention("reference", pairs),
        HybridAttention("auto", world(), ulysses_degree=2, layout="zigzag"),
        UlyssesAttention("auto", pairs),
    ]
    leaves, outs, douts = [], [], []
    for case, module in zip(SEVERAL, modules, strict=True):
        local = [module.layout(case.length).shard(x, module.sequence_rank, dim=1) for x in draw(case)]
        leaves.append([x.requires_grad_() for x in local[:3]])
        douts.append(local[3])
        outs.append(module(*leaves[-1], 0))
    for out, dout in zip(outs, douts, strict=True):
        out.backward(dout)
    return [[out.detach(), *(x.grad for x in mine)] for out, mine in zip(outs, leaves, strict=True)]


SEVERAL = [
    Case("ring", 4, 1, "zigzag", length=40),
    Case("ring", 2, 1, "contiguous", length=22, num_heads=6, num_kv_heads=3),
    Case("hybrid", 4, 2, "zigzag", length=48),
    Case("ulysses", 2, 2, "contiguous", length=26),
]


def test_several_models_and_groups_in_one_process(pool: WorkerPool):
    ranks = pool.run(several_at_once, num_ranks=4)
    for index, case in enumerate(SEVERAL):
        shards = [rank[index] for rank in ranks]
        check(case, shards[: case.num_ranks])
        check(case, shards[-case.num_ranks :])


SCRIPT = Path(__file__).with_name("ulysses_script.py").read_text()
OURS = ("RingAttention", "UlyssesAttention", "AllGatherAttention")


def train_by_script(class_name: str) -> list[Tensor]:
    text = SCRIPT
    if class_name in OURS:
        text = SCRIPT.replace("from deepspeed.sequence.layer import", "from ring_attention import")
        text = text.replace("DistributedAttention(CoreAttention()", 'DistributedAttention("auto"')
        text = text.replace("DistributedAttention", class_name)
    namespace: dict[str, Any] = {"__name__": "script"}
    exec(compile(text, "ulysses_script.py", "exec"), namespace)
    return namespace["train"]()


@pytest.mark.parametrize("class_name", OURS)
def test_a_ulysses_script_needs_only_another_import_class_name_and_argument(pool: WorkerPool, class_name: str):
    theirs = pool.run(train_by_script, "DistributedAttention", num_ranks=NUM_RANKS)
    ours = pool.run(train_by_script, class_name, num_ranks=NUM_RANKS)
    for their_tensors, our_tensors in zip(theirs, ours, strict=True):
        for their_tensor, our_tensor in zip(their_tensors, our_tensors, strict=True):
            assert relative_error(our_tensor, their_tensor) < 5e-6


class CoreAttention(nn.Module):
    """A local attention for DistributedAttention, which needs whole sequences."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query


@pytest.mark.parametrize(
    ("local", "name"),
    [
        (CoreAttention(), "CoreAttention"),
        (CoreAttention().forward, "forward"),
        (F.scaled_dot_product_attention, "scaled_dot_product_attention"),
    ],
    ids=["module", "method", "function"],
)
def test_a_local_attention_of_whole_sequences_is_refused_and_the_mask_asked_for(local: Any, name: str):
    """Even causal attention: what else it does, as a softcap or a sink, no test of its outputs would show."""
    with refused(ValueError, "local_attention", name, '"auto"', "mask=CAUSAL", "softmax_scale="):
        LocalAttention(local)


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (LocalAttention, {"transport": "p2p"}, ["transport"]),
        (UlyssesAttention, {"hosts": ["a", "b"], "ulysses_degree": 2}, ["hosts", "ulysses_degree"]),
        (HybridAttention, {}, ["ulysses_degree"]),  # that it needs
    ],
)
def test_options_that_a_module_does_not_take_are_refused(kind: Any, options: dict[str, Any], named: list[str]):
    with refused(ValueError, kind.__name__, *named):
        kind("auto", None, **options)


def test_autocast_does_not_lower_the_precision():
    q = torch.randn(1, 32, 2, 16)
    plain = LocalAttention("reference")(q, q, q, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LocalAttention("reference")(q, q, q, 0), plain)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "sinks"])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("tokens", [8, 4])
def test_a_second_derivative_is_refused(wanted: str, power: int, tokens: int):
    """Also of a sum, whose gradient is a constant, and for tensors of which the gradient is none."""
    names = ("q", "k", "v")
    leaves = {name: torch.randn(1, tokens, 2, 8, requires_grad=True) for name in names}
    sinks = torch.randn(2, requires_grad=True)
    loss = LocalAttention("reference")(*leaves.values(), 0, sinks=sinks).pow(power).sum()
    leaves["sinks"] = sinks
    for once in ("q", "sinks"):
        (gradient,) = torch.autograd.grad(loss, leaves[once], create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivative"):
            torch.autograd.grad(gradient.square().sum(), leaves[wanted], retain_graph=True)
        with pytest.raises(NotImplementedError, match="second derivative"):
            (loss + gradient.square().sum()).backward(retain_graph=True)


def test_a_graph_of_gradients_can_be_made_within_a_checkpoint():
    """Nobody differentiates it for attention, but something else in the model may need it."""
    attention = LocalAttention("reference")
    x, y = (torch.randn(1, 8, 2, 8, requires_grad=True) for _ in range(2))
    out = checkpoint(lambda x: attention(x, x, x, 0), x, use_reentrant=False)
    assert isinstance(out, Tensor)
    gradient_x, gradient_y = torch.autograd.grad(out.square().sum() + y.pow(3).sum(), (x, y), create_graph=True)
    (plain,) = torch.autograd.grad(attention(x, x, x, 0).square().sum(), x)
    assert torch.equal(gradient_x, plain)
    assert torch.equal(torch.autograd.grad(gradient_y.sum(), y)[0], 6 * y)


def recomputed_twice(kind: Any) -> list[bool]:
    """Whether gradients are the same bits as without checkpointing: of two passes, and of one leaf after the other."""
    attention = kind("auto", world())
    x, y = (torch.randn(1, 8, 2, 8, requires_grad=True) for _ in range(2))
    sinks = torch.randn(2, requires_grad=True)

    def layer(x: Tensor, y: Tensor, sinks: Tensor) -> Tensor:
        return attention(attention(x, x, y, 0, sinks=sinks), y, y, 0, sinks=-sinks).square().sum()

    leaves = (x, y, sinks)
    plain = torch.autograd.grad(layer(*leaves), leaves)
    loss: Any = checkpoint(layer, *leaves, use_reentrant=False, context_fn=selective_checkpointing)
    passes = [torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2)]
    passes.append((*torch.autograd.grad(loss, x, retain_graph=True), *torch.autograd.grad(loss, (y, sinks))))
    return [all(torch.equal(*pair) for pair in zip(got, plain, strict=True)) for got in passes]


@pytest.mark.parametrize("kind", [RingAttention, AllGatherAttention])
def test_selective_checkpointing_recomputes_as_often_as_asked(pool: WorkerPool, kind: Any):
    assert pool.run(recomputed_twice, kind, num_ranks=NUM_RANKS) == [[True] * 3] * NUM_RANKS


def deep_copied(kind: Any) -> tuple[bool, bool]:
    """Whether a copy computes the same bits, in a module of its own; and whether it shares the groups."""
    options: dict[str, Any] = {"ulysses_degree": 2} if kind is HybridAttention else {}
    model = nn.Sequential(nn.Linear(8, 8), kind("auto", world(), **options))
    attention: Any = model[1]
    copied_attention: Any = copy.deepcopy(model)[1]
    q = torch.randn(2, 8, 4, 8)
    same = torch.equal(attention(q, q, q, 0), copied_attention(q, q, q, 0))
    inner = getattr(copied_attention, "_distributed", None)
    shares = copied_attention._group is attention._group
    if inner is not None:
        shares = shares and inner.spg is attention._distributed.spg and inner.local_attn.__self__ is copied_attention
    return same and copied_attention is not attention, shares


@pytest.mark.parametrize("kind", [RingAttention, AllGatherAttention, UlyssesAttention, HybridAttention, LocalAttention])
def test_a_deep_copy_shares_the_groups(pool: WorkerPool, kind: Any):
    assert pool.run(deep_copied, kind, num_ranks=NUM_RANKS) == [(True, True)] * NUM_RANKS


def group_after_one_of_some_ranks_only() -> list[float]:
    """The ranks of a subgroup, after rank 0 alone has built a group."""
    import torch.distributed as torch_dist

    logging_group: Any = torch_dist.new_group([0])  # on all ranks, as torch wants it
    own = torch_dist.get_rank()
    group = new_subgroup(world(), [0, 3] if own in (0, 3) else [1, 2])
    ranks = all_gather(torch.tensor([float(own)]), group).flatten().tolist()
    torch_dist.destroy_process_group(group)
    if own == 0:
        torch_dist.destroy_process_group(logging_group)
    return ranks


def test_groups_are_built_whatever_groups_some_ranks_are_in(pool: WorkerPool):
    for _ in range(2):  # and again, which has another name
        assert pool.run(group_after_one_of_some_ranks_only, num_ranks=4) == [[0, 3], [1, 2], [1, 2], [0, 3]]


def test_a_window_of_the_whole_sequence_is_dropped():
    assert Mask(left=99, right=200).within(100) == FULL
    assert Mask(left=98).within(100) == Mask(left=98)
    assert Mask(left=5).within(1) == CAUSAL


def test_the_backward_pass_of_a_window_holds_few_gradients_at_once():
    """The CPU kernel splits a window into many calls. Their gradients must not be held all at once."""
    import resource

    q = torch.randn(1, 8192, 2, 64, requires_grad=True)  # 4 MiB
    out = LocalAttention("auto", mask=Mask(left=4096))(q, q, q, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out.sum().backward()
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 150  # 650 when all were held
