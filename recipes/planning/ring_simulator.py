"""Simulates the ring's schedule: when each rank computes, sends, waits. Exposed time comes from events, not a formula.

Each rank has a compute stream, one port out and one in, which carry messages in the order in which they are posted, as
the transports do. A message starts when both ends have posted it and both ports are free. No step waits for all ranks:
a rank waits only for its own messages. As posts have a fixed order, the events form a graph without cycles. It is swept
ring step by ring step, for all ranks at once; a thousand ranks take a second. Hosts issue calls ahead of devices, so
they are no part of a call: `layer_time` compares their time with the device's.

Arrays are [R], one entry for each ring rank; times are in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recipes.planning.ring_work import Integers, RingWork
from ring_attention.backward_schedule import TileRows

Times = NDArray[np.float64]


@dataclass(frozen=True)
class RingCosts:
    """What the parts of a ring step cost on a cluster.

    Args:
        tiles_s: kernels of one step's tiles.
        token_bytes: K and V of one token, of all rows of the batch.
        gradient_bytes: dK and dV of one token, as they travel.
        add_s_per_token: adding one token's returned dK,dV to the owner's sum.
        within_bytes_per_s, between_bytes_per_s: of a rank's links in its host, and to other hosts.
        latency_s: of one message.
        ring_ranks_per_host: neighbours of the ring in one host. Below 1 counts as 1.
        slowdown: [R] factors on the kernels of each rank, for stragglers; None: all are equally fast.
    """

    tiles_s: Callable[[TileRows], float]
    token_bytes: float
    gradient_bytes: float
    add_s_per_token: float
    within_bytes_per_s: float
    between_bytes_per_s: float
    latency_s: float
    ring_ranks_per_host: int
    slowdown: tuple[float, ...] | None = None


@dataclass(frozen=True)
class RingTimes:
    """Where each rank's time in one pass went.

    Args:
        end_s: [R] when each rank is done.
        compute_s: [R] its kernels.
        add_s: [R] its sums of returned gradients.
        exposed_s: [N, R] how long it waited for messages after each step.
    """

    end_s: Times
    compute_s: Times
    add_s: Times
    exposed_s: Times

    @property
    def total_s(self) -> float:
        """Of the slowest rank."""
        return float(self.end_s.max())

    @property
    def exposed_total_s(self) -> float:
        """Of the slowest rank, waiting for messages."""
        return float(self.exposed_s.sum(axis=0)[self.end_s.argmax()])


class _Ports:
    """Each rank's port out and port in."""

    def __init__(self, costs: RingCosts, degree: int) -> None:
        self._costs, self._free_out, self._free_in = costs, np.zeros(degree), np.zeros(degree)
        self._host = np.arange(degree) // max(1, costs.ring_ranks_per_host)

    def transfer(self, senders: Integers, num_bytes: Times, posted_s: Times) -> Times:
        """Messages of `num_bytes` to each rank from `senders`. Returns when a rank has sent and received its own.

        A rank sends at most two messages at once. The second is for a rank further on, and leaves after the first.
        """
        done = np.zeros_like(posted_s)
        receivers = np.flatnonzero(num_bytes)
        if not len(receivers):
            return done
        # of two messages of one sender the one to its neighbour is posted first
        nearest = np.argsort((receivers - senders[receivers]) % len(num_bytes), kind="stable")
        first = np.zeros(len(receivers), bool)
        first[nearest[np.unique(senders[receivers][nearest], return_index=True)[1]]] = True
        for chosen in (receivers[first], receivers[~first]):
            if len(chosen):
                self._send(senders[chosen], chosen, num_bytes[chosen], posted_s, done)
        return done

    def _send(self, senders: Integers, receivers: Integers, num_bytes: Times, posted_s: Times, done: Times) -> None:
        costs = self._costs
        is_near = self._host[senders] == self._host[receivers]
        speed = np.where(is_near, costs.within_bytes_per_s, costs.between_bytes_per_s)
        begin = np.maximum.reduce(
            [posted_s[senders], posted_s[receivers], self._free_out[senders], self._free_in[receivers]]
        )
        end = begin + costs.latency_s + num_bytes / speed
        self._free_out[senders], self._free_in[receivers] = end, end
        np.maximum.at(done, senders, end)
        np.maximum.at(done, receivers, end)


def simulate(work: RingWork, costs: RingCosts) -> RingTimes:
    """One pass over the ring, forward or backward: whichever `work` is of.

    In the backward pass, a step's dK,dV leave after its kernels, and their owner adds them after its next step's.
    `ring_attention.backward_schedule` adds two returns in one pass over the sum, which is in `add_s_per_token`.
    """
    num_steps, degree = work.kind.shape
    tile_times = np.array([costs.tiles_s(tiles) for tiles in work.tiles], np.float64)
    kernels = tile_times[work.kind] * np.array(costs.slowdown or [1.0] * degree)
    ranks, ports = np.arange(degree), _Ports(costs, degree)
    now: Times = np.zeros(degree)
    added: Times = np.zeros(degree)
    exposed = np.zeros((num_steps, degree))
    returned, returned_at = np.zeros(degree, np.int64), np.zeros(degree)
    for number in range(num_steps):
        keys_at = np.zeros(degree)
        if number + 1 < num_steps:
            keys_at = ports.transfer(work.keys_from[number + 1], costs.token_bytes * work.keys[number + 1], now)
        computed = now + kernels[number]
        now = np.maximum(computed, returned_at)  # gradients of the step before, sent and received
        add_s = returned * costs.add_s_per_token
        exposed[number] = now - computed
        now, added = now + add_s, added + add_s
        # rank r returns to its source r - number, and gets its own from r + number
        senders = (ranks + number) % degree
        returned = work.gradients[number][senders]
        returned_at = ports.transfer(senders, costs.gradient_bytes * returned, now)
        waited = np.maximum(now, keys_at)
        exposed[number] += waited - now
        now = waited
    return RingTimes(now, kernels.sum(axis=0), added, exposed)
