"""recipe=calibrate: measures the speeds of this host's devices and links, and writes them as a cluster's file.

All devices do the same at the same time, as in training. A speed is that of the slowest. Forecasts read the file in
place of their built-in tables.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from pathlib import Path

import torch

from recipes.launch.host_memory import usable_memory_bytes
from recipes.monitor.device_speeds import DeviceSpeeds, LinkSpeeds
from recipes.monitor.reporter import Reporter
from recipes.planning.cluster import Cluster, calibration_file, cluster_text
from recipes.planning.measured import AttentionSpeed, MeasuredSpeeds
from recipes.planning.plan import Plan
from recipes.run.run_dir import replace_file
from recipes.run.text_table import text_table


def calibrate(plan: Plan, run_dir: Path, reporter: Reporter | None) -> float:
    """Measure, print a table, write calibrate.output. Returns TFLOP/s of products over the most tokens.

    Every rank must call it; `reporter` is rank 0's, and None on all others. The degrees of the plan do not matter.

    Raises:
        ConfigError: if the file exists.
    """
    started, path = time.perf_counter(), calibration_file(plan.config, run_dir)

    def say(*lines: str) -> None:
        if reporter:
            reporter.say(*lines)

    def begin(what: str) -> None:
        say(f"{time.perf_counter() - started:5.0f} s  {what} ...")

    speeds = DeviceSpeeds(plan)
    say(f"measuring {plan.num_ranks} x {plan.device_name} of this host, {plan.config.engine.dtype}")
    begin("memory and copies to the host")
    memory, host_copy = speeds.memory_gb_per_s(), speeds.host_copy_gb_per_s()
    begin("matrix products")
    products = tuple(speeds.products())
    attention: list[AttentionSpeed] = []
    for head_dim in speeds.head_dims:
        begin(f"attention with a head size of {head_dim}")
        attention += speeds.attention(head_dim)
    begin("the host's calls of attention")
    host = speeds.host()
    links = None
    if plan.num_ranks > 1:
        begin("links")
        links = speeds.links()
    measured = MeasuredSpeeds(
        f"{plan.num_ranks} x {plan.device_name}, torch {torch.__version__}, {plan.config.engine.dtype}, "
        f"{datetime.date.today()}",
        memory,
        host_copy,
        links and links.all_gather_gb_per_s,
        links and links.all_to_all_gb_per_s,
        host.call_ms,
        host.ring_step_ms,
        host.backward_issue,
        products,
        tuple(attention),
    )
    cluster = _cluster(plan, measured, links)
    if reporter:
        say("", *text_table(_rows(cluster, links)), "", *_notes(plan, links))  # first: writing may fail
        replace_file(path, cluster_text(cluster, _comment(links)))
        say(f"done in {time.perf_counter() - started:.0f} s; to forecast with these speeds, type cluster={path}")
    return products[-1].tflops


def _cluster(plan: Plan, measured: MeasuredSpeeds, links: LinkSpeeds | None) -> Cluster:
    """This host, with the data sheet's numbers where nothing was measured."""
    memory_gib = round(usable_memory_bytes() / 2**30, 1)
    own = dataclasses.replace(plan.cluster, host_memory_gib=memory_gib, is_measured=True, measured=measured)
    if links is None:
        return own
    return dataclasses.replace(own, link_within_gb_per_s=links.gb_per_s, latency_us=links.latency_us)


def _comment(links: LinkSpeeds | None) -> str:
    """The first lines of the file."""
    sheet = "The link between hosts is" if links else "Links are"
    return (
        "Measured by recipe=calibrate. Speeds are of one device while all of its host did the same.\n"
        f"{sheet} not measured. hosts, gpus_per_host and what was not measured may be changed by hand.\n"
        "products: tokens, TFLOP/s. attention: kernel, head size, size of a causal square, TFLOP/s forward, backward."
    )


def _rows(cluster: Cluster, links: LinkSpeeds | None) -> list[list[str]]:
    """The table for people."""
    measured = cluster.measured
    assert measured is not None
    rows = [["what", "measured"], ["memory", f"{measured.memory_gb_per_s:,.4g} GB/s"]]
    if measured.host_copy_gb_per_s:
        rows.append(["copies to the host", f"{measured.host_copy_gb_per_s:.4g} GB/s"])
    rows += [[f"products over {row.tokens:,} tokens", f"{row.tflops:.4g} TFLOP/s"] for row in measured.products]
    for row in measured.attention:
        name = f"attention, {row.kernel}, heads of {row.head_dim}, as a square of {row.size:,.0f} tokens"
        rows.append([name, f"{row.forward:.4g} TFLOP/s forward, {row.backward:.4g} backward"])
    rows.append(["the host, for a forward call of attention", f"{measured.call_ms:.3f} ms"])
    if measured.ring_step_ms:
        rows.append(["the host, for a forward ring step", f"{measured.ring_step_ms:.3f} ms"])
    rows.append(["the host, for a backward pass", f"{measured.backward_issue:.2f} times as long as forward"])
    if links:
        to_neighbour = f"{cluster.link_within_gb_per_s:.4g} GB/s, {cluster.latency_us:.1f} us a message"
        rows.append([f"a link to the next rank, by {links.used}", to_neighbour])
        rows.append(
            ["all-gather, all-to-all", f"{links.all_gather_gb_per_s:.4g}, {links.all_to_all_gb_per_s:.4g} GB/s"]
        )
    return rows


def _notes(plan: Plan, links: LinkSpeeds | None) -> list[str]:
    """What the numbers do not say."""
    own = plan.cluster
    between = f"between hosts, {own.link_between_gb_per_s:g} GB/s"
    notes = [f"not measured: links {between}, from a data sheet; change it in the file if yours differ"]
    if links is None:
        notes = [
            f"not measured, because this is one rank: links within a host, {own.link_within_gb_per_s:g} GB/s, and "
            f"{between}, which stay as in the data sheet, and what a ring step costs the host"
        ]
    if not plan.on_gpu:
        notes.append("!!! ON THE CPU ranks share cores: these figures say nothing about GPUs")
    return notes
