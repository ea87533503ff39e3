"""The dashboard's page: its tables and plots, that it is self-contained, and that a browser draws it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from recipes.dashboard import page
from recipes.dashboard.charts import COLORS
from recipes.monitor.metric_registry import PARTS
from recipes.run.run_dir import LoadedRuns, load_runs
from tests.errors import names
from tests.unit.test_run_dir import write_run

PAPER_TABLE = Path(__file__).parents[2] / "docs" / "results" / "paper_10k_forward_2xH200.json"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def rows(lr: float, num_rows: int = 4) -> str:
    lines: list[dict[str, Any]] = []
    for step in range(1, num_rows + 1):
        line = {"step": step, "elapsed_s": step / 4, "train/tokens_seen": 100 * step, "train/loss": 5 - lr * step}
        line |= {"train/perplexity": 1000.0 / step, "train/tokens_per_s": 1000.0 * step, "train/peak_memory_gib": 2.5}
        line |= {"train/exchange_wait_max_ms": 3.0, "train/mfu_pct": None}
        lines.append(line)
    lines[-1]["validation/loss"] = 4.5
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def loaded(tmp_path) -> LoadedRuns:
    """A finished run, an unfinished one, a broken one, and a comparison."""
    parts = {f"parts/{part}_pct": 12.5 for part in PARTS} | {"parts/exposed_communication_ms": 7.25}
    write_run(tmp_path / "0", lr=1e-3, metrics=rows(1e-3), summary=json.dumps(parts))
    write_run(tmp_path / "1", lr=0.5, metrics=rows(0.5))
    write_run(tmp_path / "2</script><b>", lr=2, metrics='{"step": ')
    folder = tmp_path / "paper"
    folder.mkdir()
    shutil.copy(PAPER_TABLE, folder / "comparison.json")
    return load_runs([tmp_path])


def figures(text: str) -> dict[str, dict[str, Any]]:
    """plotly's JSON by title of the plot."""
    loaded = re.findall(r'<h3>(.*?)</h3>.*?<script type="application/json">(.*?)</script>', text, re.DOTALL)
    return {html.unescape(title): json.loads(figure) for title, figure in loaded}


