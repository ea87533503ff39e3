"""What a ring rank computes, sends and receives in each ring step. Pure integers: a rank, never a process group.

In ring step t, rank r of R computes with the keys and values of its source, rank (r - t) mod R. While it does, K,V of
the next step arrive. In the backward pass each step's dK,dV go straight back to their owner, which sums them. `routing`
leaves out keys that nobody attends to.

Causal attention in the zigzag layout on four ranks. The sequence has chunks 0 to 7; r0 holds 0 and 7, r1 holds 1 and 6,
r2 holds 2 and 5, r3 holds 3 and 4. Each number is the ring step in which these queries meet these keys:

                     keys of   r0 r1 r2 r3 r3 r2 r1 r0
                       chunk    0  1  2  3  4  5  6  7
        queries of r0      0    0  .  .  .  .  .  .  .
                   r1      1    1  0  .  .  .  .  .  .
                   r2      2    2  1  0  .  .  .  .  .
                   r3      3    3  2  1  0  .  .  .  .
                   r3      4    3  2  1  0  0  .  .  .
                   r2      5    2  1  0  3  3  0  .  .
                   r1      6    1  0  3  2  2  3  0  .
                   r0      7    0  3  2  1  1  2  3  0

    ring step     0                1              2              3
    r0            0,7 x 0,7        7 x 3,4        7 x 2,5        7 x 1,6        queries x keys, by chunk
    r1            1,6 x 1,6        1,6 x 0        6 x 3,4        6 x 2,5
    r2            2,5 x 2,5        2,5 x 1        2,5 x 0        5 x 3,4
    r3            3,4 x 3,4        3,4 x 2        3,4 x 1        3,4 x 0
                  causal square    full blocks of two chunks, equal on all ranks

So each step is one kernel call. With an earlier source all queries see its early chunk; with a later source the late
queries see both of its chunks.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from ring_attention import direct_routing
from ring_attention.direct_routing import goes_direct
from ring_attention.layout import Layout, Spans, num_tokens
from ring_attention.mask import CAUSAL, Mask
from ring_attention.routing import key_routes, required_keys
from ring_attention.tiles import AttentionTile, ring_tiles


class Message(NamedTuple):
    """Tokens of one rank's K,V, or of their gradients, to or from a ring rank."""

    peer: int
    spans: Spans


class RingStep(NamedTuple):
    """One step of the ring. Tiles' keys and spans count the source's local tokens.

    Args:
        source: the ring rank that owns these keys and values.
        tiles: what to compute.
        keys: which of the source's tokens are here: all in step 0, later those that arrived.
        keys_from: the rank that sent them; None if none did.
        send_next: which of them to pass on to the next rank, for its next step.
        send_direct: which of this rank's own keys to send to a rank further on, for its next step.
        gradients: the source's tokens whose dK,dV to send to it after this step; () in step 0 and without tiles.
        gradient_return: this rank's tokens whose dK,dV another rank computed in this step and sends back.
    """

    source: int
    tiles: tuple[AttentionTile, ...]
    keys: Spans
    keys_from: int | None
    send_next: Message | None
    send_direct: Message | None
    gradients: Spans
    gradient_return: Message | None


@functools.lru_cache(maxsize=16)  # packed documents give each training step a mask of its own, which all layers share
def ring_schedule(layout: Layout, mask: Mask, ring_rank: int) -> tuple[RingStep, ...]:
    """The steps of `ring_rank`. Padding counts as tokens: it comes after all real ones.

    Raises:
        ValueError: if the mask's documents reach beyond the layout's padded length.
    """
    degree = layout.ring_degree
    required, routes = required_keys(layout, mask), key_routes(layout, mask)
    tiles_of = ring_tiles(layout, mask)

    def message(peer: int, spans: Spans) -> Message | None:
        return Message(peer % degree, spans) if spans else None

    steps = []
    for number in range(degree):
        source = (ring_rank - number) % degree
        keys, passed_on = (routes[source][distance] for distance in (number, number + 1))
        own_here, own_further = (routes[ring_rank][distance] for distance in (number, number + 1))
        sender = ring_rank - 1 if number > 1 and routes[source][number - 1] else source
        steps.append(
            RingStep(
                source,
                tiles_of(ring_rank, source),
                keys if number else ((0, layout.ring_length),),
                sender % degree if keys else None,
                message(ring_rank + 1, passed_on if keys or number == 0 else ()),
                message(ring_rank + number + 1, own_further if number and not own_here else ()),
                required[source][number],
                message(ring_rank + number, required[ring_rank][number]),
            )
        )
    return tuple(steps)


@functools.lru_cache(maxsize=8)  # seconds for a hundred ranks and more
def work_per_rank(layout: Layout, mask: Mask = CAUSAL) -> list[list[int]]:
    """Query-key pairs that attend: ``work[ring_rank][ring_step]``, over all rows of the batch where these differ."""
    return [
        [sum(tile.block.work for tile in step.tiles) for step in ring_schedule(layout, mask, rank)]
        for rank in range(layout.ring_degree)
    ]


def imbalance(layout: Layout, mask: Mask = CAUSAL) -> float:
    """The work of the busiest rank of each ring step, summed over steps, over the mean rank's work: at least 1.

    In one exchange there is only one step.
    """
    work = work_per_rank(layout, mask)
    if goes_direct(layout, mask):
        work = [[sum(of_rank)] for of_rank in work]
    return sum(map(max, zip(*work, strict=True))) * layout.ring_degree / sum(map(sum, work))


def tokens_sent(layout: Layout, mask: Mask, ring_rank: int) -> tuple[int, int]:
    """Tokens whose K,V a rank sends in a pass, and tokens whose dK,dV it sends in a backward pass."""
    if goes_direct(layout, mask):
        return direct_routing.tokens_sent(layout, mask)[ring_rank]
    steps = ring_schedule(layout, mask, ring_rank)
    keys = [message.spans for step in steps for message in (step.send_next, step.send_direct) if message]
    return sum(map(num_tokens, keys)), sum(num_tokens(step.gradients) for step in steps)


def keys_buffer(step: int) -> str:
    """The receive buffer of the K,V that arrive during a ring step. Kernels read one while the other fills."""
    return f"keys{step % 2}"


def gradient_buffer(step: int) -> str:
    """The receive buffer of the dK,dV that return after a ring step. One waits to be added while the other fills."""
    return f"gradients{step % 2}"


@functools.lru_cache(maxsize=16)
def buffer_tokens(layout: Layout, mask: Mask) -> dict[str, int]:
    """The most tokens that any rank receives in each buffer: the same on all ranks. Documents count as one, or in one
    exchange as whole shards, since they differ from step to step, and buffers should not.
    """
    if goes_direct(layout, mask):
        of_ranks = direct_routing.tokens_sent(layout, mask)
        # a rank gets the gradients of the keys that it sends, and returns those of the keys that it gets
        gradients, keys = (-(-max(of_kind) // layout.ring_length) for of_kind in zip(*of_ranks, strict=True))
        sizes = {keys_buffer(0): keys, gradient_buffer(1): gradients}  # which a ring of two has, too
        return {name: size * layout.ring_length for name, size in sizes.items() if size}
    most: dict[str, int] = {}
    routes, required = key_routes(layout, mask), required_keys(layout, mask)
    for distance in range(1, layout.ring_degree):
        for name, table in ((keys_buffer(distance - 1), routes), (gradient_buffer(distance), required)):
            if spans := [of_source[distance] for of_source in table if of_source[distance]]:
                tokens = layout.ring_length if mask.documents is not None else max(map(num_tokens, spans))
                most[name] = max(most.get(name, 0), tokens)
    return most
