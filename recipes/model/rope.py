"""model.rope: other rotary embeddings in a transformers configuration, as if a user had edited its config.json."""

from __future__ import annotations

import logging
from typing import Any

EXAMPLE = "such as model.rope='{rope_type:yarn,factor:4}'"
HAVE_ORIGINAL_LENGTH = ("yarn", "llama3", "longrope")
ORIGINAL_LENGTH = "original_max_position_embeddings"


def change_rope(config: Any, rope: Any) -> None:
    """Put `rope` into the configuration. With a factor, max_position_embeddings becomes what it stretches to.

    Not for rope_type=dynamic, which changes frequencies only beyond max_position_embeddings.

    Raises:
        ValueError: if the model has no such embeddings, or transformers finds fault with them.
    """
    if not isinstance(rope, dict) or not rope:
        raise ValueError(f"model.rope={rope} must be a dictionary, {EXAMPLE}")
    before = getattr(config, "rope_parameters", None)
    if not before:
        raise ValueError(f"model.rope={rope}: the model has no rotary embeddings; leave it out")
    kinds = [kind for kind, value in before.items() if isinstance(value, dict)]
    if kinds and not all(kind in kinds and isinstance(value, dict) for kind, value in rope.items()):
        raise ValueError(
            f"model.rope={rope}: the model's layers have rotary embeddings by kind; type "
            f"model.rope='{{KIND:{{...}}}}', where KIND is {' or '.join(kinds)}"
        )
    length = config.max_position_embeddings
    if kinds:
        given = [(rope[kind], _merged(before[kind], rope[kind], length)) for kind in rope]
        config.rope_parameters = before | {kind: merged for kind, (_, merged) in zip(rope, given, strict=True)}
    else:
        given = [(rope, _merged(before, rope, length))]
        config.rope_parameters = given[0][1]
    stretched = [
        merged.get(ORIGINAL_LENGTH, length) * (1 if merged["rope_type"] == "dynamic" else _factor(new))
        for new, merged in given
        if "factor" in new
    ]
    config.max_position_embeddings = int(max(stretched, default=length))
    if faults := _faults(config):
        raise ValueError(f"model.rope={rope}: {'; '.join(faults)}: correct it, {EXAMPLE}")


def kinds_of_rope(config: Any) -> list[dict[str, Any]]:
    """The rotary embeddings of a text model's layers: one, or one for each kind of layer; none without any."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_kind = [value for value in parameters.values() if isinstance(value, dict)]
    return by_kind or ([parameters] if parameters else [])


def rope_switch(config: Any) -> int | None:
    """The position from which on a text takes other frequencies (longrope), for all its tokens; None without one."""
    switches = (rope[ORIGINAL_LENGTH] for rope in kinds_of_rope(config) if rope["rope_type"] == "longrope")
    return next(switches, None)


def reach(config: Any) -> tuple[int | None, float]:
    """How many tokens the rotary embeddings are made for, None without a limit, and the factor that stretched them."""
    kinds = kinds_of_rope(config)
    length = getattr(config, "max_position_embeddings", None)
    if length is None or any(kind.get("rope_type") == "dynamic" for kind in kinds):
        return None, 1.0
    originals = [kind[ORIGINAL_LENGTH] for kind in kinds if kind.get(ORIGINAL_LENGTH)]
    stretched = [
        kind[ORIGINAL_LENGTH] * kind["factor"] for kind in kinds if kind.get(ORIGINAL_LENGTH) and "factor" in kind
    ]
    reached = int(max([length, *stretched]))  # some folders stretch without a longer max_position_embeddings
    return reached, reached / min([reached, *originals])


def decoding_problem(config: Any, length: int) -> str | None:
    """Why a text model cannot decode up to `length` tokens with keys that it keeps; None if it can."""
    longest = config.max_position_embeddings
    if length <= longest or all(rope["rope_type"] != "dynamic" for rope in kinds_of_rope(config)):
        return None
    return (
        f"rope_type=dynamic changes all frequencies with each token beyond {longest:,}, but the keys that are kept "
        f"have those of a shorter text: use a prompt and generate.max_new_tokens of together {longest:,} tokens, or "
        "model.rope='{rope_type:yarn,factor:4}'"
    )


def _merged(before: dict[str, Any], new: dict[str, Any], length: int) -> dict[str, Any]:
    """What a kind of rotary embedding had before stays, except what belongs to another rope_type."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_type = new.get("rope_type", before.get("rope_type", "default"))
    known = ["default", *ROPE_INIT_FUNCTIONS]
    if rope_type not in known:
        raise ValueError(
            f"model.rope has rope_type={rope_type}, which transformers does not know: use {', '.join(known)}"
        )
    of_every_type = {name: before[name] for name in ("rope_theta", "partial_rotary_factor") if name in before}
    kept = before if rope_type == before.get("rope_type") else of_every_type
    original = {ORIGINAL_LENGTH: length} if rope_type in HAVE_ORIGINAL_LENGTH else {}
    return {**original, **kept, **new, "rope_type": rope_type}


def _factor(rope: dict[str, Any]) -> float:
    factor = rope["factor"]
    if not isinstance(factor, (int, float)) or factor < 1:
        raise ValueError(f"model.rope has factor={factor}, which must be a number of at least 1: type 4, for example")
    return factor


def _faults(config: Any) -> list[str]:
    """What transformers raises or logs when it validates the rotary embeddings."""
    logger, faults = logging.getLogger("transformers.modeling_rope_utils"), []

    def take(record: logging.LogRecord) -> bool:
        faults.append(record.getMessage())
        return False  # not printed

    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addFilter(take)
    try:
        config.validate_rope()
    except KeyError as error:
        faults.append(error.args[0])
    finally:
        logger.removeFilter(take)
        logger.setLevel(level)
    return faults