def cells(text: str) -> list[list[str]]:
    """The cells of all tables by row. The first row has the headings."""
    lines = re.findall(r"<tr.*?>(.*?)</tr>", text, re.DOTALL)
    return [
        [html.unescape(re.sub("<.*?>", "", cell)).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", line, re.DOTALL)]
        for line in lines
    ]


def test_the_table_of_runs_has_differing_settings_and_final_numbers(loaded):
    text = page.render(loaded)
    at = next(number for number, row in enumerate(cells(text)) if row[0] == "run")
    assert cells(text)[at : at + 4] == [
        ["run", "optimizer.lr", "last step", "loss", "validation loss", "best validation loss", "tokens/s", "peak GiB",
         "exposed ms"],
        ["0", "0.001", "4", "4.996", "4.5", "4.5", "3,000", "2.5", "7.25"],
        ["1", "0.5", "4", "3", "4.5", "4.5", "3,000", "2.5", ""],
        ["2</script><b>", "2", "", "", "", "", "", "", ""],
    ]  # fmt: skip


def test_a_comparison_has_the_papers_table(loaded):
    rows = json.loads(PAPER_TABLE.read_text())["rows"]
    heads, *shown = cells(page.render(loaded))[: len(rows) + 1]
    assert heads[:3] == ["method", "grid", "L"]
    for row, line in zip(rows, shown, strict=True):
        values = dict(zip(heads, line, strict=True))
        assert values["method"] == row["entry"]
        assert values["TPS"] == f"{row['tokens_per_s']:,.0f}"
        assert values[f"vs {rows[0]['entry']} %"] == f"{row['change_pct']:+.1f}"
    plots = figures(page.render(loaded))
    [bars] = plots["throughput: median, slowest and fastest step"]["data"]
    assert bars["x"] == [row["tokens_per_s"] for row in rows]


def test_a_run_has_the_same_color_in_all_charts_and_axes_have_units(loaded):
    plots = figures(page.render(loaded))
    assert {"loss", "validation loss", "throughput, all ranks", "peak memory, maximum over ranks"} < set(plots)
    assert "model FLOP utilization" not in plots  # never logged
    colors: dict[int, set[str]] = {}
    for figure in plots.values():
        for trace in figure["data"]:
            if "meta" in trace:
                color = trace["line"]["color"] if trace["type"] == "scatter" else trace["marker"]["color"]
                colors.setdefault(trace["meta"]["run"], set()).add(color)
    assert colors == {0: {COLORS[0]}, 1: {COLORS[1]}}
    loss = plots["loss"]
    assert [trace["name"] for trace in loss["data"]] == ["0 lr=0.001", "1 lr=0.5"]
    assert loss["data"][1]["y"] == [4.5, 4.0, 3.5, 3.0]
    assert loss["layout"]["yaxis"]["title"]["text"] == "nats/token"
    assert all(figure["layout"]["xaxis"]["title"]["text"] for figure in plots.values())
    assert plots["perplexity"]["layout"]["yaxis"]["type"] == "log"
    assert plots["exposed communication per step"]["layout"]["yaxis"]["type"] == "category"  # names of jobs are numbers
    shares = plots["time of a step by part"]["data"]
    assert [trace["name"] for trace in shares] == list(PARTS)


def test_methods_have_the_same_color_in_all_comparisons_and_scalings_are_lines_over_ranks(tmp_path):
    content = json.loads(PAPER_TABLE.read_text())
    first, second, *_ = content["rows"]
    scaling = [row | {"entry": f"{second['entry']} on {n}", "num_ranks": n} for n in (1, 2, 4) for row in (first,)]
    for name, rows in (("a", [first, second]), ("b", [second]), ("c", scaling)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "comparison.json").write_text(json.dumps(content | {"rows": rows}))
    text = page.render(load_runs([tmp_path]))
    shown = re.findall(r'<h3>throughput: median.*?json">(.*?)</script>', text, re.DOTALL)
    bars = [trace for figure in shown for trace in json.loads(figure)["data"]]
    assert [trace["marker"]["color"] for trace in bars] == [[COLORS[0], COLORS[1]], [COLORS[1]]]
    [line] = figures(text)["throughput over ranks"]["data"]
    assert (line["name"], line["x"], line["line"]["color"]) == (second["entry"], [1, 2, 4], COLORS[1])


def test_more_runs_than_colors_have_other_dashes(tmp_path):
    for number in range(12):
        write_run(tmp_path / str(number))
    traces = figures(page.render(load_runs([tmp_path])))["loss"]["data"]
    assert len({(trace["line"]["color"], trace["line"]["dash"]) for trace in traces}) == 12


def test_the_page_is_self_contained_names_problems_and_reloads_only_if_watched(loaded):
    text = page.render(loaded)
    assert "2&lt;/script&gt;&lt;b&gt;" in text  # names are escaped
    assert "2</script>" not in text
    own = text.replace(page.get_plotlyjs(), "")
    assert re.findall(r"""(?:src|href)=["'](?!data:)|https?://""", own) == []
    [problem] = {line for line in own.splitlines() if "metrics.jsonl" in line and "line 1" in line}
    names(html.unescape(problem), "2</script><b>/metrics.jsonl", "line 1")
    assert 'http-equiv="refresh"' not in text
    assert '<meta http-equiv="refresh" content="10">' in page.render(loaded, reload_s=10)


def dom_in_browser(folder: Path, text: str, script: str) -> str:
    """The page's DOM in a browser after `script`. The browser must not print an error or a warning."""
    assert BROWSER is not None
    (folder / "page.html").write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --window-size=1400,900"
    command = [BROWSER, *flags.split(), "--virtual-time-budget=10000", f"--user-data-dir={folder / 'profile'}"]
    result = subprocess.run(
        [*command, "--dump-dom", f"file://{folder / 'page.html'}"], capture_output=True, text=True, timeout=120
    )
    assert [line for line in result.stderr.splitlines() if "CONSOLE" in line] == []
    return result.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_draws_the_page_and_a_click_hides_a_run(loaded, tmp_path):
    script = """
        const loss = plots.find((plot) => plot.previousElementSibling.textContent === "loss");
        const first = () => [loss.data.map((trace) => trace.visible), loss.data[0].x, loss.layout.xaxis.title.text];
        const seen = [first()];
        document.querySelector("button.run").click();
        select.value = "train/tokens_seen";
        select.dispatchEvent(new Event("change"));
        seen.push(first());
        const heading = [...document.querySelectorAll("th")].filter((th) => th.textContent === "loss").pop();
        heading.click();
        const names = [...heading.closest("table").tBodies[0].rows].map((row) => row.cells[0].textContent.trim());
        const alone = [1, 2].map(() => {
            document.querySelectorAll("button.run")[1].dispatchEvent(new Event("dblclick"));
            return loss.data.map((trace) => trace.visible);
        });
        const drawn = plots.every((plot) => plot.scrollWidth > 100);
        document.body.dataset.seen = JSON.stringify([...seen, names, alone, drawn]);
    """
    text = page.render(loaded)
    dom = dom_in_browser(tmp_path, text, script)
    assert len(re.findall(r'<svg class="main-svg"[^>]*>', dom)) >= len(figures(text)) > 8
    [seen] = re.findall(r'data-seen="(.*?)"', dom)
    before, after, names, alone, drawn = json.loads(html.unescape(seen))
    assert before == [[True, True], [1, 2, 3, 4], "step"]
    assert after == [[False, True], [100, 200, 300, 400], "tokens"]
    assert names == ["1", "0", "2</script><b>"]  # empty cells last
    assert alone == [[False, True], [True, True]]
    assert drawn


def test_a_run_with_an_evaluation_has_heat_maps_and_its_loss_by_position(tmp_path):
    measured = [
        {"task": "niah_single", "length": 512, "depth": 0.0, "accuracy": 1.0},
        {"task": "niah_single", "length": 512, "depth": 1.0, "accuracy": 0.5},
        {"task": "niah_single", "length": 4096, "depth": 1.0, "accuracy": 0.0},
        {
            "task": "loss",
            "length": 4096,
            "source": "stdlib",
            "loss": 1.5,
            "context": 64,
            "buckets": [{"start": 0, "stop": 256, "tokens": 30, "loss": 1.75, "loss_of_context": 2.0}],
        },
    ]
    write_run(tmp_path / "plain")
    evaluated = write_run(tmp_path / "evaluated")
    (evaluated / "evaluation.json").write_text(json.dumps({"settings": {}, "cells": measured}))
    text = page.render(load_runs([tmp_path]))
    found = figures(text)
    [heat_map] = found["evaluated: niah_single"]["data"]
    assert (heat_map["type"], heat_map["zmin"], heat_map["zmax"]) == ("heatmap", 0, 1)
    assert (heat_map["x"], heat_map["y"]) == (["512", "4,096"], ["0.00", "1.00"])
    assert heat_map["z"] == [[1.0, None], [0.5, 0.0]]
    assert (heat_map["text"], heat_map["texttemplate"]) == ([["100", ""], ["50", "0"]], "%{text}")
    assert heat_map["colorbar"]["title"]["text"] == "accuracy"
    losses = found["loss by position in the document"]["data"]
    assert [(trace["x"], trace["y"]) for trace in losses] == [([256], [1.75]), ([256], [2.0])]
    assert [trace["name"] for trace in losses] == ["evaluated, stdlib", "evaluated, stdlib, cut after 64"]
    layout = found["loss by position in the document"]["layout"]
    assert (layout["showlegend"], layout["xaxis"]["tickvals"]) == (True, [256])
    [heads] = [row for row in cells(text) if row[0] == "run"]
    [row] = [row for row in cells(text) if row[0] == "evaluated"]
    assert row[heads.index("accuracy %")] == "50"


def test_maps_of_one_task_lie_beside_each_other_and_have_no_axis_to_choose(tmp_path):
    for name in "ab":
        tasks = [{"task": task, "length": 512, "accuracy": 1.0} for task in ("aggregation", "niah_single")]
        folder = write_run(tmp_path / name, metrics="")
        (folder / "evaluation.json").write_text(json.dumps({"settings": {}, "cells": tasks}))
    text = page.render(load_runs([tmp_path]))
    assert [*figures(text)] == ["a: aggregation", "b: aggregation", "a: niah_single", "b: niah_single"]
    assert '<select id="axis">' not in text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_draws_heat_maps_with_numbers_within_their_cards(tmp_path):
    cells = [
        {"task": "niah_single", "length": 2**n, "depth": d / 10, "accuracy": 0.5}
        for n in range(9, 17)
        for d in range(11)
    ]
    (write_run(tmp_path / "run") / "evaluation.json").write_text(json.dumps({"settings": {}, "cells": cells}))
    script = """
        const map = plots.find((plot) => plot.data[0].type === "heatmap");
        const box = map.closest(".card").getBoundingClientRect();
        const texts = [...map.querySelectorAll("text")];
        const inside = texts.every((text) => {
            const own = text.getBoundingClientRect();
            return own.left >= box.left && own.right <= box.right && own.bottom <= box.bottom;
        });
        const numbers = texts.filter((text) => text.textContent === "50").length;
        document.body.dataset.seen = JSON.stringify([inside, numbers]);
    """
    [seen] = re.findall(r'data-seen="(.*?)"', dom_in_browser(tmp_path, page.render(load_runs([tmp_path])), script))
    assert json.loads(html.unescape(seen)) == [True, 88]
