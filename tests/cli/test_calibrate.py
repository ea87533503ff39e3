"""`recipe=calibrate` as people type it: on two CPU ranks, which have links, and on one."""

from __future__ import annotations

import pytest

from recipes.planning.cluster import parse_cluster
from tests.cli.program import Finished, Program
from tests.errors import names, some_line_names


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp("calibrate")
    return Program(folder).run("recipe=calibrate", f"calibrate.output={folder / 'mine.yaml'}", "launch.num_ranks=2")


def test_two_ranks_measure_themselves_and_their_links(two_ranks):
    assert (two_ranks.exit_code, two_ranks.stderr) == (0, "")
    cluster = parse_cluster(str(two_ranks.run_dir.parent / "mine.yaml"))
    assert (cluster.gpu, cluster.gpus_per_host, cluster.hosts, cluster.is_measured) == ("cpu", 2, 1, True)
    measured = cluster.measured
    assert measured is not None
    assert [row.tokens for row in measured.products] == [64, 256, 1024]
    assert [(row.kernel, row.head_dim) for row in measured.attention] == [("cpu_flash", 32)] * 3
    # squares of 64, 256 and 1,024 tokens with 128 numbers in all heads, of 4,096
    assert [row.size for row in measured.attention] == pytest.approx([11.31, 45.25, 181.0])
    assert None not in (measured.all_gather_gb_per_s, measured.all_to_all_gb_per_s, measured.ring_step_ms)
    assert measured.host_copy_gb_per_s is None  # the CPU is its own host
    lines = two_ranks.stdout.splitlines()
    some_line_names(lines, "a link to the next rank, by p2p", f"{cluster.link_within_gb_per_s:.4g} GB/s")
    some_line_names(lines, "products over 256 tokens", f"{measured.products[1].tflops:.4g} TFLOP/s")
    some_line_names(lines, "not measured", "between hosts")
    some_line_names(lines, "!!!", "CPU", "GPUs")


def test_progress_comes_before_the_table(two_ranks):
    begun = [line for line in two_ranks.stdout.splitlines() if line.endswith(" ...")]
    for line, what in zip(begun, ("memory", "products", "head size of 32", "calls", "links"), strict=True):
        names(line, what)


@pytest.mark.slow
def test_one_rank_says_that_its_links_are_not_measured(program):
    run = program.run("recipe=calibrate", "launch.num_ranks=1")
    assert (run.exit_code, run.stderr) == (0, "")
    cluster, sheet = parse_cluster(str(run.run_dir / "cluster.yaml")), parse_cluster("cpu")
    links = (cluster.link_within_gb_per_s, cluster.link_between_gb_per_s, cluster.latency_us)
    assert links == (sheet.link_within_gb_per_s, sheet.link_between_gb_per_s, sheet.latency_us)
    measured = cluster.measured
    assert measured is not None
    assert measured.all_gather_gb_per_s is measured.all_to_all_gb_per_s is measured.ring_step_ms is None
    some_line_names(run.stdout.splitlines(), "not measured", "one rank", "2 GB/s", "1 GB/s")


@pytest.mark.parametrize(
    ("output", "parts"),
    [
        ("mine.txt", [".yaml"]),
        ("nosuchfolder/mine.yaml", ["cannot be written"]),
        (f"{__file__}/mine.yaml", ["cannot be written"]),  # a file is no folder
    ],
)
def test_a_file_that_cannot_be_is_refused_before_ranks_start(program, output, parts):
    run = program.run("recipe=calibrate", f"calibrate.output={output}", "launch.num_ranks=1")
    assert run.exit_code == 1
    assert not run.ranks_were_started
    [line] = run.stderr.splitlines()
    names(line, f"calibrate.output={output}", *parts)


@pytest.mark.parametrize("output", ["mine.yaml", None], ids=["output", "run dir"])
def test_a_file_that_exists_is_not_replaced(program, output):
    file = program.folder / (output or "run/cluster.yaml")
    file.parent.mkdir(exist_ok=True)
    file.write_text("measured: by hand\n")
    settings = [f"calibrate.output={file}"] if output else []  # program.run says the run dir
    run = program.run("recipe=calibrate", *settings, "launch.num_ranks=1")
    assert run.exit_code == 1
    assert not run.ranks_were_started
    [line] = run.stderr.splitlines()
    names(line, str(file), "calibrate.output=FILE.yaml", "remove it")
    assert file.read_text() == "measured: by hand\n"


def test_an_output_without_the_recipe_is_refused(program):
    run = program.run("calibrate.output=mine.yaml", "explain=true")
    assert run.exit_code == 1
    names(run.stderr, "calibrate.output=mine.yaml", "recipe=calibrate")
