"""RingTrainer on several ranks against transformers' Trainer in one process: losses, weights, evaluation and counts."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ring_attention import LocalAttention, hf
from tests.errors import names
from tests.pool import WorkerPool

NUM_STEPS, ROWS = 5, 2  # more than an epoch; rows of a micro-batch in all ranks
LOSS_LIMIT, WEIGHT_LIMIT = 1e-6, 3e-6


def dataset(num_rows: int, seed: int) -> list[dict[str, list[int]]]:
    """Rows of different lengths, of which the first tokens have no label."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in torch.randint(40, 90, (num_rows,), generator=generator).tolist():
        ids = torch.randint(6, 2048, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [hf.IGNORED_LABEL] * (length // 4) + ids[length // 4 :]})
    return rows


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    length = max(len(row["input_ids"]) for row in rows)

    def stacked(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in values])

    return {
        "input_ids": stacked([row["input_ids"] for row in rows], 2),
        "labels": stacked([row["labels"] for row in rows], hf.IGNORED_LABEL),
        "attention_mask": stacked([[1] * len(row["input_ids"]) for row in rows], 0),
    }


def reset_accelerate() -> None:
    """A pool's processes run many trainers; accelerate, transformers and DeepSpeed keep an earlier one's settings."""
    import deepspeed.utils.groups
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    deepspeed.utils.groups.mpu = None
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"])


def arguments(rows: int, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_first_step": True,
        "include_num_input_tokens_seen": "non_padding",
        "max_steps": NUM_STEPS,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "optim": "sgd",  # Adam would hide a wrong scale of the gradients
        "learning_rate": 0.5,
        "max_grad_norm": 0.7,
        "eval_strategy": "steps",
        "eval_steps": NUM_STEPS,
        **settings,
    }


def zero(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
    }


def weights(model: Any) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def result(trainer: Any) -> dict[str, Any]:
    trainer.train()
    history = trainer.state.log_history
    last = {name: value for entry in history for name, value in entry.items()}
    return {
        "losses": [entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry],
        "grad_norms": [entry["grad_norm"] for entry in history if "grad_norm" in entry],
        "total_flos": last["total_flos"],
        "counts": [last["num_input_tokens_seen"], last["epoch"], trainer.get_total_train_batch_size(trainer.args)],
        "weights": weights(trainer.model),
    }


def trained(folder: Path, data_degree: int, settings: dict[str, Any], is_ring: bool = True) -> dict[str, Any]:
    """5 steps of rows, `ROWS` in each micro-batch however many ranks there are, and an evaluation of 5 rows."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from ring_attention.trainer import RingTrainer

    reset_accelerate()
    hf.register()
    args = TrainingArguments(**arguments(ROWS // data_degree, **settings))
    implementation = "ring" if is_ring else "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation, dtype=torch.float32)
    kind: Any = functools.partial(RingTrainer, sequence_degree=dist.get_world_size() // data_degree)
    rows: dict[str, Any] = {"train_dataset": dataset(10, 0), "eval_dataset": dataset(5, 1)}
    return result((kind if is_ring else Trainer)(model, args, **rows, data_collator=padded))


@pytest.fixture(scope="module")
def one_process(pool: WorkerPool, tiny_llama: Path) -> dict[str, Any]:
    """transformers' Trainer with eager attention."""
    return pool.run(trained, tiny_llama, 1, {}, False, num_ranks=1)[0]


def check(
    found: list[dict[str, Any]],
    expected: dict[str, Any],
    loss_limit: float = LOSS_LIMIT,
    weight_limit: float = WEIGHT_LIMIT,
) -> None:
    for rank in found:
        assert rank["counts"] == expected["counts"]
        assert rank["losses"] == pytest.approx(expected["losses"], rel=loss_limit)
        assert rank["grad_norms"] == pytest.approx(expected["grad_norms"], rel=10 * loss_limit)
        errors = {
            name: ((w - expected["weights"][name]).norm() / w.norm()).item() for name, w in rank["weights"].items()
        }
        assert max(errors.values()) < weight_limit, errors
        assert errors.keys() == expected["weights"].keys()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("num_ranks", "data_degree"),
    [pytest.param(1, 1, marks=SLOW), (2, 1), pytest.param(2, 2, marks=SLOW), pytest.param(4, 2, marks=SLOW)],
)
def test_distributed_data_parallel_equals_one_process(
    pool: WorkerPool, tiny_llama: Path, one_process: dict[str, Any], num_ranks: int, data_degree: int
):
    found = pool.run(trained, tiny_llama, data_degree, {}, num_ranks=num_ranks)
    check(found, one_process)
    if data_degree == 1:  # else rows are padded less
        assert found[0]["total_flos"] == one_process["total_flos"]


@pytest.mark.parametrize("stage", [pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), 3])
@pytest.mark.parametrize(("num_ranks", "data_degree"), [(2, 1), pytest.param(4, 2, marks=SLOW)])
def test_zero_equals_one_process(
    pool: WorkerPool, tiny_llama: Path, one_process: dict[str, Any], num_ranks: int, data_degree: int, stage: int
):
    settings = {"deepspeed": zero(stage)}
    check(pool.run(trained, tiny_llama, data_degree, settings, num_ranks=num_ranks), one_process)


