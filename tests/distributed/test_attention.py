"""Attention alone: every rank's output and gradients against an fp64 oracle of the whole sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from ring_attention import CAUSAL, FULL, HybridAttention, LocalAttention, Mask, RingAttention, UlyssesAttention
from ring_attention.kernels import KERNELS
from ring_attention.layout import LAYOUTS, num_tokens
from ring_attention.schedule import ring_schedule, tokens_sent
from ring_attention.transport import P2PTransport
from tests.cases import METHODS, Case, attend, build, check, draw, many_on_rank, on_rank
from tests.errors import names
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


def batches(method: str, mask: Mask) -> tuple[int, ...]:
    """Batch sizes: a ring's backward pass holds back half of the queries of one row, or half of several rows."""
    rows = len(mask.documents or ())
    return (rows,) if rows > 1 else (1, 3) if method in ("ring", "hybrid") else (3,)


def dtypes_and_ranks(*dtypes: torch.dtype) -> list[Any]:
    """fp64 shows what is computed wrongly, on any number of ranks; bf16 on the most shows what is rounded too often."""
    quick = [*((torch.float64, num_ranks) for num_ranks in (1, 2, 4)), (torch.bfloat16, 4)]
    return [
        pytest.param(dtype, num_ranks, marks=() if (dtype, num_ranks) in quick else pytest.mark.slow)
        for dtype in dtypes
        for num_ranks in (1, 2, 4)
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "num_ranks"),
    dtypes_and_ranks(torch.float64, torch.bfloat16, torch.float32, torch.float16),
    ids=str,
)
def test_every_method_equals_whole_attention(pool: WorkerPool, num_ranks: int, method: str, dtype: torch.dtype):
    """With every mask and layout, in rings of one row and of several."""
    cases = [
        case
        for layout in LAYOUTS
        for mask in MASKS.values()
        for batch in batches(method, mask)
        if layout != "balanced" or len(mask.documents or ((),)) == 1  # one row of documents
        if (case := grid(Case(method, num_ranks, 1, layout, mask, LENGTH, batch, num_kv_heads=4, dtype=dtype)))
    ]
    if not cases:
        pytest.skip(f"{method} is not for {num_ranks} ranks")
    ranks = pool.run(many_on_rank, cases, num_ranks=num_ranks)
    for case, shards in zip(cases, zip(*ranks, strict=True), strict=True):
        check(case, list(shards))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "num_ranks"), dtypes_and_ranks(torch.float64, torch.bfloat16, torch.float32), ids=str
)
def test_sinks_and_softcap(pool: WorkerPool, num_ranks: int, method: str, dtype: torch.dtype):
    """Together in every layout, and alone in one. The ranks' gradients of sinks add up to the whole one."""
    cases = [
        replace(case, sinks=sinks, softcap=softcap)
        for layout in LAYOUTS
        for sinks, softcap in [(True, 1.5), *([(True, None), (False, 1.5)] if layout == "zigzag" else [])]
        for mask in ("causal", "window", "packed")
        if (case := grid(Case(method, num_ranks, 1, layout, MASKS[mask], LENGTH, num_kv_heads=4, dtype=dtype)))
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
    case = replace(case, sinks=True)
    check(case, pool.run(on_rank, case, num_ranks=case.num_ranks))


@pytest.mark.parametrize("method", METHODS)
def test_sequence_first_and_non_contiguous_tensors(pool: WorkerPool, method: str):
    for batch_dim_idx in (0, 1):
        case = grid(Case(method, 1 if method == "local" else 2, batch_dim_idx=batch_dim_idx, contiguous=False))
        assert case is not None
        case = replace(case, sinks=True, softcap=1.5)
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
@pytest.mark.parametrize("layout", LAYOUTS)
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
    case = replace(UNEVEN, batch_dim_idx=batch_dim_idx, sinks=True)
    check(case, pool.run(uneven_heads, case, True, num_ranks=2))
    for message in pool.run(uneven_heads, case, False, num_ranks=2):
        choices = ("HybridAttention", "[1, 3]", "RingAttention", "deepspeed.initialize(mpu=...)")
        names(message, "num_kv_heads=3", "ulysses_degree=2", *choices)


Q, NUMBER, WORD, NOTHING = torch.zeros(1, 3, 2, 8), cast(Any, 7), cast(Any, "causal"), cast(Any, None)
SHAPE, OTHER_MASKS = "[1, 3, 2, 8]", ["ring_attention.Mask", "Mask(left=4095)", "CAUSAL.packed(cu_seqlens)"]
MASK_OR_POSITIONS = ["Tensor", "mask=Mask(...)", "Layout.positions"]
UNEQUAL = CAUSAL.packed([[0, 1], [0, 2]])  # of two rows

# what is called, given the group of two ranks and a ring on it; and what the error names: the value, and the choices
MISTAKES: dict[str, tuple[Callable[[Any, Any], object], list[str]]] = {
    "transport": (
        lambda world, _: RingAttention("auto", world, transport="carrier_pigeon"),
        ["transport='carrier_pigeon'", "auto", "p2p", "copy_engine"],
    ),
    "layout": (
        lambda world, _: RingAttention("auto", world, layout="striped"),
        ["layout='striped'", "zigzag", "contiguous"],
    ),
    "ulysses degree": (
        lambda world, _: HybridAttention("auto", world, ulysses_degree=3),
        ["ulysses_degree=3", "2 ranks", "[1, 2]"],
    ),
    "chunks": (
        lambda world, _: RingAttention("auto", world, layout="zigzag")(Q, Q, Q, 0),
        ["3 tokens", "2 equal chunks", "layout=zigzag", "layout(length).shard"],
    ),
    "batch dim": (lambda _, ring: ring(Q, Q, Q, 2), ["batch_dim_idx=2", "0", "1"]),
    "batch dim of local attention": (lambda *_: LocalAttention("auto")(Q, Q, Q, 2), ["batch_dim_idx=2", "0", "1"]),
    "dropout": (lambda _, ring: ring(Q, Q, Q, 0, dropout_p=0.1), ["dropout_p=0.1", "0"]),
    "rotary embedding": (lambda _, ring: ring(Q, Q, Q, 0, Q[0, :, 0, 0]), ["rotary_pos_emb", *MASK_OR_POSITIONS]),
    "attention mask": (
        lambda _, ring: ring(Q, Q, Q, 0, None, None, attention_mask=Q[0, :, 0, 0]),
        ["attention_mask", *MASK_OR_POSITIONS],
    ),
    "mask of a call": (lambda _, ring: ring(Q, Q, Q, 0, mask=torch.ones(6, 6)), ["mask", "Tensor", *OTHER_MASKS]),
    "mask": (lambda world, _: RingAttention("auto", world, mask=WORD), ["mask", "str", *OTHER_MASKS]),
    "dims": (lambda world, _: RingAttention("auto", world, 1, 2), ["scatter_idx=1", "gather_idx=2", "2", "0", "1"]),
    "local attention": (
        lambda world, _: RingAttention(NUMBER, world),
        ["local_attention", "int", '"auto"', "mask=CAUSAL", "FULL", "Mask(left=...)", "softmax_scale="],
    ),
    "group": (
        lambda *_: RingAttention("auto", NOTHING),
        ["group", "ParallelGroups(...).get_sequence_parallel_group()"],
    ),
    "scale": (lambda _, ring: ring(Q, Q, Q, 0, softmax_scale=0.0), ["softmax_scale=0.0", "above 0"]),
    "softcap": (lambda _, ring: ring(Q, Q, Q, 0, softcap=0.0), ["softcap=0.0", "above 0", "finite", "softcap=None"]),
    "endless softcap": (lambda _, ring: ring(Q, Q, Q, 0, softcap=math.inf), ["softcap=inf", "above 0", "finite"]),
    "softcap of a kernel": (
        lambda world, _: RingAttention("cpu_flash", world)(Q, Q, Q, 0, softcap=5.0),
        ["kernel=cpu_flash", "softcap", "kernel=auto"],
    ),
    "heads of sinks": (
        lambda _, ring: ring(Q, Q, Q, 0, sinks=torch.zeros(3)),
        ["sinks", "[3]", "torch.float32", "[2] on cpu"],
    ),
    "dtype of sinks": (
        lambda _, ring: ring(Q, Q, Q, 0, sinks=torch.zeros(2, dtype=torch.int64)),
        ["sinks", "[2] of torch.int64", "float", "[2] on cpu"],
    ),
    "sinks": (lambda _, ring: ring(Q, Q, Q, 0, sinks=cast(Any, [0.0, 0.0])), ["sinks", "list", "[2] on cpu"]),
    "number of dims": (lambda _, ring: ring(Q[0], Q, Q, 0), ["query", "[3, 2, 8]", "four dims"]),
    "dtypes": (lambda _, ring: ring(Q, Q.half(), Q, 0), ["query", "torch.float32", "key", "torch.float16", "value"]),
    "tokens": (lambda _, ring: ring(Q, Q[:, :2], Q, 0), ["query", SHAPE, "key", "[1, 2, 2, 8]", "first two dims"]),
    "heads": (lambda _, ring: ring(Q[:, :, :1], Q, Q, 0), ["query", "[1, 3, 1, 8]", "key", SHAPE, "heads"]),
    "head sizes": (lambda _, ring: ring(Q, Q[..., :4], Q, 0), ["query", SHAPE, "key", "[1, 3, 2, 4]", "head sizes"]),
    "no head": (lambda _, ring: ring(Q, Q[:, :, :0], Q[:, :, :0], 0), ["key", "value", "[1, 3, 0, 8]"]),
    "documents": (lambda _, ring: ring(Q, Q, Q, 0, mask=CAUSAL.packed([0, 7])), ["documents", "7", "6 tokens"]),
    "rows of documents": (lambda _, ring: ring(Q, Q, Q, 0, mask=UNEQUAL), ["documents", "2 rows", "1"]),
    "documents of local attention": (
        lambda world, _: LocalAttention("auto", world, 2, 0)(Q, Q, Q, 0, mask=CAUSAL.packed([0, 4])),
        ["documents", "4", "3 tokens"],
    ),
    "kernel": (
        lambda world, _: RingAttention("cpu_flash", world)(Q, Q, Q[..., :4], 0),
        ["kernel=cpu_flash", "8", "4", "kernel=auto"],
    ),
    "kernel object": (
        lambda world, _: RingAttention(KERNELS["cudnn"], world)(Q, Q, Q, 0),
        ["kernel=cudnn", "cuda", "cpu", "kernel=auto"],
    ),
    "kv heads": (
        lambda world, _: UlyssesAttention("auto", world)(Q, Q[:, :, :1], Q[:, :, :1], 0),
        ["num_kv_heads=1", "ulysses_degree=2", "HybridAttention", "[1]", "RingAttention"],
    ),
}


def refusals() -> dict[str, str]:
    """On a rank: the error of each mistake."""
    import deepspeed.comm as dist

    world: Any = dist.get_world_group()
    ring, messages = RingAttention("auto", world), {}
    for mistake, (attempt, _) in MISTAKES.items():
        try:
            attempt(world, ring)
        except ValueError as error:
            messages[mistake] = str(error)
    return messages


def test_mistakes_are_refused_by_name(pool: WorkerPool):
    for messages in pool.run(refusals, num_ranks=2):
        assert messages.keys() == MISTAKES.keys()
        for mistake, (_, parts) in MISTAKES.items():
            names(messages[mistake], *parts)


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
