"""recipe=plan: the fastest settings for a model and a length on a cluster that need not be here, by arithmetic.

python train.py recipe=plan cluster=8xh200 model=llama_8b data.sequence_length=131072
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from conf.schema import Config, ConfigError
from recipes.launch.environment import ranks_are_started
from recipes.planning.cluster import parse_cluster
from recipes.planning.plan_plots import over_gpus, over_lengths
from recipes.planning.plan_report import report, row
from recipes.planning.search import search
from recipes.run.run_dir import replace_file

RESULT_FILE = "plan.json"
MAX_GPUS = 4096  # a ring of more takes minutes and GiB to simulate


def plan(config: Config, typed: list[str], run_dir: Path) -> float:
    """Print the best settings with their commands, and write RUN_DIR/plan.json and two plots. Starts no rank.

    Args:
        typed: the overrides of the command line. What they set is not searched.

    Returns:
        The tokens per second of the fastest settings; NaN if their memory is not predicted.

    Raises:
        ConfigError: for a cluster that is not known, settings that contradict it, or if nothing fits.
    """
    if ranks_are_started():
        raise ConfigError("recipe=plan starts no ranks: type python train.py, without a launcher")
    assert config.cluster is not None, "conf.schema refuses this"
    cluster = parse_cluster(config.cluster)
    if cluster.gpu == "cpu":
        raise ConfigError(f"cluster={config.cluster} is of CPUs, but recipe=plan plans for GPUs: type cluster=8xh200")
    if cluster.num_gpus > MAX_GPUS:
        raise ConfigError(
            f"cluster={config.cluster} has {cluster.num_gpus:,} GPUs, more than the {MAX_GPUS:,} that recipe=plan "
            f"forecasts: type {MAX_GPUS // 8}x8x{cluster.gpu}, or fewer"
        )
    result = search(config, cluster, typed)
    print(*report(result, config, cluster), sep="\n", flush=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    plots = [draw(config, result, cluster, typed, run_dir) for draw in (over_lengths, over_gpus)]
    rows = {
        name: [row(forecast, config) for forecast in getattr(result, name)]
        for name in ("ranked", "unpredicted", "refused")
    }
    content = {"config": dataclasses.asdict(config), "cluster": dataclasses.asdict(cluster), **rows}
    replace_file(run_dir / RESULT_FILE, json.dumps(content, indent=1) + "\n")
    print(f"\nall settings: {run_dir / RESULT_FILE}; plots: {', '.join(map(str, plots))}", flush=True)
    return result.ranked[0].tokens_per_s if result.ranked else math.nan
