"""The gradient parity gate: training through the real engine against one process, cell by cell.

`python -m tests.distributed.parity` prints the full table, and `--json FILE` also writes it to a file. `test_parity.py`
runs a covering subset. A cell trains 3 steps, with different numbers of valid labels on each rank. It compares the loss
and gradient norm of every step, all gradients of the first step, and all parameters after the third, with clipping. The
error is ||a - b|| / ||b|| per tensor.

- fp32: the error against fp64 in one process is at most 1e-5.
- bf16: the error against fp64 (from the same rounded weights) is at most 1.5 times that of bf16 in one process, per
  tensor, over all layers together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conf.schema import (
    AttentionConfig,
    Config,
    DataConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelismConfig,
)
from data.shard import IGNORED_LABEL, TokenBatch, restarted
from recipes.model.pretrained import resolve
from recipes.model.transformer import Transformer
from recipes.planning.plan import DTYPES, Plan
from ring_attention import LocalAttention
from tests.pool import WorkerPool, parallel_groups
from tests.tools.measure import relative_error

NUM_STEPS = 3
FP32_LIMIT = 1e-5
HALF_RATIO_LIMIT = 1.5
# a ratio of two scalars' errors is noise, so these have their own limits: a few bf16 roundings of 4e-3
HALF_LOSS_LIMIT = 1e-3
HALF_NORM_LIMIT = 1e-2
# one matrix (the MLP's up) is large enough for ZeRO-3 to partition; it keeps the others unsharded between steps
MODELS = {
    "llama": ModelConfig(num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=1024),
    "gpt": ModelConfig(
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        mlp_size=2048,
        mlp="gelu",
        norm="layernorm",
        bias=True,
        tied_head=True,
    ),
}
MODELS["deep"] = replace(MODELS["llama"], num_layers=5)
MODELS["mha"] = replace(MODELS["llama"], num_kv_heads=4)
CLIPPING = {"llama": 0.5, "gpt": 0.0, "deep": 0.5, "mha": 0.5}  # below the norms that occur, so it clips; 0 is off
# Adam's eps is large, so that an update is a smooth function of the gradient. At 1e-8, an element whose gradient is
# only rounding error moves by lr in a random direction: fp32 on one rank is 7e-5 away from fp64 after 3 steps too.
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_fraction=0.0, eps=1e-2)


@dataclass(frozen=True)
class Cell:
    dtype: str
    zero_stage: int
    ring_degree: int
    data_degree: int
    accumulation_steps: int
    length: int  # 32 is a multiple of 2P for all ring degrees; 29 needs padding
    layout: str = "zigzag"
    model: str = "llama"
    method: str = "ring"
    ulysses_degree: int = 1
    tensor_degree: int = 1
    pipeline_degree: int = 1
    transport: str = "p2p"
    recompute: str = "none"
    tile_tokens: int = 0
    offload_activations: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    path: str = ""  # of a Hugging Face model, in place of `model`
    lora_rank: int = 0
    packed: bool = False  # several documents in a sequence

    @property
    def micro_batch_size(self) -> int:
        return 1 if self.layout == "balanced" else 2

    @property
    def num_ranks(self) -> int:
        sequence_ranks = self.ring_degree * self.ulysses_degree
        return sequence_ranks * self.data_degree * self.tensor_degree * self.pipeline_degree

    @property
    def attention_method(self) -> str:
        return "local" if self.method in ("tp_pp", "dp") else self.method

    @property
    def plan(self) -> Plan:
        """The launcher's plan on a rank of the pool. Only the device's type matters: the CPU refuses some settings."""
        device = "cuda" if torch.cuda.is_available() else "cpu"  # no CPU rank of a pool sees a GPU
        config = resolve(
            Config(
                model=ModelConfig(path=self.path) if self.path else MODELS[self.model],
                lora=LoraConfig(self.lora_rank),
                attention=AttentionConfig(method=self.attention_method, layout=self.layout, transport=self.transport),
                parallelism=ParallelismConfig(
                    "tensor_pipeline" if self.method == "tp_pp" else "sequence",
                    self.data_degree,
                    self.ring_degree,
                    self.ulysses_degree,
                    self.tensor_degree,
                    self.pipeline_degree,
                ),
                engine=EngineConfig(
                    dtype=self.dtype,
                    zero_stage=self.zero_stage,
                    micro_batch_size=self.micro_batch_size,
                    gradient_accumulation_steps=self.accumulation_steps,
                    gradient_clipping=CLIPPING[self.model],
                    recompute=self.recompute,
                    tile_tokens=self.tile_tokens,
                    offload_activations=self.offload_activations,
                    offload_optimizer=self.offload_optimizer,
                    offload_parameters=self.offload_parameters,
                ),
                optimizer=OPTIMIZER,
                data=DataConfig(sequence_length=self.length, document_mask=self.packed),
                num_steps=NUM_STEPS,
            )
        )
        return Plan(config, self.num_ranks, device, device, None, ranks_per_host=self.num_ranks)


def full_table(device: str) -> list[Cell]:
    """All cells for a device type; on GPUs also with the copy engine transport."""
    cells = [
        Cell(dtype, stage, ring, data, accumulation, length)
        for ring, data, dtype, stage, accumulation, length in itertools.product(
            (1, 2, 4), (1, 2), ("fp32", "bf16"), (0, 1, 2, 3), (1, 2), (32, 29)
        )
    ]
    cells += [
        # Ulysses shards key-value heads
        Cell(dtype, stage, ring, 1, accumulation, length, method=method, ulysses_degree=ulysses, model=model)
        for (method, ring, ulysses, model), dtype, stage, (accumulation, length) in itertools.product(
            (
                ("ulysses", 1, 2, "llama"),
                ("ulysses", 1, 4, "mha"),
                ("hybrid", 2, 2, "llama"),
                ("all_gather", 2, 1, "llama"),
                ("all_gather", 4, 1, "llama"),
            ),
            ("fp32", "bf16"),
            (0, 1, 2, 3),
            ((1, 29), (2, 32)),
        )
    ]
    cells += [Cell("fp32", stage, 1, data, 1, 29, method="dp") for stage in (0, 1, 2, 3) for data in (2, 4)]
    cells += [
        Cell(
            dtype,
            1,
            1,
            data,
            accumulation,
            length,
            model=model,
            method="tp_pp",
            tensor_degree=tensor,
            pipeline_degree=pipeline,
        )
        for (data, tensor, pipeline), dtype, (accumulation, length), model in itertools.product(
            ((1, 2, 1), (1, 1, 2), (1, 2, 2), (2, 2, 1), (2, 1, 2), (2, 2, 2)),
            ("fp32", "bf16"),
            ((3, 32), (1, 29)),
            ("llama", "gpt"),
        )
    ]
    if device == "cuda":
        cells += [
            replace(cell, transport="copy_engine")
            for cell in cells
            if cell.method in ("ring", "hybrid") and cell.ring_degree > 1 and cell.data_degree == 1
        ]
    return sorted(cells, key=lambda cell: cell.num_ranks)


@dataclass
class Trained:
    """The results of one training run, on the CPU."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


