"""The cluster of a forecast: what a user types, and what is refused in one line."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml

from conf.schema import ConfigError
from recipes.planning.cluster import FOLDER, Cluster, cluster_text, parse_cluster
from recipes.planning.measured import AttentionSpeed, MeasuredSpeeds, ProductSpeed
from tests.errors import names, refused

H100 = Cluster("h100", 8, 1, 79.2, 280.0, 45.0, 20, 2000, True)
MEASURED = MeasuredSpeeds(
    "8 x NVIDIA H100 80GB HBM3",
    memory_gb_per_s=3000.0,
    host_copy_gb_per_s=51.0,
    all_gather_gb_per_s=300.0,
    all_to_all_gb_per_s=250.0,
    call_ms=0.3,
    ring_step_ms=None,
    backward_issue=3.0,
    products=(ProductSpeed(256, 300.0), ProductSpeed(4096, 600.0)),
    attention=(AttentionSpeed("flash_attn_4", 128, 2048, 480.0, 200.0),),
)


@pytest.mark.parametrize(
    ("text", "hosts", "gpus_per_host", "gpu"),
    [
        ("8xh200", 1, 8, "h200"),
        ("2x8xh100", 2, 8, "h100"),
        ("b200", 1, 8, "b200"),
        ("16x4xa100_80gb", 16, 4, "a100_80gb"),
    ],
)
def test_what_a_user_types(text, hosts, gpus_per_host, gpu):
    cluster = parse_cluster(text)
    assert (cluster.hosts, cluster.gpus_per_host, cluster.gpu) == (hosts, gpus_per_host, gpu)
    assert cluster.num_gpus == hosts * gpus_per_host


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_ready_file_has_the_memory_of_its_gpu_and_says_whether_it_was_measured(path):
    cluster = parse_cluster(path.stem)
    assert cluster.memory_gib == cluster.spec.memory_gib
    assert cluster.is_measured == (path.stem in ("h100", "h200"))
    assert ("not measured" in str(cluster)) != cluster.is_measured


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text((FOLDER / "h100.yaml").read_text().replace("hosts: 1", "hosts: 3"))
    assert parse_cluster(str(path)).num_gpus == 24


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("8 h200", ["cluster=8 h200", "8xh200"]),
        ("8xv100", ["cluster=8xv100", "v100", "h100", "h200", "b200", "a100_80gb"]),
        ("64xh100", ["cluster=64xh100", 64, 8, "cluster=8x8xh100", "conf/clusters/h100.yaml", "gpus_per_host"]),
        ("2x12xh200", ["cluster=2x12xh200", 12, 8, "cluster=3x8xh200"]),
        ("0xh100", ["cluster.gpus_per_host=0", 1]),
        ("0x8xh100", ["cluster.hosts=0", 1]),
        ("nosuch.yaml", ["cluster=nosuch.yaml", "8xh200"]),
    ],
)
def test_bad_input_is_refused_in_one_line(text, parts):
    with pytest.raises(ConfigError) as caught:
        parse_cluster(text)
    assert "\n" not in str(caught.value)
    names(str(caught.value), *parts)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gpu", "v100"),
        ("link_within_gb_per_s", 0),
        ("link_between_gb_per_s", -1),
        ("link_between_gb_per_s", float("nan")),
        ("memory_gib", "a lot"),
        ("latency_us", -1),
        ("hosts", 1.5),
        ("gpu", ["h100"]),
        ("gpus_per_host", True),
        ("is_measured", "maybe"),
    ],
)
def test_a_number_that_cannot_be(field, value):
    with refused(ConfigError, f"cluster.{field}={value}"):
        Cluster(**{**vars(H100), field: value})


@pytest.mark.parametrize("text", ["- a\n- b\n", "gpu: h100\n", "gpu: [\n"])
def test_a_file_that_is_no_cluster(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with refused(ConfigError, f"cluster={path}"):
        parse_cluster(str(path))


def test_a_file_of_other_bytes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"gpu: \xff\xfe\n")
    with refused(ConfigError, f"cluster={path}", "cannot be read"):
        parse_cluster(str(path))


def test_a_misspelled_field_is_named_beside_the_one_that_is_missing(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text((FOLDER / "h100.yaml").read_text().replace("memory_gib:", "memory:", 1))
    with refused(ConfigError, f"cluster={path}", "has memory and", "lacks memory_gib"):
        parse_cluster(str(path))


def test_what_was_measured_is_written_and_read(tmp_path):
    path, cluster = tmp_path / "mine.yaml", dataclasses.replace(H100, measured=MEASURED)
    path.write_text(cluster_text(cluster, "two\nlines"))
    assert parse_cluster(str(path)) == cluster
    assert path.read_text().startswith("# two\n# lines\ngpu: h100\n")
    assert len(path.read_text().splitlines()) < 30
    names(str(cluster), f"measured on {MEASURED.about}")
    path.write_text(cluster_text(H100, "one"))
    assert parse_cluster(str(path)) == H100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("memory_gb_per_s", None),
        ("call_ms", 0),
        ("ring_step_ms", -1.0),
        ("all_gather_gb_per_s", "fast"),
        ("products", 600),
        ("products", [[256, 300.0, 1]]),
        ("products", [[256, 0]]),
        ("backward_issue", None),
        ("attention", [["flash_attn_4", 128, 2048, 480.0]]),
        ("attention", [[4, 128, 2048, 480.0, 200.0]]),
        ("attention", [["flash_attn_4", 128, 2048, 480.0, "slow"]]),
    ],
)
def test_measured_numbers_that_cannot_be(tmp_path, field, value):
    fields = _fields()
    fields["measured"][field] = value
    _refuses(tmp_path, fields, f"measured.{field}", value[0] if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda measured: measured | {"fast": 1}, ["has measured.fast"]),
        (lambda measured: {name: measured[name] for name in measured if name != "call_ms"}, ["lacks measured.call_ms"]),
        (lambda measured: [1], ["measured=[1]"]),
    ],
)
def test_a_measured_field_that_is_missing_or_unknown(tmp_path, change, parts):
    fields = _fields()
    fields["measured"] = change(fields["measured"])
    _refuses(tmp_path, fields, *parts, "memory_gb_per_s", "ring_step_ms")


def _fields() -> dict[str, Any]:
    return yaml.safe_load(cluster_text(dataclasses.replace(H100, measured=MEASURED), ""))


def _refuses(tmp_path, fields: dict[str, Any], *parts: Any) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(ConfigError) as caught:
        parse_cluster(str(path))
    assert "\n" not in str(caught.value)
    names(str(caught.value), f"cluster={path}", "recipe=calibrate", *parts)
