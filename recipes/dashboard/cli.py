"""Any number of runs on one page, without an account: python -m recipes.dashboard RUN_DIR...

Reads run dirs (`runs`), writes one self-contained HTML file (`page`), with --watch again and again; with --wandb it
makes a workspace there instead (`workspace`). Imports neither torch nor DeepSpeed: it starts in a second.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import time
from pathlib import Path

from conf.schema import ConfigError
from recipes.run import run_dir

WATCH_INTERVAL_S = 2.0
RELOAD_INTERVAL_S = 10  # of a browser that shows a page which is watched
OUTPUT_FILE = "dashboard.html"

Stamp = dict[Path, tuple[int, int]]


def main(arguments: list[str]) -> None:
    """Do what the command line says.

    Raises:
        ConfigError: for a mistake in it, and if there is nothing to show.
    """
    parser = argparse.ArgumentParser(prog="python -m recipes.dashboard", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "run_dirs", nargs="*", type=Path, metavar="RUN_DIR", help="a run's, a comparison's or a sweep's"
    )
    parser.add_argument("--output", type=Path, help=f"the page; {OUTPUT_FILE} in the first RUN_DIR if left out")
    parser.add_argument("--watch", action="store_true", help="write it anew whenever a run has logged, until Ctrl-C")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="make a workspace there, which needs a login")
    options = parser.parse_args(arguments)
    _need("plotly", "jinja2", *(["wandb_workspaces"] if options.wandb is not None else []))
    if options.wandb is not None:
        from recipes.dashboard import workspace

        print(f"making a workspace in {options.wandb} ...", flush=True)
        print(f"look at it here: {workspace.create(options.wandb)}")
        return
    if not options.run_dirs:
        raise ConfigError("there is no run to show: python -m recipes.dashboard outputs/DATE/TIME")
    output = options.output or next((path for path in options.run_dirs if path.is_dir()), Path()) / OUTPUT_FILE
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}; make it, or use another")
    if options.watch:
        watch(options.run_dirs, output)
    else:
        write(options.run_dirs, output, said=set())


def write(run_dirs: list[Path], output: Path, said: set[str], reload_s: int | None = None) -> None:
    """Write the page, and say what is on it and what is wrong with it.

    Args:
        said: what need not be said again; takes what is said now.
        reload_s: after which a browser loads the page again; None is never.

    Raises:
        ConfigError: if there is nothing to show.
    """
    from recipes.dashboard import page

    found = run_dir.load_runs(run_dirs)
    if found.is_empty:
        raise ConfigError("\n".join(["there is nothing to show:", *found.problems]))
    for problem in found.problems:
        if problem not in said:
            print(f"warning: {problem}", file=sys.stderr, flush=True)
    said.update(found.problems)
    _replace(output, page.render(found, reload_s))
    what = [page.counted(found.runs, "run"), page.counted(found.comparisons, "comparison")]
    if steps := [run.rows[-1]["step"] for run in found.runs if run.rows]:
        what.append(f"up to step {max(steps):,}")
    print(f"wrote {output}: {', '.join(filter(None, what))}", flush=True)


def watch(run_dirs: list[Path], output: Path) -> None:
    """Write the page whenever a file of a run has changed, until Ctrl-C; waits for a run that is not there yet."""
    print(f"watching {', '.join(map(str, run_dirs))}; Ctrl-C ends it", flush=True)
    seen: Stamp | None = None
    said: set[str] = set()
    try:
        while True:
            now = _stamp(run_dirs)
            if now != seen:
                seen = now
                try:
                    write(run_dirs, output, said, RELOAD_INTERVAL_S)
                except FileNotFoundError:  # a sweep renames the folder of a trial that it runs again
                    seen = None
                except ConfigError as error:
                    if str(error) not in said:
                        print(f"waiting: {error}", flush=True)
                    said.add(str(error))
            time.sleep(WATCH_INTERVAL_S)
    except KeyboardInterrupt:
        print(flush=True)
        if output.exists():
            write(run_dirs, output, said)  # one that does not load itself again


def _stamp(run_dirs: list[Path]) -> Stamp:
    """What changes when a run writes."""
    files = [folder / name for given in run_dirs for folder in run_dir.run_folders(given) for name in run_dir.FILES]
    stamps: Stamp = {}
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # not there yet, or just renamed
            stat = path.stat()
            stamps[path] = stat.st_mtime_ns, stat.st_size
    return stamps


def _replace(path: Path, text: str) -> None:
    """Whoever reads the file meanwhile has the old one whole, or the new one."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _need(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f'{", ".join(missing)} must be installed: pip install -e ".[dashboard]" -c constraints.txt')
