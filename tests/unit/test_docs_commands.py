"""The commands, links and sizes of the documentation.

Every command of train.py is composed. Those in `sh` blocks are planned too, without starting a rank, unless a comment
on their line or the line before says what they need, such as GPUs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep

import train
from conf.compose import to_config
from conf.schema import Config

ROOT = Path(__file__).parents[2]
RESULT_PAGES = sorted((ROOT / "docs" / "results").glob("*.md"))
TASK_PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "lab_notebook.md"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *TASK_PAGES, *RESULT_PAGES]
LAUNCHERS = ("torchrun", "deepspeed", "srun", "sbatch")
ENTRY_POINTS = ("train.py", "scripts/slurm.sbatch")


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a page.

    Args:
        runs_here: whether it is offered to be typed and a comment names nothing that it needs.
    """

    page: str
    words: tuple[str, ...]
    runs_here: bool

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"

    @property
    def overrides(self) -> list[str] | None:
        """What train.py is given; None for other programs."""
        if self.words[0] not in ("python", *LAUNCHERS):
            return None
        entry = next((index for index, word in enumerate(self.words) if word in ENTRY_POINTS), None)
        return None if entry is None else [word for word in self.words[entry + 1 :] if not word.startswith("-")]

    @property
    def module(self) -> str | None:
        """Of python -m MODULE."""
        return self.words[2] if self.words[:2] == ("python", "-m") else None


def commands_of(page: Path) -> list[Command]:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
        needs = False
        for line in block.splitlines():
            needs = needs or "needs " in line.partition("#")[2]
            for part in line.split("&&"):
                if words := tuple(shlex.split(part, comments=True)):
                    commands.append(Command(page.name, words, runs_here=not needs))
            needs = needs and not shlex.split(line, comments=True)
    shown = re.findall(r"^(?:    |\$ )((?:python|torchrun) .*)$", text, re.M) + re.findall(
        r"`(python (?:train|-m) ?[^`]+)`", text
    )
    commands += [Command(page.name, tuple(shlex.split(line, comments=True)), runs_here=False) for line in shown]
    return list(dict.fromkeys(commands))


COMMANDS = [command for page in PAGES for command in commands_of(page)]
TRAINING = [command for command in COMMANDS if command.overrides is not None]


@pytest.fixture(autouse=True)
def _somebody_elses_folder(monkeypatch, tmp_path):
    """A folder with texts, on a machine without GPUs."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("Sequences too long for one GPU. " * 2000)
    for name in ("texts/one.jsonl", "chats/one.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def _composition():
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def first_values(overrides: list[str]) -> list[str]:
    """Of a sweep's overrides, those of its first trial."""
    chosen = []
    for override in OverridesParser.create().parse_overrides([word for word in overrides if word != "..."]):
        value = override.value()
        if isinstance(value, IntervalSweep):
            chosen.append(f"{override.key_or_group}={value.start}")
        elif override.is_sweep_override():
            chosen.append(f"{override.key_or_group}={next(iter(override.sweep_string_iterator()))}")
        else:
            chosen.append(str(override.input_line))
    return chosen


def composed(overrides: list[str]) -> Config:
    return to_config(hydra.compose("config", overrides))


@pytest.mark.usefixtures("_composition")
@pytest.mark.parametrize("command", {tuple(one.overrides or ()): one for one in TRAINING}.values(), ids=str)
def test_command_composes(command: Command):
    assert command.overrides is not None
    composed(first_values(command.overrides))


@pytest.mark.usefixtures("_composition")
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, id=str(command), marks=() if command.page == "README.md" else pytest.mark.slow)
        for command in TRAINING
        if command.runs_here
    ],
)
def test_command_that_names_no_need_can_run_on_a_laptop(command: Command, capsys, tmp_path, tiny_llama: Path):
    assert command.overrides is not None
    overrides = first_values(command.overrides)
    if "recipe=plan" not in overrides:  # its cluster has the ranks
        overrides.append("launch.num_ranks=4")
    for setting in ("model.path=", "evaluate.model="):
        overrides = [f"{setting}{tiny_llama}" if word.startswith(setting) else word for word in overrides]
    config = composed(overrides)
    config.explain = True
    train.execute(config, overrides, tmp_path / "run")
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.words[0] in LAUNCHERS], ids=str)
def test_command_of_a_launcher_says_what_it_needs(command: Command):
    assert not command.runs_here


def test_modules_of_commands_exist():
    modules = {command.module for command in COMMANDS if command.module}
    assert len(modules) > 10
    assert [module for module in sorted(modules) if importlib.util.find_spec(module) is None] == []


def test_the_main_commands_are_found():
    typed = {" ".join(command.words) for command in COMMANDS if command.runs_here}
    assert {"python train.py +experiment=ra_sp", "python -m recipes.dashboard RUN_DIR"} <= typed
    assert len(TRAINING) > 50


@pytest.mark.parametrize(
    ("name", "most"), [("README.md", 150), ("docs/performance.md", 250), ("docs/architecture.md", 150)]
)
def test_page_is_short(name: str, most: int):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= most


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path):
    folders = "conf|data|docs|hydra_plugins|recipes|ring_attention|scripts|tests|wandb_sweeps"
    named = re.findall(
        rf"`((?:{folders})/[\w/.-]+\.(?:py|yaml|sh|sbatch|json|jsonl|md|svg|png))", page.read_text(encoding="utf-8")
    )
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


def test_every_page_is_linked_from_the_readme_or_from_another_page():
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+\.md[^)\s]*)\)", page.read_text(encoding="utf-8"))
    }
    assert [page.name for page in PAGES[1:] if page.resolve() not in linked] == []
