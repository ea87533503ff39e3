"""Draws docs/images/timeline.png: what two GPUs compute and copy in one layer's attention, from a run's traces.

python -m docs.tools.draw_timeline RUN_DIR/profile FORWARD_MS BACKWARD_MS    where to look, after the first kernel
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import Patch

WIDTH_MS = {"forward": 10.0, "backward": 25.0}
COLOURS = {"attention": "#2b6cb0", "matrix products": "#c6d4e4", "everything else": "#8f9aa6", "copies": "#dd6b20"}


def kind_of(name: str) -> str:
    if "PtoP" in name:
        return "copies"
    if "flash_attn" in name:
        return "attention"
    return "matrix products" if "nvjet" in name or "gemm" in name.lower() else "everything else"


def main(folder: str, *starts_ms: str) -> None:
    ranks = []
    for rank in range(2):
        events = json.loads((Path(folder) / f"rank_{rank}.json").read_text())["traceEvents"]
        ranks.append([e for e in events if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy")])
    first = min(event["ts"] for event in ranks[0])
    figure, axes = plt.subplots(2, 1, figsize=(11, 5), layout="constrained")
    for axis, (name, width), start in zip(axes, WIDTH_MS.items(), map(float, starts_ms), strict=True):
        for rank, events in enumerate(ranks):
            for event in events:
                begin, length = (event["ts"] - first) / 1e3 - start, event["dur"] / 1e3
                if -length < begin < width:
                    kind = kind_of(event["name"])
                    row = 2 * (1 - rank) + (kind != "copies")
                    axis.broken_barh([(begin, length)], (row + 0.1, 0.8), color=COLOURS[kind])
        labels = [f"rank {rank}, {part}" for rank in (1, 0) for part in ("copy engine", "multiprocessors")]
        axis.set(xlim=(0, width), yticks=[0.5, 1.5, 2.5, 3.5], yticklabels=labels, title=name, xlabel="ms")
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=4)
    figure.savefig(Path(__file__).parents[1] / "images" / "timeline.png", dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
