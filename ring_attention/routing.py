"""Which keys travel from which rank to which: only tokens that some rank attends to are sent. Pure integers.

Keys move from rank to rank around the ring. Each rank passes on what it or a rank behind it needs. Where a stretch of
ranks needs none of a source's keys, the source sends them directly to the first rank after that stretch.
"""

from __future__ import annotations

import functools

from ring_attention.layout import Layout, Spans, union
from ring_attention.mask import Mask
from ring_attention.tiles import ring_tiles


@functools.lru_cache(maxsize=8)
def required_keys(layout: Layout, mask: Mask) -> list[list[Spans]]:
    """``required[source][distance]``: the source's tokens that the rank `distance` further on attends to.

    () at distance 0: a rank has its own keys.
    """
    degree, tiles_of = layout.ring_degree, ring_tiles(layout, mask)
    required: list[list[Spans]] = []
    for source in range(degree):
        required.append([()])
        for distance in range(1, degree):
            tiles = tiles_of((source + distance) % degree, source)
            required[-1].append(union((tile.block.k_start, tile.block.k_stop) for tile in tiles))
    return required


@functools.lru_cache(maxsize=8)
def key_routes(layout: Layout, mask: Mask) -> list[list[Spans]]:
    """``routes[source][distance]``: the source's tokens that travel to the rank `distance` further on.

    A rank that needs some of them also gets what the ranks right behind it need, up to the first that needs none.
    """
    routes = []
    for required in required_keys(layout, mask):
        route: list[Spans] = [*required, ()]  # nothing travels further than to the rank before the source
        for distance in reversed(range(1, len(required))):
            if required[distance]:
                route[distance] = union([*required[distance], *route[distance + 1]])
        routes.append(route)
    return routes
