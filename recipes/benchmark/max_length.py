"""The longest sequence that a configuration can train: probed where it is cheap, predicted, and tried once.

Probes train one layer and two, at short lengths, each in processes of its own: one that runs out of memory costs
nothing but itself. From their peaks `memory_fit` has the length at which the whole model fills a rank's memory, and if
the time allows two whole steps are taken there.

Above `launch`, which starts the ranks of each probe.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from conf.degrees import resolve_degrees
from conf.schema import Config, ConfigError
from recipes.benchmark.memory_fit import MemoryFit, NoFit, check_line
from recipes.launch import launcher
from recipes.launch.environment import ranks_are_started
from recipes.launch.memory_errors import out_of_memory_cause
from recipes.planning.memory import mlp_tile_tokens, tile_tokens
from recipes.run.errors import RunFailed

RESULT_FILE = "max_length.json"
PROBE_FILE, NO_MEMORY_FILE = "probe.json", "out_of_memory"
PROBED_LAYERS = (1, 2)
FIRST_TOKENS_PER_RANK = {"cuda": 4096, "cpu": 512}  # of the shortest probe; others take 2 and 4 times as many
FEWEST_TOKENS_PER_RANK = 256  # also what the length found is a multiple of: kernels work on tiles of 64 to 256 tokens
MOST_DOUBLINGS = 3
NUM_STEPS = 2  # the first makes what later ones keep
# of a device, not for tensors: CUDA's context and NCCL's buffers take 1 to 2 GiB, and the allocator's cache has gaps
MARGIN = 0.1
STEP_DOWN = 0.05  # after a try that ran out of memory
CPU_WARNING = "ON THE CPU memory is that of whole processes, libraries too: these figures say nothing of GPUs"


@dataclass(frozen=True)
class Probe:
    """The configured number of training steps on random tokens, as the task of the ranks; rank 0 writes to the run dir
    what they took.
    """

    config: Config

    def run(self, run_dir: Path, console: TextIO) -> float:
        try:
            self._measure(run_dir)
        except Exception as error:
            cause = out_of_memory_cause(error)
            if cause is None:
                raise
            (run_dir / NO_MEMORY_FILE).write_text(str(cause), encoding="utf-8")
            raise RunFailed(f"a probe ran out of memory: {cause}") from error
        return float("nan")

    def _measure(self, run_dir: Path) -> None:
        import deepspeed.comm as dist

        from recipes.engine.build import build_engine, build_sharder
        from recipes.monitor import device_metrics

        plan = launcher.shared_plan(self.config)
        engine = build_engine(plan)
        device_metrics.reset_peak_memory()  # building took more: weights are made in fp32
        sharder = build_sharder(plan, engine)
        batches = sharder.steps(_random_sequences(plan.config), plan.accumulation_steps)
        clock = device_metrics.StepClock()
        for micro_batches in (next(batches) for _ in range(plan.config.num_steps)):
            clock.restart()
            engine.train_step(micro_batches)
            clock.tick()
        step_time_s = engine.max_over_ranks(min(clock.take()))
        result = {
            "peak_gib": engine.max_over_ranks(device_metrics.peak_memory_in_use_gib()),
            "peak_reserved_gib": engine.max_over_ranks(device_metrics.peak_memory_gib())
            if torch.cuda.is_available()
            else None,
            "step_time_s": step_time_s,
            "flops": plan.flops * plan.tokens_per_step,
            "tokens_per_s": plan.throughput(step_time_s).tokens_per_s,
            "device": plan.device_name,
            "memory_gib": (plan.memory_bytes or 0) / 2**30,
        }
        if dist.get_rank() == 0:
            (run_dir / PROBE_FILE).write_text(json.dumps(result), encoding="utf-8")


def _random_sequences(config: Config) -> Iterator[np.ndarray]:
    """Endless, [L+1] each, the same on all ranks: memory does not depend on the text, and no corpus is too short."""
    generator = np.random.default_rng(config.seed)
    while True:
        yield generator.integers(0, config.model.vocab_size, config.data.sequence_length + 1)


def first_tokens(config: Config, on_gpu: bool) -> int:
    """Per rank, of the shortest probe: so many that what comes in tiles at somewhat longer ones does so in all."""
    first, per_sequence = FIRST_TOKENS_PER_RANK["cuda" if on_gpu else "cpu"], config.engine.micro_batch_size
    for tokens in (first << doublings for doublings in reversed(range(MOST_DOUBLINGS + 1))):
        longest = tokens * per_sequence
        tiles = tile_tokens(config, longest), mlp_tile_tokens(config, longest)
        if any(longest // 2 <= tile for tile in tiles):  # with half as many, they would not
            return tokens
    return first


def _lengths(tokens: int, degree: int) -> list[int]:
    """Those that are probed, from the tokens per rank of the shortest; the ranks that share a sequence."""
    return [tokens * factor * degree for factor in (1, 2, 4)]


class Search:
    """Probes of one configuration, each done once."""

    def __init__(self, config: Config, num_ranks: int, run_dir: Path) -> None:
        self.config, self.num_ranks, self.run_dir = config, num_ranks, run_dir
        self.degree = resolve_degrees(config, num_ranks).sequence
        self.multiple = FEWEST_TOKENS_PER_RANK * self.degree
        self.rows: list[dict[str, Any]] = []

    def probe(self, num_layers: int, length: int) -> dict[str, Any]:
        """What training so many layers at this length takes; a row with `error` alone if it runs out of memory.

        Raises:
            RunFailed: if it fails for another reason.
        """
        for row in self.rows:
            if (row["num_layers"], row["length"]) == (num_layers, length):
                return row
        row: dict[str, Any] = {"num_layers": num_layers, "length": length}
        folder = self.run_dir / "probes" / f"layers_{num_layers}_length_{length}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in (PROBE_FILE, NO_MEMORY_FILE):
            (folder / name).unlink(missing_ok=True)  # of an earlier search
        config = copy.deepcopy(self.config)
        config.model.num_layers, config.data.sequence_length, config.num_steps = num_layers, length, NUM_STEPS
        layers = f"{num_layers} layer{'s' if num_layers > 1 else ''}"
        print(f"{layers} at L = {length:,}: ", end="", flush=True)
        started = time.perf_counter()
        try:
            launcher.start(Probe(config), self.num_ranks, folder)
        except RunFailed:
            if not (folder / NO_MEMORY_FILE).exists():
                raise
            row["error"] = (folder / NO_MEMORY_FILE).read_text(encoding="utf-8")
        else:
            row |= json.loads((folder / PROBE_FILE).read_text(encoding="utf-8"))
        took = f"{time.perf_counter() - started:.0f} s with the start"
        found = (
            "out of memory"
            if "error" in row
            else f"peak {row['peak_gib']:.3f} GiB per rank, step {row['step_time_s']:.2f} s"
        )
        print(f"  {layers} at L = {length:,}: {found} ({took})", flush=True)
        self.rows.append(row)
        return row

    def fit(self) -> MemoryFit:
        """From three lengths with the fewest layers, which must lie on a line, and two with more.

        Longer ones while other things than tokens set the peak, shorter ones where there is no memory.

        Raises:
            RunFailed: if no lengths that fit lie on a line.
        """
        few, more = PROBED_LAYERS
        tokens, too_long, doublings = first_tokens(self.config, torch.cuda.is_available()), False, 0
        while tokens >= FEWEST_TOKENS_PER_RANK:
            lengths = _lengths(tokens, self.degree)
            pairs = [(few, length) for length in lengths] + [(more, length) for length in lengths[1:]]
            if any("error" in self.probe(*pair) for pair in pairs):  # ends with the first that has one
                tokens, too_long = tokens // 2, True
                continue
            peaks = {pair: self.probe(*pair)["peak_gib"] for pair in pairs}
            try:
                check_line({length: peaks[few, length] for length in lengths})
                return MemoryFit.through({pair: peak for pair, peak in peaks.items() if pair[1] != lengths[0]})
            except NoFit as error:
                doublings += 1
                if too_long or doublings > MOST_DOUBLINGS:
                    raise RunFailed(f"no length can be predicted: {error}") from error
                print(f"{error}; so longer ones are probed", flush=True)
                tokens *= 2
        raise RunFailed(
            f"{more} layers are out of memory at {4 * FEWEST_TOKENS_PER_RANK} tokens per rank already: use a smaller "
            "model, more ranks, or engine.recompute=selective"
        )


def max_length(config: Config, run_dir: Path) -> float:
    """Find the longest L, print it with the curve and write RUN_DIR/max_length.json; returns L.

    Raises:
        ConfigError: if the configuration cannot be probed, or no length fits.
        RunFailed: if a probe failed for another reason than want of memory, or probes allow no prediction.
    """
    if ranks_are_started():
        raise ConfigError(
            "recipe=max_length starts ranks anew for each probe: type python train.py, without a launcher"
        )
    trained = copy.deepcopy(config)
    trained.recipe = "pretrain"
    num_ranks = launcher.count_ranks(trained)
    on_gpu, asked_gib = torch.cuda.device_count() > 0, config.max_length.memory_gib
    if config.explain:
        print(*_explanation(trained, num_ranks, on_gpu), sep="\n")
        return float("nan")
    if not on_gpu:
        print(f"!!! {CPU_WARNING}", flush=True)
    search, layers = Search(trained, num_ranks, run_dir), config.model.num_layers
    fit = search.fit()
    longest_probe = max((row for row in search.rows if "error" not in row), key=lambda row: row["flops"])
    limit_gib = asked_gib or (1 - MARGIN) * longest_probe["memory_gib"]
    length = fit.longest(layers, limit_gib, search.multiple)
    if not length:
        raise ConfigError(
            f"no length of {search.multiple:,} tokens or more fits: {layers} layers without any take "
            f"{fit.without_tokens_gib(layers):.2f} GiB per rank by prediction, and {limit_gib:.2f} GiB are there: "
            "use fewer layers (model.num_layers), more ranks, or engine.zero_stage=3"
        )
    flops_per_s = longest_probe["flops"] / longest_probe["step_time_s"]
    predicted_s = NUM_STEPS * _flops(trained, num_ranks, length) / flops_per_s
    result: dict[str, Any] = {
        "config": asdict(config), "num_ranks": num_ranks, "device": longest_probe["device"], "limit_gib": limit_gib,
        "coefficients_gib": asdict(fit), "predicted_length": length,
        "predicted_peak_gib": fit.peak_gib(layers, length), "predicted_steps_s": predicted_s,
        "confirmed": None, "curve": _curve(fit, layers, length, search.multiple),
        "longest_by_layers": {n: fit.longest(n, limit_gib, search.multiple) for n in _doubled(layers)},
        "probes": search.rows,
    }  # fmt: skip
    _write(run_dir, result)
    print(*_table(result, layers, asked_gib), sep="\n", flush=True)
    if predicted_s > config.max_length.confirm_s:
        print(
            f"not tried: {NUM_STEPS} steps should take {predicted_s:.0f} s, more than max_length.confirm_s="
            f"{config.max_length.confirm_s:g}"
        )
    else:
        print(f"trying L = {length:,}: {NUM_STEPS} steps, {predicted_s:.0f} s by the speed of the probes", flush=True)
        tried = _confirm(search, fit, layers, length, limit_gib)
        length = tried["length"]
        result["confirmed"] = tried if _fits(tried, limit_gib) else None
        _write(run_dir, result)
    print(f"all numbers: {run_dir / RESULT_FILE}", flush=True)
    return float(length)


def _explanation(config: Config, num_ranks: int, on_gpu: bool) -> list[str]:
    """What the search would do, which is known before its first probe."""
    (few, more), asked_gib, layers = PROBED_LAYERS, config.max_length.memory_gib, config.model.num_layers
    lengths = _lengths(first_tokens(config, on_gpu), resolve_degrees(config, num_ranks).sequence)
    memory = (
        f"{asked_gib:g} GiB per rank, max_length.memory_gib"
        if asked_gib
        else f"a rank's memory less {100 * MARGIN:g} %; max_length.memory_gib sets it"
    )
    return [
        f"a search for the longest sequence that {config.model.name} trains on {num_ranks} "
        f"rank{'s' if num_ranks > 1 else ''}; data.sequence_length is not used",
        f"  probes    {NUM_STEPS} steps of {few} layer at L = {', '.join(f'{length:,}' for length in lengths)} and of "
        f"{more} layers at {' and '.join(f'{length:,}' for length in lengths[1:])}, each in ranks of its own;",
        f"            shorter ones where there is no memory, up to {2**MOST_DOUBLINGS} times longer ones where peaks "
        "do not lie on a line",
        f"  predicts  the longest L of {layers} layer{'s' if layers > 1 else ''} from their peaks",
        f"  memory    {memory}",
        f"  confirms  {NUM_STEPS} whole steps there, if they should take no more than max_length.confirm_s="
        f"{config.max_length.confirm_s:g} s",
    ]


def _confirm(search: Search, fit: MemoryFit, layers: int, length: int, limit_gib: float) -> dict[str, Any]:
    """Whole steps at this length and, if they take too much memory, once at a shorter one; what was tried last."""
    row = search.probe(layers, length)
    if not _fits(row, limit_gib):
        print(
            f"L = {length:,} does not fit{_peak(row)}: the prediction was too high; trying {100 * STEP_DOWN:g} % less",
            flush=True,
        )
        length = max(1, int((1 - STEP_DOWN) * length) // search.multiple) * search.multiple
        row = search.probe(layers, length)
    if not _fits(row, limit_gib):
        print(
            f"L = {length:,} does not fit either{_peak(row)}: the prediction does not hold for this configuration",
            flush=True,
        )
        return row
    predicted = fit.peak_gib(layers, length)
    print(
        f"confirmed: L = {length:,} trains, {row['tokens_per_s']:,.0f} tok/s, peak {row['peak_gib']:.3f} GiB; "
        f"predicted {predicted:.3f}, {100 * (predicted / row['peak_gib'] - 1):+.1f} %",
        flush=True,
    )
    return row


def _fits(row: dict[str, Any], limit_gib: float) -> bool:
    return "error" not in row and row["peak_gib"] <= limit_gib


def _peak(row: dict[str, Any]) -> str:
    return "" if "error" in row else f", it peaks at {row['peak_gib']:.3f} GiB"


def _flops(config: Config, num_ranks: int, length: int) -> float:
    """Of a training step."""
    at_length = copy.deepcopy(config)
    at_length.data.sequence_length = length
    plan = launcher.make_plan(at_length, num_ranks)
    return plan.flops * plan.tokens_per_step


def _doubled(largest: int) -> list[int]:
    """1, 2, 4, ... and the largest."""
    return [*(2**power for power in range(largest.bit_length()) if 2**power < largest), largest]


def _curve(fit: MemoryFit, layers: int, longest: int, multiple: int) -> list[dict[str, float]]:
    """Predicted peaks from an eighth of the longest length to it."""
    lengths = sorted({max(1, longest * eighths // 8 // multiple) * multiple for eighths in (1, 2, 4, 6, 8)})
    return [
        {
            "length": length,
            "peak_gib": fit.peak_gib(layers, length),
            "without_tokens_gib": fit.without_tokens_gib(layers),
            "layers_gib": fit.per_token_layer * layers * length,
            "ends_gib": fit.per_token * length,
        }
        for length in lengths
    ]


def _table(result: dict[str, Any], layers: int, asked_gib: float | None) -> list[str]:
    """The curve and the longest lengths, as people read them."""
    limit = f"{result['limit_gib']:.2f} GiB per rank"
    limit += ", max_length.memory_gib" if asked_gib else f", its memory less {100 * MARGIN:g} %"
    lines = [
        "",
        f"{layers} layers on {result['num_ranks']} x {result['device']}; {limit}",
        f"{'L':>12} {'GiB per rank':>13} {'= states etc.':>14} {'+ layers':>9} {'+ embedding, logits':>20}",
    ]
    lines += [
        f"{point['length']:12,} {point['peak_gib']:13.3f} {point['without_tokens_gib']:14.3f} "
        f"{point['layers_gib']:9.3f} {point['ends_gib']:20.3f}"
        for point in result["curve"]
    ]
    by_layers = ", ".join(f"{n}: {length:,}" for n, length in result["longest_by_layers"].items())
    return [*lines, f"longest L by number of layers: {by_layers}", f"predicted: L = {result['predicted_length']:,}"]


def _write(run_dir: Path, result: dict[str, Any]) -> None:
    (run_dir / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
