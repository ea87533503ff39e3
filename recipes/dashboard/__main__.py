"""Any number of runs on one page, without an account: python -m recipes.dashboard RUN_DIR..."""

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
RELOAD_INTERVAL_S = 10  # of a browser that shows a watched page
OUTPUT_FILE = "dashboard.html"


def main(arguments: list[str]) -> None:
    """Write the page, watch the runs, or make the wandb workspace.

    Raises:
        ConfigError: for a mistake in the arguments, and if there is nothing to show.
    """
    parser = argparse.ArgumentParser(prog="python -m recipes.dashboard", description=__doc__)
    parser.add_argument("run_dirs", nargs="*", type=Path, metavar="RUN_DIR", help="of a run, a comparison or a sweep")
    parser.add_argument("--output", type=Path, help=f"the page; default: {OUTPUT_FILE} in the first RUN_DIR")
    parser.add_argument("--watch", action="store_true", help="update the page whenever a run logs, until Ctrl-C")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="make a wandb workspace instead; needs a login")
    options = parser.parse_args(arguments)
    packages = ["plotly", "jinja2", *(["wandb_workspaces"] if options.wandb is not None else [])]
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise ConfigError(f'{", ".join(missing)} must be installed: pip install -e ".[dashboard]" -c constraints.txt')
    if options.wandb is not None:
        from recipes.dashboard import workspace

        print(f"making a workspace in {options.wandb} ...", flush=True)
        print(f"view online: {workspace.create(options.wandb)}")
        return
    if not options.run_dirs:
        raise ConfigError("there is no run to show: type python -m recipes.dashboard outputs/DATE/TIME")
    output = options.output or next((path for path in options.run_dirs if path.is_dir()), Path()) / OUTPUT_FILE
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}: create it, or use another")
    if options.watch:
        watch(options.run_dirs, output)
    else:
        write(options.run_dirs, output, reported=set())


def write(run_dirs: list[Path], output: Path, reported: set[str], reload_s: int | None = None) -> None:
    """Write the page, and print its contents and those problems that are not yet in `reported`.

    Raises:
        ConfigError: if there is nothing to show.
    """
    from recipes.dashboard import page

    loaded = run_dir.load_runs(run_dirs)
    if loaded.is_empty:
        raise ConfigError("\n".join(["there is nothing to show:", *loaded.problems]))
    for problem in loaded.problems:
        if problem not in reported:
            print(f"warning: {problem}", file=sys.stderr, flush=True)
    reported.update(loaded.problems)
    run_dir.replace_file(output, page.render(loaded, reload_s))
    contents = page.describe_contents(loaded)
    if steps := [run.rows[-1]["step"] for run in loaded.runs if run.rows]:
        contents += f", up to step {max(steps):,}"
    print(f"wrote {output}: {contents}", flush=True)


def watch(run_dirs: list[Path], output: Path) -> None:
    """Write the page whenever a file of a run changes, until Ctrl-C. Waits for runs that do not exist yet."""
    print(f"watching {', '.join(map(str, run_dirs))}; Ctrl-C ends it", flush=True)
    shown: set[tuple[Path, int, int]] | None = None
    reported: set[str] = set()
    try:
        while True:
            with contextlib.suppress(FileNotFoundError):  # a sweep renames the folder of a trial that it runs again
                versions = _file_versions(run_dirs)
                if versions != shown:
                    try:
                        write(run_dirs, output, reported, RELOAD_INTERVAL_S)
                    except ConfigError as error:
                        if str(error) not in reported:
                            print(f"waiting: {error}", flush=True)
                        reported.add(str(error))
                    shown = versions
            time.sleep(WATCH_INTERVAL_S)
    except KeyboardInterrupt:
        print(flush=True)
        if output.exists():
            write(run_dirs, output, reported)  # without reloading


def _file_versions(run_dirs: list[Path]) -> set[tuple[Path, int, int]]:
    """Every file of the runs, with its modification time and size."""
    folders = [folder for given in run_dirs for folder in run_dir.run_folders(given)]
    files = [folder / name for folder in folders for name in run_dir.FILES if (folder / name).exists()]
    return {(file, stat.st_mtime_ns, stat.st_size) for file, stat in zip(files, map(Path.stat, files), strict=True)}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"error: {error.strerror}: {error.filename}: choose another page with --output FILE")
