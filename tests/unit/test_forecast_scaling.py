"""The pages of forecasts: numbers are current, settings fit, and what must hold whatever the constants are."""

from __future__ import annotations

import dataclasses

import pytest

from docs.tools import forecast_scaling
from docs.tools.forecast_paper import BASELINE, CLUSTER, HYBRID, MICRO_BATCHES, PAPER, RING, paper_causes, paper_step
from docs.tools.forecast_scaling import FILE, GPUS, LINKS, LONG, LONGEST, MODELS, SCALING, SHORT, best
from docs.tools.markdown import DOCS, load
from docs.tools.tables_scaling import Winner, winner


@pytest.fixture(scope="module")
def result():
    return load(FILE)


@pytest.mark.parametrize("page", ["forecast.md", "results/forecast.md"])
def test_pages_have_their_tables(page):
    """`python -m docs.tools.make_tables --check`, which CI runs, says whether tables are current."""
    assert (DOCS / page).read_text(encoding="utf-8").count("<!-- end forecast") >= 6


@pytest.mark.parametrize(
    ("model", "length", "num_gpus", "sequences"),
    [
        ("llama_8b", SHORT, 64, 32),
        ("llama_8b", LONGEST, 64, 1),
        ("llama_70b", LONG, 32, 4),
        ("llama_70b", SHORT, 8, 32),
    ],
)
def test_scaling_is_current(result, model, length, num_gpus, sequences):
    row = best(model, length, num_gpus, sequences)
    assert row in result["strong"]


def test_maps_are_current(result):
    for length in (SHORT, LONG):
        assert forecast_scaling.speeds(length, forecast_scaling.cluster_of(16)) in result["map"]
    assert forecast_scaling.link_speeds(8, LINKS[0]) in result["link_map"]
    assert forecast_scaling.host_speeds(SHORT, 25.0) in result["host_map"]


def test_all_points_are_there_and_fit(result):
    assert len(result["strong"]) == len(MODELS) * 3 * len(GPUS)
    for row in (row for name in SCALING for row in result[name] if row["fits"]):
        assert row["memory_gib"] <= 0.9 * 79.2
        ranks = 1
        for degree in row["degrees"].values():
            ranks *= degree
        assert ranks == row["gpus"]
        tokens = row["sequences"] * row["length"]
        assert row["tokens_per_s"] == pytest.approx(tokens / row["step_s"], rel=1e-3)
    largest = {row["length"] for name in SCALING for row in result[name] if row["fits"] and row["gpus"] == 1024}
    assert {SHORT, LONG, LONGEST} <= largest


def test_more_gpus_are_never_slower(result):
    for model in MODELS:
        for length in (SHORT, LONG, LONGEST):
            speeds = [
                row["tokens_per_s"]
                for row in result["strong"]
                if row["fits"] and (row["model"], row["length"]) == (model, length)
            ]
            assert len(speeds) >= 4
            assert speeds == sorted(speeds)


def test_who_wins():
    def cell(**speeds: float) -> dict:
        return {"gpus": 16, "tokens_per_s": speeds, "ring_degree": {"ring": 16, "hybrid": 2, "ulysses": 1}}

    assert winner(cell(ring=100.0)) == Winner("ring")
    assert winner(cell(ring=100.0, hybrid=102.0)) == Winner("level")
    assert winner(cell(ring=100.0, hybrid=98.0)) == Winner("level")
    assert winner(cell(ring=100.0, hybrid=80.0)) == Winner("ring", lead="+25 %")
    assert winner(cell(ring=100.0, hybrid=110.0, ulysses=105.0)) == Winner("hybrid", "2 x 8", "+10 %")
    assert winner(cell(ring=100.0, hybrid=110.0, ulysses=120.0)) == Winner("ulysses", lead="+20 %")


class TestThePapersTable:
    def test_steps_are_the_papers(self):
        for workload, tokens in (("paper_10k", 1024 * 10_000), ("paper_100k", 128 * 100_000)):
            for method, degrees in ((BASELINE, (1, 1, 1, 8, 2)), (RING, (1, 16, 1, 1, 1)), (HYBRID, (1, 2, 8, 1, 1))):
                step = paper_step(method, workload)
                assert step.tokens_per_step == tokens
                assert tuple(step.degrees) == degrees
                assert step.config.engine.micro_batch_size in MICRO_BATCHES
        assert (CLUSTER.hosts, CLUSTER.gpus_per_host, CLUSTER.gpu) == (2, 8, "h100")

    def test_a_needed_value_gives_the_papers_lead(self):
        """On paper_100k: the link between hosts with which a ring of 16 is 20.8 % ahead."""
        row = next(line for line in paper_causes("paper_100k").splitlines() if "between hosts" in line)
        needed = float(row.split(" | ")[2].removesuffix(" GB/s"))
        assert needed > 2 * CLUSTER.link_between_gb_per_s
        cluster = dataclasses.replace(CLUSTER, link_between_gb_per_s=needed)
        speeds = [paper_step(method, "paper_100k", cluster=cluster).tokens_per_s for method in (RING, BASELINE)]
        assert speeds[0] / speeds[1] == pytest.approx(PAPER, rel=0.01)
