"""conf.schema imports no project code, so it repeats the names of the registries. They must agree."""

from pathlib import Path

import pytest

from conf.schema import GPUS, METHODS, AttentionConfig, ConfigError
from recipes.engine import build
from recipes.planning import throughput
from ring_attention.kernels import KERNELS
from ring_attention.layout import LAYOUTS
from ring_attention.transport import TRANSPORTS
from tests.errors import refused


@pytest.mark.parametrize(
    ("field", "names"), [("layout", [*LAYOUTS]), ("transport", ["auto", *TRANSPORTS]), ("kernel", ["auto", *KERNELS])]
)
def test_the_schema_has_the_names_of_the_registry_in_its_order(field: str, names: list[str]):
    attention = AttentionConfig()
    setattr(attention, field, "nothing")
    with refused(ConfigError, f"attention.{field}=nothing", ", ".join(names)):
        attention.__post_init__()
    for name in names:
        setattr(attention, field, name)
        attention.__post_init__()


def test_the_schema_has_the_kinds_of_gpu():
    assert [*GPUS] == [*throughput.GPUS]


def test_every_method_but_auto_has_a_module():
    assert [*build.METHODS, "auto"] == [*METHODS]


def test_every_method_has_its_file():
    folder = Path(__file__).parents[2] / "conf" / "attention"
    assert {path.stem for path in folder.glob("*.yaml")} == set(METHODS)