def batches(cell: Cell) -> tuple[Tensor, Tensor]:
    """Tokens and labels [step, micro-batch, data rank, B, L]; each sequence ignores labels at its own rate."""
    generator = torch.Generator().manual_seed(7)
    shape = (NUM_STEPS, cell.accumulation_steps, cell.data_degree, cell.micro_batch_size, cell.length)
    tokens = torch.randint(0, 257, (*shape[:-1], cell.length + 1), generator=generator)
    dropped = torch.rand(shape, generator=generator) < torch.rand((*shape[:-1], 1), generator=generator)
    return tokens[..., :-1], tokens[..., 1:].masked_fill(dropped, IGNORED_LABEL)


def documents(cell: Cell) -> list[list[tuple[tuple[int, ...], ...]]]:
    """Boundaries of the documents of each row [step][micro-batch and data rank][B]; most rows end with padding."""
    generator, all_steps = torch.Generator().manual_seed(11), []
    for _ in range(NUM_STEPS):
        all_steps.append([])
        for _ in range(cell.accumulation_steps * cell.data_degree):
            rows = []
            for _ in range(cell.micro_batch_size):
                num_documents = int(torch.randint(1, 5, (), generator=generator))
                ends = torch.randperm(cell.length - 4, generator=generator)[:num_documents] + 1
                padding = int(torch.randint(0, 4, (), generator=generator))
                rows.append((0, *sorted(ends.tolist()), cell.length - padding))
            all_steps[-1].append(tuple(rows))
    return all_steps


