"""How packed documents lie on the ranks of a ring by zigzag and by balanced: `explain=true` shows it. Pure integers."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

from recipes.planning.plan import Plan
from recipes.run.text_table import text_table
from ring_attention.direct_routing import goes_direct
from ring_attention.layout import Layout
from ring_attention.mask import CAUSAL
from ring_attention.schedule import imbalance, tokens_sent

NUM_SEQUENCES = 4  # of which all ranks' schedules take a second on 16 ranks


def packed_layouts(plan: Plan, sequences: Iterable[tuple[int, ...]]) -> list[str]:
    """A line for each layout; nothing where documents do not lie on a ring.

    Args:
        sequences: of each packed sequence, 0 and then the end of each document.
    """
    config = plan.config
    is_varied = config.data.stages is not None or config.engine.micro_batch_size > 1  # then a batch has other lengths
    if not config.data.document_mask or plan.degrees.ring == 1 or is_varied:
        return []
    given = [*sequences]
    rows = [["  layout", "imbalance, mean (most)", "tokens whose K,V a rank sends at most", "in one exchange"]]
    rows += [_row(dataclasses.replace(plan.layout, name=name), given) for name in ("zigzag", "balanced")]
    documents = _numbers([len(ends) - 1 for ends in given])
    return [
        f"attention of the first {len(given)} packed sequences, of {documents} documents (attention.layout="
        f"{config.attention.layout}; {plan.layout.ring_length:,} tokens on a ring rank)",
        *text_table(rows),
    ]


def _row(layout: Layout, sequences: Sequence[tuple[int, ...]]) -> list[str]:
    imbalances, sent, num_direct = [], [], 0
    for ends in sequences:
        own = dataclasses.replace(layout, documents=ends if layout.name == "balanced" else None)
        mask = CAUSAL.packed(ends).within(layout.padded_length)
        imbalances.append(imbalance(own, mask))
        sent.append(max(tokens_sent(own, mask, rank)[0] for rank in range(layout.ring_degree)))
        num_direct += goes_direct(own, mask)
    mean, most = statistics.fmean(imbalances), max(imbalances)
    return [f"  {layout.name}", f"{mean:.2f} ({most:.2f})", _numbers(sent), f"{num_direct} of {len(sequences)}"]


def _numbers(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
