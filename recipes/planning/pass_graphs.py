"""Where a ring's passes are CUDA graphs (`ring_attention.pass_graph`), and the memory that these keep."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import Config, Degrees
from recipes.planning.memory import dtype_bytes
from ring_attention.kernels import KERNELS
from ring_attention.pass_graph import become_graphs


def has_graphs(
    config: Config, degrees: Degrees, method: str, kernel: str, ranks_per_host: int, local_tokens: int
) -> bool:
    """Whether a ring's passes are graphs, from the third of a kind on.

    Its ranks must be on one host, where all messages are copies. A batch with a document mask counts as packed even if
    each of its sequences is one document.

    Args:
        method: the attention method, never auto.
        kernel: the attention kernel's name.
        local_tokens: of one micro-batch on a rank. A ring rank has those of its Ulysses ranks.
    """
    return (
        method in ("ring", "hybrid")
        and degrees.ring > 1
        and degrees.sequence <= ranks_per_host
        and config.attention.transport != "p2p"
        and become_graphs(KERNELS[kernel], local_tokens * degrees.ulysses, config.data.document_mask)
    )


@dataclass(frozen=True)
class GraphMemory:
    """What the graphs of a training step keep, in bytes per token of a rank. All layers with one mask share two graphs.

    Each graph has its own inputs and results, from which and to which a pass copies. All share one pool of memory for
    what a pass works with, so it has the most of any: a backward pass's, whose results are among it.

    Args:
        num_heads: query heads.
        queries, keys: numbers of a token in all query heads, and in all key-value heads.
        size: bytes of a number.
        num_masks: 2 if some layers have a window and others have none, else 1.
    """

    num_heads: int
    queries: int
    keys: int
    size: int
    num_masks: int

    @property
    def results(self) -> int:
        """Of a backward pass: dq, dk and dv. A replay returns copies of them."""
        return self.size * (self.queries + 2 * self.keys)

    def kept(self, working: float) -> float:
        """Of all graphs.

        Args:
            working: what a backward pass allocates, its results included, and neither its inputs nor symmetric buffers.
        """
        lse = 4 * self.num_heads
        forward = self.size * (2 * self.queries + 2 * self.keys) + lse  # q, k, v; out and lse
        backward_inputs = self.size * (3 * self.queries + 2 * self.keys) + lse  # dout, q, k, v, out, lse
        of_one_mask = forward + backward_inputs + self.results
        return self.num_masks * of_one_mask - self.results + working


def graph_memory(
    config: Config, degrees: Degrees, method: str, ranks_per_host: int, local_tokens: int
) -> GraphMemory | None:
    """On GPUs; the arguments are those of `has_graphs`. None if passes are no graphs.

    The kernel is flash-attn-4, of which passes can be graphs, wherever it can run.
    """
    model, kernel, size = config.model, KERNELS["flash_attn_4"], dtype_bytes(config)
    is_used = config.attention.kernel in ("auto", kernel.name) and size == 2
    can_run = kernel.head_dims is None or model.head_dim in kernel.head_dims
    if not is_used or not can_run or not has_graphs(config, degrees, method, kernel.name, ranks_per_host, local_tokens):
        return None
    num_masks = 2 if 0 < model.num_window_layers < model.num_layers else 1
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return GraphMemory(model.num_heads, queries, keys, size, num_masks)