def without_ends(labels_BL: Tensor, rows: tuple[tuple[int, ...], ...]) -> Tensor:
    """Labels without those at the end of a document and on padding."""
    labels_BL = labels_BL.clone()
    for labels_L, boundaries in zip(labels_BL, rows, strict=True):
        labels_L[[end - 1 for end in boundaries[1:]]] = IGNORED_LABEL
        labels_L[boundaries[-1] :] = IGNORED_LABEL
    return labels_BL


class EagerModel(nn.Module):
    """A Hugging Face model without any of the recipe's code, with the interface of `Transformer`."""

    def __init__(self, path: str, compute_dtype: torch.dtype) -> None:
        super().__init__()
        # transformers has more ways to compute experts; they round differently, so that in half precision both take
        # the default, which fp64 does not have
        experts = {} if compute_dtype in (torch.bfloat16, torch.float16) else {"experts_implementation": "eager"}
        self.model = AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager", dtype=torch.float32, **experts
        )

    def forward(self, tokens: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits.flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


def alone(rows: tuple[tuple[int, ...], ...], model: nn.Module, tokens_BL: Tensor, labels_BL: Tensor) -> Tensor:
    """The sum of the losses of documents that the model sees one by one."""
    total = []
    for tokens_L, labels_L, boundaries in zip(tokens_BL, labels_BL, rows, strict=True):
        for start, stop in itertools.pairwise(boundaries):
            positions = torch.arange(stop - start, device=tokens_L.device)
            total.append(model(tokens_L[None, start:stop], positions[None], labels_L[None, start:stop]))
    return torch.stack(total).sum()


def make_model(cell: Cell, kernel: str, compute_dtype: torch.dtype = torch.float64) -> nn.Module:
    if cell.path:
        return EagerModel(cell.path, compute_dtype)
    return Transformer(MODELS[cell.model], LocalAttention(kernel), seed=0)


def initial_weights(cell: Cell, drawn_on: str) -> dict[str, Tensor]:
    """The engine's initial weights in fp64, rounded as DeepSpeed rounds them."""
    with torch.device(drawn_on):
        model = make_model(cell, "reference")
    return {name: weight.cpu() for name, weight in model.to(DTYPES[cell.dtype]).double().state_dict().items()}


def train_one_process(cell: Cell, compute_dtype: torch.dtype, device: str, drawn_on: str) -> Trained:
    """Plain PyTorch with fp64 master weights, computing in `compute_dtype`; fp16 has a constant loss scale.

    Args:
        drawn_on: the device type on which the ranks draw their weights.
    """
    kernel = "reference" if compute_dtype == torch.float64 else "auto"
    loss_scale = 1024 if compute_dtype == torch.float16 else 1
    master = make_model(cell, kernel).double().to(device)
    worker = make_model(cell, kernel, compute_dtype).to(device, compute_dtype)
    master.load_state_dict(initial_weights(cell, drawn_on))
    embeddings = ("embedding.weight", "embed_tokens.weight")
    not_decayed = [p for name, p in master.named_parameters() if p.dim() < 2 or name.endswith(embeddings)]
    decayed = [p for name, p in master.named_parameters() if p.dim() >= 2 and not name.endswith(embeddings)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": not_decayed, "weight_decay": 0.0}],
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.eps,
    )
    tokens, labels = (tensor.flatten(1, 2).to(device) for tensor in batches(cell))
    rows = documents(cell)
    if cell.packed:
        labels = torch.stack(
            [torch.stack([*map(without_ends, step, boundaries)]) for step, boundaries in zip(labels, rows, strict=True)]
        )
    positions = torch.arange(cell.length, device=device).unsqueeze(0)
    trained = Trained([], [], {}, {})
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:  # the cosine schedule from lr to lr / 10
            group["lr"] = OPTIMIZER.lr * (1.0, 0.55, 0.1)[step]
        worker.load_state_dict(master.state_dict())
        num_valid = (labels[step] != IGNORED_LABEL).sum()
        loss_sum = 0.0
        optimizer.zero_grad()
        for index, (micro_tokens, micro_labels) in enumerate(zip(tokens[step], labels[step], strict=True)):
            worker.zero_grad()
            if cell.packed:
                loss = alone(rows[step][index], worker, micro_tokens, micro_labels)
            else:
                loss = worker(micro_tokens, positions, micro_labels)
            loss_sum += loss.item()
            (loss * loss_scale / num_valid).backward()
            for target, source in zip(master.parameters(), worker.parameters(), strict=True):
                assert source.grad is not None
                target.grad = source.grad.double() / loss_scale + (0 if target.grad is None else target.grad)
        trained.losses.append(loss_sum / num_valid.item())
        if step == 0:
            trained.gradients = {n: p.grad.cpu().clone() for n, p in master.named_parameters() if p.grad is not None}
        clipping = CLIPPING[cell.model] or float("inf")
        trained.grad_norms.append(torch.nn.utils.clip_grad_norm_(master.parameters(), clipping).item())
        optimizer.step()
    trained.parameters = {name: parameter.detach().cpu() for name, parameter in master.named_parameters()}
    return trained


def train_on_ranks(cell: Cell) -> Trained:
    """On one rank: the same training through the engine that the recipe builds."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from recipes.engine.build import build_engine

    plan = cell.plan
    layout, pipelined = plan.layout, cell.method == "tp_pp"
    groups = None if pipelined else parallel_groups(plan.degrees.data, plan.degrees.sequence)
    engine = build_engine(plan, groups)
    parameters = {one_process_name(name): parameter for name, parameter in engine.model.named_parameters()}
    trained = Trained([], [], {}, {})
    update = engine.deepspeed._take_model_step

    def record_gradients_and_update(*args: Any) -> None:
        if not trained.gradients:
            wrapper: Any = engine.deepspeed.optimizer
            loss_scale = wrapper.loss_scale if cell.dtype == "fp16" else 1
            trained.gradients = {
                name: full.cpu() / loss_scale
                for name, parameter in parameters.items()
                if (full := safe_get_full_grad(parameter)) is not None
            }
        update(*args)

    engine.deepspeed._take_model_step = record_gradients_and_update  # pyright: ignore[reportAttributeAccessIssue]
    tokens, labels = (tensor[:, :, engine.data_rank] for tensor in batches(cell))
    for step in range(NUM_STEPS):
        micro_batches = []
        for index, (micro_tokens, micro_labels) in enumerate(zip(tokens[step], labels[step], strict=True)):
            rows = documents(cell)[step][index * cell.data_degree + engine.data_rank] if cell.packed else None
            if rows and cell.layout == "balanced":
                layout = replace(plan.layout, documents=rows[0])
            positions_BS = layout.positions(engine.sequence_rank).unsqueeze(0)
            if rows:
                micro_labels = without_ends(micro_labels, rows)
                positions_BS = torch.cat([restarted(positions_BS, boundaries) for boundaries in rows])
            micro_batches.append(
                TokenBatch(
                    layout.shard(micro_tokens, engine.sequence_rank, dim=1),
                    positions_BS,
                    layout.shard(micro_labels, engine.sequence_rank, dim=1, pad_value=IGNORED_LABEL),
                    rows,
                )
            )
        result = engine.train_step(micro_batches)
        trained.losses.append(result.loss.item())
        trained.grad_norms.append(float(result.grad_norm))
    masters = {}  # half precision on stage 0, where safe_get_full_fp32_param returns None
    if isinstance(wrapper := engine.deepspeed.optimizer, FP16_UnfusedOptimizer):
        halves, fulls = (itertools.chain(*groups) for groups in (wrapper.fp16_groups, wrapper.fp32_groups))
        masters = {id(half): full for half, full in zip(halves, fulls, strict=True)}
    for name, parameter in parameters.items():
        full = safe_get_full_fp32_param(parameter)
        full = masters.get(id(parameter), parameter) if full is None else full
        trained.parameters[name] = full.detach().cpu().clone()
    engine.close()
    if pipelined:
        return trained
    first = groups is not None and (groups.data_rank, groups.get_sequence_parallel_rank()) == (0, 0)
    return trained if first else Trained(trained.losses, trained.grad_norms, {}, {})


def one_process_name(name: str) -> str:
    """A parameter's name in `Transformer`. Pipeline stages number their modules, and layers start at 1."""
    part, _, rest = name.partition(".")
    if rest.startswith("layer."):
        return f"layers.{int(part) - 1}.{rest.removeprefix('layer.')}"
    return (
        name.removeprefix("tied_modules.").removeprefix("embedding.")
        if part == "tied_modules"
        else (rest if part.isdigit() else name)
    )


def tensor_shard(cell: Cell, tensor_rank: int, name: str, full: Tensor) -> Tensor:
    """The shard of a parameter on a tensor rank, written out for both models."""
    degree, model = cell.tensor_degree, MODELS[cell.model]
    if degree == 1:
        return full
    if "attention.qkv" in name:
        q, k, v = full.split([n * model.head_dim for n in (model.num_heads, model.num_kv_heads, model.num_kv_heads)])
        return torch.cat([matrix.chunk(degree)[tensor_rank] for matrix in (q, k, v)])
    if "mlp.up" in name:
        halves = full.chunk(2) if model.mlp == "swiglu" else (full,)
        return torch.cat([half.chunk(degree)[tensor_rank] for half in halves])
    if name.endswith(("attention.out.weight", "mlp.down.weight")):
        return full.chunk(degree, dim=1)[tensor_rank]
    return full


@dataclass
class Outcome:
    """Worst relative errors of a cell; for half precision also the worst ratio to one process, and of which tensor."""

    loss: float
    grad_norm: float
    gradient: float
    parameter: float
    half_ratio: float | None
    half_ratio_of: str
    seconds: float

    @property
    def passes(self) -> bool:
        if self.half_ratio is not None:
            scalars_pass = self.loss <= HALF_LOSS_LIMIT and self.grad_norm <= HALF_NORM_LIMIT
            return scalars_pass and self.half_ratio <= HALF_RATIO_LIMIT
        return max(self.loss, self.grad_norm, self.gradient, self.parameter) <= FP32_LIMIT


def errors(cell: Cell, ranks: list[Trained], expected: Trained) -> dict[str, float]:
    """Relative errors: of the loss and norm of each step, and of each tensor's gradient and final value."""
    found, got = {}, ranks[0]
    for step in range(NUM_STEPS):
        found[f"loss {step}"] = abs(got.losses[step] / expected.losses[step] - 1)
        found[f"norm {step}"] = abs(got.grad_norms[step] / expected.grad_norms[step] - 1)
    for number, rank in enumerate(ranks):
        for kind, own, full in (
            ("gradient", rank.gradients, expected.gradients),
            ("parameter", rank.parameters, expected.parameters),
        ):
            for name, tensor in own.items():
                part = tensor_shard(cell, number % cell.tensor_degree, name, full[name])
                label = f"{kind} {name}"
                found[label] = max(found.get(label, 0.0), relative_error(tensor, part))
    assert {name.partition(" ")[2] for name in found} >= set(expected.gradients), "no rank has some of the tensors"
    return found


def over_layers(found: dict[str, float]) -> dict[str, float]:
    """Each tensor's root mean square error over layers: a norm or bias of 64 numbers is too small for a ratio."""
    squares: dict[str, list[float]] = {}
    for name in sorted(found):
        if name.startswith(("gradient", "parameter")):
            squares.setdefault(re.sub(r"layers\.\d+", "layers", name), []).append(found[name] ** 2)
    return {name: (sum(values) / len(values)) ** 0.5 for name, values in squares.items()}


@cache
def one_process(key: Cell, compute_dtype: torch.dtype, device: str, drawn_on: str) -> Trained:
    return train_one_process(key, compute_dtype, device, drawn_on)


def run_cell(pool: WorkerPool, cell: Cell) -> Outcome:
    started = time.perf_counter()
    # one process gives the same result for all of these
    key = replace(
        cell,
        zero_stage=0,
        ring_degree=1,
        ulysses_degree=1,
        tensor_degree=1,
        pipeline_degree=1,
        layout="balanced" if cell.layout == "balanced" else "zigzag",
        method="ring",
        transport="p2p",
        recompute="none",
        tile_tokens=0,
        offload_activations=False,
        offload_optimizer=False,
        offload_parameters=False,
    )
    expected = one_process(key, torch.float64, "cpu", pool.device)
    ranks = pool.run(train_on_ranks, cell, num_ranks=cell.num_ranks)
    assert all(rank.losses == ranks[0].losses for rank in ranks), "ranks disagree on the loss"
    found = errors(cell, ranks, expected)

    def worst(kind: str) -> float:
        return max(value for name, value in found.items() if name.startswith(kind))

    ratio, worst_ratio = None, ""
    if cell.dtype != "fp32":
        alone = errors(key, [one_process(key, DTYPES[cell.dtype], pool.device, pool.device)], expected)
        own, of_one = over_layers(found), over_layers(alone)
        ratio, worst_ratio = max((own[name] / of_one[name], name) for name in own)
    seconds = time.perf_counter() - started
    return Outcome(worst("loss"), worst("norm"), worst("gradient"), worst("parameter"), ratio, worst_ratio, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The full parity table: on all GPUs with NCCL if there are several, else on the CPU with gloo."
    )
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--ranks", type=int, default=8, help="skip cells that need more ranks")
    parser.add_argument("--least-ranks", type=int, default=1, help="skip cells that need fewer ranks")
    parser.add_argument(
        "--part",
        type=int,
        nargs=2,
        default=(0, 1),
        metavar=("N", "OF"),
        help="run only cells N, N + OF, ...",
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
    most_ranks = min(options.ranks, torch.cuda.device_count()) if device == "cuda" else options.ranks
    pool, rows = WorkerPool(device), []
    print("method     transport   dtype zero ring uly ten pip data accum    L |", end="")
    print("    loss    norm  gradient parameter  bf16 ratio |")
    cells = [cell for cell in full_table(device) if options.least_ranks <= cell.num_ranks <= most_ranks]
    for cell in cells[options.part[0] :: options.part[1]]:
        outcome = run_cell(pool, cell)
        ratio = "" if outcome.half_ratio is None else f"{outcome.half_ratio:.2f}"
        print(
            f"{cell.method:10} {cell.transport:11} {cell.dtype:5} {cell.zero_stage:4} {cell.ring_degree:4} "
            f"{cell.ulysses_degree:3} {cell.tensor_degree:3} {cell.pipeline_degree:3} {cell.data_degree:4} "
            f"{cell.accumulation_steps:5} {cell.length:4} | {outcome.loss:.1e} {outcome.grad_norm:.1e}   "
            f"{outcome.gradient:.1e}   {outcome.parameter:.1e} {ratio:>11} | {'ok' if outcome.passes else 'FAILED'}",
            flush=True,
        )
        rows.append({**asdict(cell), **asdict(outcome), "passes": outcome.passes})
    pool.close()
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
                    "torch": torch.__version__,
                    "cells": rows,
                },
                indent=1,
            )
        )
    failed = sum(not row["passes"] for row in rows)
    print(f"{len(rows)} cells, {failed} failed")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