@SLOW
def test_autocast_and_checkpointing_equal_one_process_up_to_rounding(pool: WorkerPool, tiny_llama: Path):
    settings = {"bf16": True, "gradient_checkpointing": True}
    (expected,) = pool.run(trained, tiny_llama, 1, settings, False, num_ranks=1)
    check(pool.run(trained, tiny_llama, 1, settings, num_ranks=2), expected, loss_limit=2e-3, weight_limit=5e-3)


def fine_tuned(folder: Path, data_degree: int, is_ring: bool) -> dict[str, Any]:
    """3 steps of TRL's SFTTrainer on packed documents."""
    import torch.distributed as dist
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from ring_attention.trainer import RingTrainerMixin

    class RingSFTTrainer(RingTrainerMixin, SFTTrainer):
        pass

    reset_accelerate()
    hf.register()
    settings = {"max_steps": 3, "packing": True, "max_length": 128, "eval_strategy": "no", "bf16": False}
    args = SFTConfig(**arguments(ROWS // data_degree, **settings))
    implementation = "ring" if is_ring else "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation, dtype=torch.float32)
    kind: Any = functools.partial(RingSFTTrainer, sequence_degree=dist.get_world_size() // data_degree)
    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in dataset(40, 0)])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return result((kind if is_ring else SFTTrainer)(model, args, train_dataset=rows, processing_class=tokenizer))


@pytest.mark.parametrize(("num_ranks", "data_degree"), [(2, 1), pytest.param(4, 2, marks=SLOW)])
def test_trl_on_packed_documents_equals_one_process(
    pool: WorkerPool, tiny_llama: Path, num_ranks: int, data_degree: int
):
    pytest.importorskip("trl")
    (expected,) = pool.run(fine_tuned, tiny_llama, 1, False, num_ranks=1)
    check(pool.run(fine_tuned, tiny_llama, data_degree, True, num_ranks=num_ranks), expected)


# of TrainingArguments and of RingTrainer, with what the message must name
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("label_smoothing_factor", {"label_smoothing_factor": 0.1}, {}),
    ("neftune_noise_alpha", {"neftune_noise_alpha": 5.0}, {}),
    ("torch_compile", {"torch_compile": True}, {}),
    ("average_tokens_across_devices=False", {"average_tokens_across_devices": False}, {}),
    ("train_sampling_strategy='group_by_length'", {"train_sampling_strategy": "group_by_length"}, {}),
    ("split_batches=True", {"accelerator_config": {"split_batches": True}}, {}),
    ("dispatch_batches=True", {"accelerator_config": {"dispatch_batches": True}}, {}),
    ("even_batches=False", {"accelerator_config": {"even_batches": False}}, {}),
    ("compute_metrics", {}, {"compute_metrics": len}),
    ("preprocess_logits_for_metrics", {}, {"preprocess_logits_for_metrics": max}),
    ("compute_loss_func", {}, {"compute_loss_func": max}),
    ("sequence_degree=2", {}, {"sequence_degree": 2}),
    ("sequence_degree='2'", {}, {"sequence_degree": "2"}),
    ("attention=", {}, {"sequence_degree": 1, "attention": LocalAttention("auto")}),
    ("attention='ring'", {}, {"attention": "ring"}),
    ("evaluate()", {}, {}),  # only predict is wrong
]


def messages(folder: Path) -> list[str]:
    from transformers import AutoModelForCausalLM, TrainingArguments

    from ring_attention.trainer import RingTrainer

    hf.register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="ring", dtype=torch.float32)
    rows: Any = dataset(2, 1)
    found = []
    for _, settings, options in REFUSED:
        reset_accelerate()
        args = TrainingArguments(**arguments(ROWS, **settings))
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # the test looks at the message
            RingTrainer(model, args, train_dataset=rows, eval_dataset=rows, data_collator=padded, **options).predict(
                rows
            )
        found.append(str(caught.value))
    return found


def test_what_would_be_wrong_is_refused_in_one_line(pool: WorkerPool, tiny_llama: Path):
    (found,) = pool.run(messages, tiny_llama, num_ranks=1)
    for (named, _, _), message in zip(REFUSED, found, strict=True):
        names(message, named)
        assert "\n" not in message


def flattened(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """All rows as documents of one."""
    names = ("input_ids", "labels")
    batch = {name: torch.tensor([[token for row in rows for token in row[name]]]) for name in names}
    return {**batch, "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None]}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return iter(dataset(5, 1))


def evaluation_messages(folder: Path) -> list[str]:
    """On 2 data ranks: of a flattened last step that rows fill up, and of a dataset without a length."""
    from transformers import AutoModelForCausalLM, TrainingArguments

    from ring_attention.trainer import RingTrainer

    hf.register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="ring", dtype=torch.float32)
    found = []
    rows: Any = dataset(5, 1)
    for eval_dataset, collator in ((rows, flattened), (Stream(), padded)):
        reset_accelerate()
        args = TrainingArguments(**arguments(2))
        options: Any = {"eval_dataset": eval_dataset, "data_collator": collator, "sequence_degree": 1}
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # the test looks at the message
            RingTrainer(model, args, **options).evaluate()
        found.append(str(caught.value))
    return found


def test_an_evaluation_that_would_count_rows_twice_is_refused(pool: WorkerPool, tiny_llama: Path):
    for flat, endless in pool.run(evaluation_messages, tiny_llama, num_ranks=2):
        names(flat, "1 rows", "2 data ranks", "per_device_eval_batch_size=1")
        names(endless, "evaluation dataset", "length")
