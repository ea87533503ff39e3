"""Hugging Face models: what `shard` reads from a batch, and what is refused, by layer and reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ring_attention import LocalAttention, hf
from tests.errors import refused
from tests.families import VOCAB_SIZE, tiny_config, tiny_model

IDS = torch.arange(3, 13)[None]
LABELS = torch.arange(3, 13)[None]
NONE = hf.IGNORED_LABEL
DOCUMENTS = (0, 4, 5, 10)
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3, 4]])
SHIFTED = [4, 5, 6, NONE, NONE, 9, 10, 11, 12, NONE]


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    hf.register()


def sharded(**batch: Any) -> dict[str, Any]:
    return hf.shard({"input_ids": IDS, "labels": LABELS, **batch}, LocalAttention("auto"))


@pytest.mark.parametrize(
    "source",
    [
        {"position_ids": POSITIONS},
        {"seq_idx": torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2, 2, 2]])},
        {"cu_seq_lens_q": torch.tensor(DOCUMENTS), "cu_seq_lens_k": torch.tensor(DOCUMENTS), "max_length_q": 5},
        {"position_ids": POSITIONS, "cu_seq_lens_q": torch.tensor(DOCUMENTS, dtype=torch.int32)},
    ],
    ids=["position_ids", "seq_idx", "cu_seq_lens", "two"],
)
def test_documents_are_read_from_any_source(source: dict[str, Tensor]):
    batch = sharded(**source)
    assert batch["ring_plan"].mask.documents == (DOCUMENTS,)
    assert batch["ring_plan"].labels_BS.tolist() == [SHIFTED]
    assert batch["position_ids"].tolist() == POSITIONS.tolist()
    assert batch["ring_plan"].max_position == 4


def test_a_batch_without_documents_is_causal():
    batch = sharded()
    assert batch["ring_plan"].mask.documents is None
    assert batch["ring_plan"].labels_BS.tolist() == [[*range(4, 13), NONE]]
    assert batch["position_ids"].tolist() == [list(range(10))]


def test_documents_may_differ_between_rows():
    positions = torch.cat([POSITIONS, torch.arange(10)[None]])
    batch = hf.shard(
        {"input_ids": IDS.expand(2, -1), "labels": LABELS.expand(2, -1), "position_ids": positions},
        LocalAttention("auto"),
    )
    assert batch["ring_plan"].mask.documents == (DOCUMENTS, (0, 10))
    assert batch["ring_plan"].labels_BS.tolist() == [SHIFTED, [*range(4, 13), NONE]]


def test_padding_on_the_right_has_no_labels():
    mask = torch.tensor([[1] * 7 + [0] * 3])
    assert sharded(attention_mask=mask)["ring_plan"].labels_BS.tolist() == [[4, 5, 6, 7, 8, 9, NONE, NONE, NONE, NONE]]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"attention_mask": torch.tensor([[0] * 3 + [1] * 7])}, ["attention_mask", "right"]),
        ({"attention_mask": torch.tensor([[1] * 5 + [2] * 5])}, ["attention_mask", "position_ids"]),
        ({"position_ids": POSITIONS + 1}, ["position_ids", "0"]),
        ({"position_ids": POSITIONS, "seq_idx": torch.zeros(1, 10)}, ["position_ids", "seq_idx"]),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 9])}, ["cu_seq_lens_q", "9", "10"]),
        ({"cu_seq_lens_q": torch.tensor([0, 7, 3, 10])}, ["cu_seq_lens_q", "[0, 7, 3, 10]"]),
        ({"cu_seq_lens_q": torch.tensor([], dtype=torch.int32)}, ["cu_seq_lens_q", "empty", "10"]),
        ({"attention_mask": torch.tensor([[0] * 3 + [1] * 7]), "labels": None}, ["attention_mask", "right"]),
        ({"labels": LABELS[:, 1:]}, ["labels", "[1, 9]", "[1, 10]"]),
        ({"input_ids": IDS.expand(2, -1)}, ["labels", "[1, 10]", "[2, 10]"]),
        ({"pixel_values": IDS}, ["pixel_values"]),
        ({"input_ids": IDS[0]}, ["input_ids", "[10]"]),
        ({"input_ids": IDS[:, :0], "labels": LABELS[:, :0]}, ["input_ids", "[1, 0]", "rows without tokens"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_shard_refuses(batch: dict[str, Any], words: list[str]):
    with refused(ValueError, *words):
        sharded(**batch)


def test_cu_seq_lens_of_several_rows_are_refused():
    with refused(ValueError, "cu_seq_lens_q", "2"):
        hf.shard({"input_ids": IDS.expand(2, -1), "cu_seq_lens_q": torch.tensor([0, 10])}, LocalAttention("auto"))


def ids() -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (1, 16))


def guarded(family: str = "llama", **changes: Any) -> nn.Module:
    model = tiny_model(family, "ring", **changes)
    hf.check(model)
    return model


def batch_of(tokens: Tensor) -> dict[str, Any]:
    return hf.shard({"input_ids": tokens, "labels": tokens}, LocalAttention("auto"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": IDS}, ["labels", "ring_attention.hf.shard", "ring_attention.hf.loss"]),
        ({"ring_plan": None}, ["ring_plan", "ring_attention.hf.shard", 'attn_implementation="sdpa"']),
        ({"attention_mask": torch.ones(1, 16)}, ["attention_mask", "ring_attention.hf.shard"]),
        ({"position_ids": None}, ["position_ids"]),
        ({"output_attentions": True}, ["output_attentions"]),
        ({"cu_seq_lens_q": torch.tensor([0, 16])}, ["cu_seq_lens_q"]),
        ({"attention_bias": torch.ones(1)}, ["attention_bias", "layer 0", "LlamaAttention"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_guarded_model_refuses_what_would_be_wrong(changes: dict[str, Any], words: list[str]):
    model = guarded()
    with refused(ValueError, *words):
        model(**(batch_of(ids()) | changes))


def test_a_layer_that_does_not_call_attention_is_found():
    model = guarded()
    attention: Any = model.get_submodule("model.layers.1.self_attn")
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with refused(ValueError, "layer 1", "0 times"):
        model(**batch_of(ids()))


def test_the_loss_needs_a_checked_pass_and_labels():
    model, batch = tiny_model("llama", "ring"), batch_of(ids())
    outputs = model(**batch)
    with refused(ValueError, "ring_attention.hf.check"):
        hf.loss(outputs, batch)
    hf.check(model)
    no_labels = hf.shard({"input_ids": ids()}, LocalAttention("auto"))
    with refused(ValueError, "labels", "input_ids"):
        hf.loss(model(**no_labels), no_labels)


def test_a_mask_function_that_is_not_computed_is_named():
    from transformers import masking_utils

    config: Any = guarded().config
    positions = batch_of(ids())["position_ids"]
    with refused(ValueError, "or_masks"):  # what lets tokens of an image see each other
        masking_utils.create_causal_mask(
            config, torch.zeros(1, 16, 64), None, None, positions, block_sequence_ids=torch.zeros(1, 16).long()
        )


def test_recomputed_layers_do_not_count_twice():
    model, batch = guarded(), batch_of(ids())
    model.gradient_checkpointing_enable({"use_reentrant": False})  # pyright: ignore[reportCallIssue]
    model.train()
    hf.loss(model(**batch), batch).backward()
    hf.loss(model(**batch), batch).backward()


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"attention_dropout": 0.1}, ["attention_dropout=0.1"]),
        ("starcoder2", {"residual_dropout": 0.1}, ["residual_dropout=0.1"]),  # without a module of its own
        ("opt", {"dropout": 0.1}, ["dropout=0.1"]),
        ("qwen3_moe", {"output_router_logits": True}, ["output_router_logits"]),
        ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise=0.1"]),
        ("gemma3_text", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("qwen3_next", {}, ["linear_attention", "layers 0"]),
        ("mamba", {}, ["layers 0, 1", "attention"]),
        ("llama4_text", {}, ["chunked_attention"]),
        ("bert", {"is_decoder": True}, ["dropout of 0.1"]),
        (
            "gpt2",
            {"resid_pdrop": 0.1, "attn_pdrop": 0.0, "embd_pdrop": 0.0},
            ["dropout of 0.1", "transformer.h.0.attn.resid_dropout"],
        ),
    ],
)
def test_check_refuses_by_layer_and_reason(family: str, changes: dict[str, Any], words: list[str]):
    model = built(family, **changes)
    with refused(ValueError, *words):
        hf.check(model)


def test_positions_beyond_the_learned_ones_are_refused():
    no_dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    model = guarded("gpt2", max_position_embeddings=12, **no_dropout)
    model(**batch_of(ids()[:, :12]))
    with refused(ValueError, "position 15", "12"):  # on every rank, where an index would fail on one
        model(**batch_of(ids()))


def test_rotary_positions_have_no_such_end():
    guarded(max_position_embeddings=12)(**batch_of(ids()))


def built(family: str, **changes: Any) -> nn.Module:
    """Without weights: some of these families are large whatever is asked for."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **changes)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="ring" if family != "mamba" else None)


def test_another_attention_implementation_is_refused():
    with refused(ValueError, "eager", 'attn_implementation="ring"'):
        hf.check(tiny_model("llama", "eager"))


def test_another_module_is_refused():
    with refused(ValueError, "Linear", "no model of transformers"):
        hf.check(nn.Linear(2, 2))


@pytest.mark.parametrize("version", ["5.16.1", "5.25.0", "6.0.0"])
def test_a_version_that_was_not_tested_is_refused(monkeypatch: pytest.MonkeyPatch, version: str):
    monkeypatch.setattr(hf.importlib.metadata, "version", lambda name: version)
    with refused(ValueError, version, "5.17", "5.25"):
        hf.register()
