"""conf.schema imports no project code, so it repeats the names of the registries: they must be the same."""

import pytest

from conf.schema import AttentionConfig, ConfigError
from ring_attention.blocks import BLOCKS
from ring_attention.exchange import TRANSPORTS
from ring_attention.layout import LAYOUTS


@pytest.mark.parametrize(
    ("field", "names"), [("layout", [*LAYOUTS]), ("transport", [*TRANSPORTS]), ("block", ["auto", *BLOCKS])]
)
def test_the_schema_knows_exactly_what_is_registered(field: str, names: list[str]):
    with pytest.raises(ConfigError, match=f"attention.{field}=nothing is not known: use {', '.join(names)}$"):
        AttentionConfig(**{field: "nothing"})
    for name in names:
        AttentionConfig(**{field: name})
