"""The cluster of a forecast: what a user types, and what is refused in one line."""

from __future__ import annotations

import pytest

from conf.schema import ConfigError
from recipes.planning.cluster import FOLDER, Cluster, parse_cluster
from tests.errors import names, refused

H100 = Cluster("h100", 8, 1, 79.2, 280.0, 45.0, 20, 2000, True)


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
