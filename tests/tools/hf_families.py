"""Every causal family of transformers under ring attention: its error where it is tested, else whether it is refused.

    python -m tests.tools.hf_families --json docs/results/hf_families_cpu.json

The tested ones are those of tests/families.py, as in tests/distributed/test_hf.py. Of all others a model without
weights is built and given to `ring_attention.hf.check`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ring_attention import hf
from tests.distributed.test_hf import bf16_errors, family_errors
from tests.families import FAMILIES, MORE_FAMILIES
from tests.pool import WorkerPool

RANKS = (1, 2, 3, 4)


def tested(pool: WorkerPool, family: str) -> dict[str, Any]:
    """The worst fp32 error of any rank count, layout and packing, and the bf16 error over that of one process."""
    fp32 = [
        max(max(errors.values()) for errors in pool.run(family_errors, family, "ring", num_ranks=num_ranks))
        for num_ranks in RANKS
    ]
    ratios = [ours / alone for ours, alone in pool.run(bf16_errors, family, num_ranks=2)]
    return {"fp32": dict(zip(RANKS, fp32, strict=True)), "bf16_ratio": max(ratios)}


def verdict(family: str) -> dict[str, str]:
    """Why `check` refuses a family of the default configuration, or that nobody has tried it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(family)
        text = config.get_text_config(decoder=True)
        with contextlib.suppress(AttributeError, NotImplementedError):  # fewer layers, where that can be set
            text.num_hidden_layers = min(text.num_hidden_layers, 8)
            text.layer_types = text.layer_types[:8]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        if model._can_set_attn_implementation():
            model.set_attn_implementation(hf.NAME)
    except Exception as error:  # some defaults are no model
        return {"untested": f"{type(error).__name__}: {error}"}
    try:
        hf.check(model)
    except ValueError as error:
        return {"refused": str(error).partition("cannot run under ring attention: ")[2]}
    return {"untested": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description="Every causal family of transformers under ring attention.")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    hf.register()
    pool = WorkerPool("cpu")
    rows: dict[str, Any] = {"versions": {name: version(name) for name in ("transformers", "torch")}, "families": {}}
    for family in FAMILIES:
        rows["families"][family] = tested(pool, family)
        print(family, rows["families"][family], flush=True)
    for family in MORE_FAMILIES:
        worst = max(max(errors.values()) for errors in pool.run(family_errors, family, "ring", num_ranks=2))
        rows["families"][family] = {"fp32": {2: worst}}
        print(family, rows["families"][family], flush=True)
    pool.close()
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if family not in rows["families"]:
            rows["families"][family] = verdict(family)
            print(family, rows["families"][family], flush=True)
    options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
