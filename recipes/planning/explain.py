"""A plan as lines of text: the banner at the start of a run, and what `explain=true` prints."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from conf.schema import LOSS_TASK, WITHOUT_MODEL, Config
from conf.stages import stages_of, steps_by_length
from data.source import describe, overlap_warning
from recipes.planning import memory
from recipes.planning.memory_timeline import StepMemory
from recipes.planning.plan import Plan
from recipes.planning.step_time import StepTime
from recipes.planning.throughput import kind_of
from ring_attention.mask import CAUSAL
from ring_attention.schedule import imbalance, tokens_sent, work_per_rank

MAX_RANK_LINES = 8  # of an explanation, where ranks have unequal work


def banner(plan: Plan, run_dir: Path) -> list[str]:
    """What will run, in about ten aligned lines."""
    config, model, engine, layout = plan.config, plan.config.model, plan.config.engine, plan.layout
    kernel, reason = plan.kernel_choice()
    tokens = f"{layout.local_length:,} per rank of {layout.length:,} per sequence"
    if padding := layout.padded_length - layout.length:
        tokens += f" ({padding} of padding)"
    shape = f"{model.num_layers} layers, {model.num_heads} heads x {model.head_dim}, {model.num_kv_heads} kv heads"
    passes = "forward and backward" if plan.trains else "forward"
    is_sharded = plan.trains or engine.zero_stage == 3
    sharding = f"ZeRO stage {engine.zero_stage}" if is_sharded else "all weights on every rank, no optimizer"
    rows = [
        ("ranks", _ranks(plan)),
        ("tokens", f"{tokens}; {plan.tokens_per_step:,} per step"),
        *([("stages", _stage_lengths(plan))] if config.data.stages else []),
        *([] if plan.config.recipe in (*WITHOUT_MODEL, "generate") else [("data", _data(plan))]),
        ("model", f"{model.name}: {memory.num_parameters(model) / 1e6:,.2f} M parameters{_trained(plan)}, {shape}"),
        ("FLOPs per token", f"{plan.flops / 1e6:,.1f} M {passes}, causal counted once{_of_documents(plan)}"),
        ("attention", _attention(plan)),
        ("attention kernel", f"{kernel} ({reason})"),
        ("engine", f"{sharding}, {engine.dtype}"),
        *([("optimizer", _optimizer(plan))] if plan.trains else []),
        *([("evaluation", _evaluation_while_training(config))] if config.evaluate.every_n_steps else []),
        *([("keys and values", _cache(plan))] if plan.config.recipe == "generate" else []),
        *([] if plan.config.recipe in WITHOUT_MODEL else _memory_savers(plan)),
        *(("!!!", warning) for warning in _warnings(plan) if warning),
        ("run dir", str(run_dir)),
    ]
    return [f"{name:>17}  {value}" for name, value in rows]


def _stage_lengths(plan: Plan) -> str:
    stages = (f"{stage.sequence_length:,} tokens from step {stage.first_step}" for stage in stages_of(plan.config.data))
    return f"sequences of {', '.join(stages)}; all other lines are of the longest"


def _warnings(plan: Plan) -> tuple[str | None, ...]:
    validated = overlap_warning(plan.config.data) if plan.config.recipe == "pretrain" else None
    return plan.slow_step_warning, plan.memory_warning, plan.position_warning, validated


def _optimizer(plan: Plan) -> str:
    given, num_steps = plan.config.optimizer, plan.config.num_steps
    decay = f"{given.decay} decay to {given.min_lr_ratio:g} of it" if given.decay != "constant" else "then constant"
    warm_up = f"{given.warmup_fraction:.0%} of {num_steps:,} steps warm-up"
    return f"AdamW, learning rate {given.lr:g}, {warm_up}, {decay}, weight decay {given.weight_decay:g}"


def _cache(plan: Plan) -> str:
    size = memory.gib(memory.cache_bytes(plan.config, plan.degrees))
    return f"{size} GiB per rank, for the longest prompt and {plan.config.generate.max_new_tokens} new tokens"


def _of_documents(plan: Plan) -> str:
    return "; less in a step of shorter documents" if plan.config.data.document_mask else ""


def _trained(plan: Plan) -> str:
    model, lora = plan.config.model, plan.config.lora
    return "" if model.num_trained is None else f", {model.num_trained / 1e6:,.2f} M trained (LoRA of rank {lora.rank})"


def explanation(plan: Plan, run_dir: Path) -> list[str]:
    """The banner, and the arithmetic behind its numbers."""
    config = plan.config
    step_time = ["", *_step_time(plan)] if config.recipe in ("pretrain", "forward") else []
    candidates = ["", *_candidates(plan)] if plan.candidates else []
    ring_work = ["", *_ring_work(plan)] if plan.degrees.sequence > 1 else []
    return [
        *banner(plan, run_dir),
        "",
        _hardware(plan),
        "",
        "batch",
        f"  {plan.degrees.data} data ranks x {config.engine.micro_batch_size} sequences x "
        f"{plan.accumulation_steps} micro-batches = {plan.sequences_per_step} sequences per step",
        f"  x {plan.layout.length:,} tokens = {plan.tokens_per_step:,} tokens per step, "
        f"{plan.tokens_of_steps(1, config.num_steps):,} in {config.num_steps} steps",
        *_stages(plan),
        *step_time,
        *candidates,
        *ring_work,
        "",
        f"parameters: {memory.num_parameters(config.model):,}",
        "",
        *state_lines(plan),
        *step_memory_lines(plan),
        *refusal_lines(plan),
    ]


def _stages(plan: Plan) -> Iterator[str]:
    """Of data.stages: the steps of each, and their work if each sequence is one document."""
    if plan.config.data.stages is None:
        return
    stages = [*steps_by_length(plan.config.data, 1, plan.config.num_steps)]
    flops = [plan.work([length] * plan.sequences_per_step).flops for length, _ in stages]
    total, first = sum(num_steps * of_step for (_, num_steps), of_step in zip(stages, flops, strict=True)), 1
    for (length, num_steps), of_step in zip(stages, flops, strict=True):
        yield (
            f"  steps {first:,} to {first + num_steps - 1:,}: {length:,} tokens per sequence, "
            f"{plan.sequences_per_step * length:,} per step; {of_step / 1e15:.3g} PFLOP per step, "
            f"{num_steps * of_step / total:.0%} of all steps' FLOPs"
        )
        first += num_steps


def _hardware(plan: Plan) -> str:
    """Whose memory and kernels the explanation is of."""
    gpu, other = plan.config.explain_gpu, "explain_gpu=h100 launch.num_ranks=64 explains 64 H100s instead"
    if not gpu and plan.on_gpu:
        return f"hardware: the GPUs here; {other}"
    if not gpu:
        shared = memory.gib((plan.memory_bytes or 0) * plan.ranks_per_host)
        return f"hardware: the CPU here, whose {shared} GiB {plan.ranks_per_host} ranks share; {other}"
    return (
        f"hardware: {plan.num_ranks} x {plan.device_name}, {plan.ranks_per_host} per host, which need not be here "
        f"(explain_gpu={gpu}); kernels are chosen from the packages installed here"
    )


def refusal_lines(plan: Plan) -> list[str]:
    """Why a run of this plan is refused; nothing if it starts."""
    return ["", *f"a run is refused: {plan.refusal}".splitlines()] if plan.refusal else []


def state_lines(plan: Plan) -> list[str]:
    """Memory of the training states."""
    available = "" if plan.memory_bytes is None else f" of {memory.gib(plan.memory_bytes)} GiB, the memory of one rank"
    return [
        "weights, gradients and optimizer states per rank: a lower bound, without activations and buckets",
        f"  {plan.state}{available}",
    ]


def step_memory_lines(plan: Plan) -> list[str]:
    """The memory timeline of a step, and the longest sequence that fits."""
    if plan.config.recipe in WITHOUT_MODEL:
        return []
    step = plan.step_memory
    if step.unsupported:
        return [f"memory of a step: {step.unsupported}"]
    lines = [*timeline_lines(step), "  workspaces inside other kernels are not counted"]
    if plan.memory_bytes is None:
        return lines
    recompute = plan.config.engine.recompute
    for trial in ("none", "selective") if recompute == "none" else (recompute,):
        trial_step = dataclasses.replace(step, config=memory.changed(plan.config, **{"engine.recompute": trial}))
        longest = trial_step.longest_length(plan.memory_bytes)
        fits = f"sequences of {longest:,} tokens" if longest else "no sequence"
        lines.append(f"  {memory.gib(plan.memory_bytes)} GiB hold {fits} with engine.recompute={trial}")
    return lines


def timeline_lines(step: StepMemory) -> list[str]:
    """The peak by part, and the other points."""
    peak = step.peak
    return [
        f"memory of a step, per rank: peak {memory.gib(peak.total)} GiB, at: {peak.name}",
        *(f"  {memory.gib(size):>8} GiB  {name}" for name, size in peak.parts.items()),
        *(f"  {memory.gib(point.total):>8} GiB at: {point.name}" for point in step.timeline if point.name != peak.name),
    ]


def _data(plan: Plan) -> str:
    config = plan.config
    if config.recipe == "evaluate":
        return _evaluated(config)
    num_steps = 1 if config.data.overfit_one_batch else config.num_steps
    return describe(config.data, plan.tokens_of_steps(1, num_steps))


def _evaluated(config: Config) -> str:
    asked = config.evaluate
    lengths = ", ".join(format(length, ",") for length in asked.lengths or [config.data.sequence_length])
    retrieval = [task for task in asked.tasks if task != LOSS_TASK]
    parts = []
    if LOSS_TASK in asked.tasks:
        parts.append(f"loss by position, data={config.data.source}, at {config.data.sequence_length:,} tokens")
    if retrieval:
        parts.append(f"{', '.join(retrieval)} x {asked.depths} depths x {asked.samples} samples, at {lengths} tokens")
    return "; ".join(parts)


def _evaluation_while_training(config: Config) -> str:
    return f"every {config.evaluate.every_n_steps:,} steps: {_evaluated(config)}"


def _ranks(plan: Plan) -> str:
    always = ("data", "ring") if plan.config.parallelism.method == "sequence" else ("data", "tensor", "pipeline")
    degrees = plan.degrees._asdict().items()
    grid = " x ".join(f"{degree} {name}" for name, degree in degrees if name in always or degree > 1)
    unsharded = plan.degrees.sequence == plan.degrees.tensor == 1
    return f"{grid}, on {plan.device_name}" + ("; each rank has whole sequences" if unsharded else "")


def _attention(plan: Plan) -> str:
    chosen = " (chosen by forecast: explain=true shows it)" if plan.candidates else ""
    if plan.degrees.sequence == 1:
        return f"local{chosen}"
    text, carrier = f"{plan.method}, layout {plan.config.attention.layout}{chosen}", "NCCL" if plan.on_gpu else "gloo"
    if not plan.has_ring:
        return f"{text}, over {carrier}"
    if plan.transport == "copy_engine":
        carrier = "symmetric memory" + ("" if plan.degrees.sequence <= plan.ranks_per_host else f" and {carrier}")
    return f"{text}, transport {plan.transport} over {carrier}"


def _memory_savers(plan: Plan) -> Iterator[tuple[str, str]]:
    """What is computed by tiles, and what lies on the host."""
    config, engine, tokens = plan.config, plan.config.engine, plan.local_tokens
    of_all = f"at a time, of {tokens:,} per rank and micro-batch"
    if tile := memory.tile_tokens(config, tokens):
        yield "loss", f"logits of {tile:,} tokens {of_all}"
    if tile := memory.mlp_tile_tokens(config, tokens):
        reason = f"engine.tile_tokens={engine.tile_tokens}"
        if engine.tile_tokens is None:
            reason = f"all at once would need {memory.gib(memory.mlp_bytes(config) * tokens)} GiB with their gradients"
        yield "MLP", f"hidden activations of {tile:,} tokens {of_all} ({reason})"
    if engine.offload_parameters:
        yield "offload", "weights on the host, copied to the device when used"
    if plan.trains and engine.offload_optimizer:
        yield "offload", "optimizer states and the optimizer step on the host"
    if plan.trains and engine.offload_activations:
        what = "layer inputs" + (" and attention outputs" if engine.recompute == "selective" else "")
        size, ranks = memory.offloaded_bytes(config, tokens), plan.ranks_per_host
        moved = f"{memory.gib(size)} GiB of host memory per rank, {memory.gib(ranks * size)} per host ({ranks} ranks)"
        yield "offload", f"{what} of a micro-batch: {moved}"


def _step_time(plan: Plan) -> list[str]:
    """The forecast of a step, by parts."""
    parts = plan.step_time.parts
    counted = "" if kind_of(plan.device_name, 0) else f", which is what {plan.device_name}, not known, counts as"
    return [
        f"estimated time of a step in which each sequence is one document: {parts.total:.4g} s, "
        f"{plan.step_time.tokens_per_s:,.0f} tokens/s",
        f"  on {plan.cluster}{counted}",
        *(
            f"  {1e3 * seconds:>12,.3f} ms  {seconds / parts.total:>5.1%}  {name}"
            for name, seconds in sorted(parts, key=lambda part: -part[1])
            if seconds
        ),
    ]


def _candidates(plan: Plan) -> list[str]:
    """How attention=auto has chosen."""
    return [
        f"attention=auto: the estimated time of a step by each split of a sequence's ranks, in ms; "
        f"{plan.ranks_per_host} ranks per host; the fastest is taken",
        *(f"  {_candidate(step)}" for step in plan.candidates),
    ]


def _candidate(step: StepTime) -> str:
    parts = step.parts
    shown = (("attention", parts.attention), ("messages", parts.messages), ("host", parts.host))
    return (
        f"{step.method}, ring {step.degrees.ring} x ulysses {step.degrees.ulysses}: "
        f"{', '.join(f'{name} {1e3 * seconds:.3f}' for name, seconds in shown)}; total {1e3 * parts.total:.3f} ms"
    )


def _ring_work(plan: Plan) -> list[str]:
    """What ring ranks compute and send in one layer's attention."""
    layout, model, engine = plan.layout, plan.config.model, plan.config.engine
    chunks = f"r and {layout.num_chunks - 1}-r" if layout.chunks_per_ring_rank == 2 else "r"
    held = f"{layout.num_chunks} chunks of {layout.chunk_length:,} tokens, {chunks} on ring rank r"
    if layout.name == "balanced":
        held = "short documents whole on one rank, long ones over several"
    documents = " of one document a sequence" if plan.config.data.document_mask else ""  # packed ones have fewer pairs
    lines = [
        f"layout {layout.name}: {held}; in one layer's attention of one micro-batch{documents}:",
        *_equal_ranks([_run_lengths(f"{pairs / 1e6:.3f}" for pairs in work) for work in work_per_rank(layout)]),
        f"  imbalance (lockstep time / mean rank's time) {imbalance(layout):.3f}",
    ]
    if plan.method in ("ring", "hybrid"):
        kv_per_token = 2 * model.num_kv_heads // plan.degrees.ulysses * model.head_dim * engine.micro_batch_size
        mib_per_token = kv_per_token * memory.dtype_bytes(plan.config) / 2**20
        gradient_mib_per_token = kv_per_token * plan.step_time.attention(CAUSAL).gradient_size / 2**20
        sent = [tokens_sent(layout, CAUSAL, ring_rank) for ring_rank in range(layout.ring_degree)]
        forward_mib = [keys * mib_per_token for keys, _ in sent]
        backward_mib = [keys * mib_per_token + gradients * gradient_mib_per_token for keys, gradients in sent]
        lines.append(
            f"  a ring rank sends {min(forward_mib):.2f} to {max(forward_mib):.2f} MiB forward, "
            f"{min(backward_mib):.2f} to {max(backward_mib):.2f} MiB backward"
        )
    return lines


def _run_lengths(texts: Iterable[str]) -> str:
    """1 1 1 2 -> "1 x 3, 2"."""
    runs = [(text, len(list(equal))) for text, equal in itertools.groupby(texts)]
    return ", ".join(f"{text} x {count}" if count > 1 else text for text, count in runs)


def _equal_ranks(work: list[str]) -> list[str]:
    """A line for each run of ring ranks with equal work; of many lines the first and the last."""
    lines, ring_rank = [], 0
    for text, equal in itertools.groupby(work):
        last = ring_rank + len(list(equal)) - 1
        ranks = f"rank {last}" if last == ring_rank else f"ranks {ring_rank}-{last}"
        lines.append(f"  ring {ranks}: million query-key pairs by ring step: {text}")
        ring_rank = last + 1
    half = MAX_RANK_LINES // 2
    if left_out := len(lines[half:-half]):
        lines[half:-half] = [f"  ... {left_out} more ring ranks"]
    return lines
