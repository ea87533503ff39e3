"""Attention alone: every rank's output and gradients against an fp64 oracle of the whole sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ring_attention import CAUSAL, FULL, HybridAttention, LocalAttention, Mask, RingAttention, UlyssesAttention
from ring_attention.kernels import KERNELS
from ring_attention.layout import num_tokens
from ring_attention.schedule import ring_schedule, tokens_sent
from ring_attention.transport import P2PTransport
from tests.cases import METHODS, Case, attend, build, check, draw, many_on_rank, on_rank
from tests.pool import WorkerPool, parallel_groups

LENGTH = 29  # a multiple of nothing
MASKS = {
    "causal": CAUSAL,
    "full": FULL.packed([0, LENGTH]),
    "window": Mask(left=5),
    "both ways": Mask(left=3, right=4).packed([0, LENGTH]),
    "packed": CAUSAL.packed([0, 4, 4, 5, 18, LENGTH]),
    "packed rows": Mask(left=6).packed([[0, 11, LENGTH], [0, 2, 27, LENGTH]]),
}


def grid(case: Case) -> Case | None:
    """The case with a Ulysses degree for its method; None if the method cannot run on so many ranks."""
    if case.method == "local":
        return case if case.num_ranks == 1 else None
    if case.method == "ulysses":
        return replace(case, ulysses_degree=case.num_ranks)
    if case.method == "hybrid":
        return replace(case, ulysses_degree=2) if case.num_ranks % 2 == 0 else None
    return case


def batches(mask: Mask) -> tuple[int, ...]:
    """Batch sizes: the backward pass holds back half of the queries of one row, or half of several rows."""
    rows = len(mask.documents or ())
    return (rows,) if rows > 1 else (1, 3)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_method_equals_whole_attention(pool: WorkerPool, num_ranks: int, method: str, dtype: torch.dtype):
    """With every mask and layout, of one row and of several."""
    cases = [
        case
        for layout in ("zigzag", "contiguous")
        for mask in MASKS.values()
        for batch in batches(mask)
        if (case := grid(Case(method, num_ranks, 1, layout, mask, LENGTH, batch, num_kv_heads=4, dtype=dtype)))
    ]
    if not cases:
        pytest.skip(f"{method} is not for {num_ranks} ranks")
    ranks = pool.run(many_on_rank, cases, num_ranks=num_ranks)
    for case, shards in zip(cases, zip(*ranks, strict=True), strict=True):
        check(case, list(shards))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 3])
def test_one_token_per_rank(pool: WorkerPool, method: str, batch: int):
    num_ranks = 1 if method == "local" else 2
    for layout in ("zigzag", "contiguous"):
        case = grid(Case(method, num_ranks, 1, layout, length=num_ranks, batch=batch))
        if case is not None:
            check(case, pool.run(on_rank, case, num_ranks=num_ranks))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("head_dim", [8, 96, 512])
def test_heads_and_their_sizes(pool: WorkerPool, method: str, num_heads: int, num_kv_heads: int, head_dim: int):
    case = grid(Case(method, 1 if method == "local" else 2, num_heads=num_heads, num_kv_heads=num_kv_heads))
    assert case is not None
    if num_kv_heads % case.ulysses_degree:
        pytest.skip("test_refusals has it")
    case = replace(case, head_dim=head_dim)
    check(case, pool.run(on_rank, case, num_ranks=case.num_ranks))


@pytest.mark.parametrize("method", METHODS)
def test_values_with_a_head_size_of_their_own(pool: WorkerPool, method: str):
    case = grid(Case(method, 1 if method == "local" else 2, value_head_dim=24, mask=MASKS["packed"], length=LENGTH))
    assert case is not None
    check(case, pool.run(on_rank, case, num_ranks=case.num_ranks))


@pytest.mark.parametrize("method", METHODS)
def test_sequence_first_and_non_contiguous_tensors(pool: WorkerPool, method: str):
    for batch_dim_idx in (0, 1):
        case = grid(Case(method, 1 if method == "local" else 2, batch_dim_idx=batch_dim_idx, contiguous=False))
        assert case is not None
        check(case, pool.run(on_rank, case, num_ranks=case.num_ranks))


def shards_before_and_after(case: Case, document: slice) -> tuple[list[Tensor], list[Tensor]]:
    """On each rank: results before and after q, k, v and dout of one document are replaced."""
    import deepspeed.comm as dist

    attention, whole = build(case, dist.get_world_group()), draw(case)
    changed = [tensor.clone() for tensor in whole]
    for tensor in changed:
        tensor[:, document] = torch.randn_like(tensor[:, document]) * 100
    return attend(case, attention, whole), attend(case, attention, changed)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("base", [CAUSAL, FULL, Mask(left=7)], ids=["causal", "full", "window"])
def test_no_token_sees_another_document(pool: WorkerPool, method: str, layout: str, base: Mask):
    """Replacing one document does not change a bit of out, dq, dk and dv of the others."""
    boundaries = [0, 13, 14, 40, 64]
    num_ranks = 1 if method == "local" else 4
    case = grid(Case(method, num_ranks, 1, layout, base.packed(boundaries), length=64, num_kv_heads=4))
    assert case is not None
    changed_document = slice(14, 40)
    ranks = pool.run(shards_before_and_after, case, changed_document, num_ranks=num_ranks)
    others = torch.ones(64, dtype=torch.bool)
    others[changed_document] = False
    for parts in range(4):
        before, after = (case.global_layout.unshard([rank[index][parts] for rank in ranks], dim=1) for index in (0, 1))
        assert torch.equal(before[:, others], after[:, others])
        assert not torch.equal(before[:, ~others], after[:, ~others])


def elements_sent(case: Case) -> tuple[int, int]:
    """On each rank: how many elements its transport sent in a forward and in a backward pass."""
    import deepspeed.comm as dist

    sent = {"forward": 0, "backward": 0}
    original = P2PTransport.post

    def counting(self, purpose, sends, receives):
        sent[purpose.split()[0]] += sum(message.tensor.numel() for message in sends)
        return original(self, purpose, sends, receives)

    attention = build(case, dist.get_world_group())
    P2PTransport.post = counting
    try:
        attend(case, attention, draw(case))
    finally:
        P2PTransport.post = original
    return sent["forward"], sent["backward"]


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_the_transport_sends_what_the_schedule_says(pool: WorkerPool, layout: str, mask: Mask):
    case = Case("ring", 4, 1, layout, mask, LENGTH)
    per_token = 2 * case.batch * case.num_kv_heads * case.head_dim
    for ring_rank, sent in enumerate(pool.run(elements_sent, case, num_ranks=4)):
        keys, gradients = tokens_sent(case.global_layout, mask, ring_rank)
        assert sent == (keys * per_token, (keys + gradients) * per_token)
        steps = ring_schedule(case.global_layout, mask, ring_rank)
        assert gradients == sum(num_tokens(step.gradients) for step in steps)


def uneven_heads(case: Case, initialised: bool) -> str | list[Tensor]:
    """Three key-value heads on two ranks: DeepSpeed gives them 2 and 1."""
    from deepspeed.utils import groups as deepspeed_groups

    groups = parallel_groups(data_degree=1, sequence_degree=2)
    attention = UlyssesAttention("auto", groups.get_sequence_parallel_group())
    mpu, deepspeed_groups.mpu = deepspeed_groups.mpu, groups if initialised else None
    try:
        return attend(case, attention, draw(case))
    except ValueError as error:
        return str(error)
    finally:
        deepspeed_groups.mpu = mpu


UNEVEN = Case("ulysses", 2, 2, num_heads=6, num_kv_heads=3)


@pytest.mark.parametrize("batch_dim_idx", [0, 1])
def test_ulysses_takes_uneven_heads_once_deepspeed_knows_its_mpu(pool: WorkerPool, batch_dim_idx: int):
    case = replace(UNEVEN, batch_dim_idx=batch_dim_idx)
    check(case, pool.run(uneven_heads, case, True, num_ranks=2))
    assert (
        pool.run(uneven_heads, case, False, num_ranks=2)
        == [
            "num_kv_heads=3 is not a multiple of ulysses_degree=2: use HybridAttention with a ulysses_degree of "
            "[1, 3], or RingAttention, or call deepspeed.initialize(mpu=...) with this group before"
        ]
        * 2
    )


def refusals() -> list[str]:
    import deepspeed.comm as dist

    world: Any
    tensor: Any
    number: Any = 7
    word: Any = "causal"
    world, tensor = dist.get_world_group(), torch.zeros(1, 3, 2, 8)
    ring: Any = RingAttention("auto", world)
    attempts = [
        lambda: RingAttention("auto", world, transport="carrier_pigeon"),
        lambda: RingAttention("auto", world, layout="striped"),
        lambda: HybridAttention("auto", world, ulysses_degree=3),
        lambda: RingAttention("auto", world, layout="zigzag")(tensor, tensor, tensor, 0),
        lambda: ring(tensor, tensor, tensor, 2),
        lambda: LocalAttention("auto")(tensor, tensor, tensor, 2),
        lambda: ring(tensor, tensor, tensor, 0, dropout_p=0.1),
        lambda: ring(tensor, tensor, tensor, 0, torch.zeros(3)),
        lambda: ring(tensor, tensor, tensor, 0, None, None, attention_mask=torch.zeros(3)),
        lambda: ring(tensor, tensor, tensor, 0, mask=torch.ones(6, 6)),
        lambda: RingAttention("auto", world, mask=word),
        lambda: RingAttention("auto", world, 1, 2),
        lambda: RingAttention(number, world),
        lambda: RingAttention("auto", None),
        lambda: ring(tensor, tensor, tensor, 0, softmax_scale=0.0),
        lambda: ring(tensor[0], tensor, tensor, 0),
        lambda: ring(tensor, tensor.half(), tensor, 0),
        lambda: ring(tensor, tensor[:, :2], tensor, 0),
        lambda: ring(tensor[:, :, :1], tensor, tensor, 0),
        lambda: ring(tensor, tensor[..., :4], tensor, 0),
        lambda: ring(tensor, tensor, tensor, 0, mask=CAUSAL.packed([0, 7])),
        lambda: ring(tensor, tensor, tensor, 0, mask=CAUSAL.packed([[0, 1], [0, 2]])),
        lambda: ring(tensor, tensor[:, :, :0], tensor[:, :, :0], 0),
        lambda: RingAttention("cpu_flash", world)(tensor, tensor, tensor[..., :4], 0),
        lambda: RingAttention(KERNELS["cudnn"], world)(tensor, tensor, tensor, 0),
        lambda: LocalAttention("auto", world, 2, 0)(tensor, tensor, tensor, 0, mask=CAUSAL.packed([0, 4])),
        lambda: UlyssesAttention("auto", world)(tensor, tensor[:, :, :1], tensor[:, :, :1], 0),
    ]
    messages = []
    for attempt in attempts:
        try:
            attempt()
        except ValueError as error:
            messages.append(str(error))
        else:
            messages.append("accepted")
    return messages


def test_mistakes_are_refused_by_name(pool: WorkerPool):
    assert pool.run(refusals, num_ranks=2)[0] == [
        "transport='carrier_pigeon' is unknown: use one of auto, p2p, copy_engine",
        "layout='striped' is unknown: use one of zigzag, contiguous",
        "ulysses_degree=3 does not divide the 2 ranks: use one of [1, 2]",
        "3 tokens are not 2 equal chunks, which layout=zigzag needs on each rank of the ring: cut sequences with the "
        "module's layout(length).shard",
        "batch_dim_idx=2 must be 0 ([B, S, H, D]) or 1 ([S, B, H, D])",
        "batch_dim_idx=2 must be 0 ([B, S, H, D]) or 1 ([S, B, H, D])",
        "dropout_p=0.1 must be 0: use dropout after the output projection instead",
        "rotary_pos_emb is Tensor, which nothing here applies: give what a query sees as mask=Mask(...), and rotate "
        "query and key before, by the global positions of Layout.positions",
        "attention_mask is Tensor, which nothing here applies: give what a query sees as mask=Mask(...), and rotate "
        "query and key before, by the global positions of Layout.positions",
        "mask is Tensor, but must be a ring_attention.Mask, such as Mask(left=4095) or CAUSAL.packed(cu_seqlens): "
        "masks given as a tensor are not supported",
        "mask is str, but must be a ring_attention.Mask, such as Mask(left=4095) or CAUSAL.packed(cu_seqlens): "
        "masks given as a tensor are not supported",
        "scatter_idx=1, gather_idx=2 must be 2 and 0 or 1: heads are dim 2, and tokens dim 0 or 1, as in [B, S, H, D] "
        "and [S, B, H, D]",
        'local_attention is int, but must be "auto", a kernel or its name: give what it computes as mask=CAUSAL (the '
        "default), FULL or Mask(left=...), and another scale as softmax_scale= of the call",
        "no process group: pass one, such as ParallelGroups(...).get_sequence_parallel_group()",
        "softmax_scale=0.0 must be above 0, and finite: kernels mask by -inf * scale",
        "query has shape [3, 2, 8], key [1, 3, 2, 8], value [1, 3, 2, 8]: four dims are needed, [B, S, heads, head "
        "size]",
        "query is torch.float32, key torch.float16, value torch.float32: cast them to one dtype",
        "query has shape [1, 3, 2, 8], key [1, 2, 2, 8], value [1, 3, 2, 8]: the first two dims must be equal",
        "query has shape [1, 3, 1, 8], key [1, 3, 2, 8], value [1, 3, 2, 8]: keys and values need equally many heads, "
        "and queries a multiple of that",
        "query has shape [1, 3, 2, 8], key [1, 3, 2, 4], value [1, 3, 2, 8]: query and key need equal head sizes",
        "the documents end at 7, but the sequence has 6 tokens over all ranks",
        "the mask has documents for 2 rows, the batch has 1: give them once or per row",
        "query has shape [1, 3, 2, 8], key [1, 3, 0, 8], value [1, 3, 0, 8]: no head or size may be 0",
        "kernel=cpu_flash cannot run here: needs values of head size 8, not 4; use kernel=auto",
        "kernel=cudnn cannot run here: needs a cuda device, not cpu; use kernel=auto",
        "the documents end at 4, but the sequence has 3 tokens over all ranks",
        "num_kv_heads=1 is not a multiple of ulysses_degree=2: use HybridAttention with a ulysses_degree of [1], or "
        "RingAttention",
    ]


def order_over_hosts(method: str) -> list[Tensor]:
    """On each of four ranks on two hosts: hybrid and ring follow the hosts, not the rank numbers."""
    import deepspeed.comm as dist

    world, hosts = dist.get_world_group(), ["A", "B", "B", "A"]
    attention: nn.Module
    if method == "ring":
        attention = RingAttention("auto", world, layout="zigzag", hosts=hosts)
        assert attention.sequence_rank == [0, 2, 3, 1][dist.get_rank()]
    else:
        attention = HybridAttention("auto", world, ulysses_degree=2, layout="zigzag", hosts=hosts)
        assert attention.sequence_rank == [0, 2, 3, 1][dist.get_rank()]
    case = HOSTS[method]
    return [torch.tensor(attention.sequence_rank), *attend(case, attention, draw(case))]


HOSTS = {"ring": Case("ring", 4), "hybrid": Case("hybrid", 4, 2)}


@pytest.mark.parametrize("method", HOSTS)
def test_ranks_that_alternate_between_hosts(pool: WorkerPool, method: str):
    ranks = pool.run(order_over_hosts, method, num_ranks=4)
    in_order = sorted(ranks, key=lambda rank: int(rank[0]))
    check(HOSTS[method], [rank[1:] for rank in in_order])
