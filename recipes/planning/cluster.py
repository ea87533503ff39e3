"""The cluster that a forecast is of: GPUs, hosts and links, which need not be here.

`conf/clusters/` has a YAML file for each kind of host, with one host in it. A user writes `8xh200`, `2x8xh100`, or the
path of a file of the same fields. The folder is not called cluster: Hydra would take `cluster=8xh200` for one of its
options.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema import Config, ConfigError
from recipes.planning.measured import TABLES, MeasuredSpeeds, is_positive, parse_measured
from recipes.planning.throughput import DEVICES, Gpu, kind_of

FOLDER = Path(__file__).parents[2] / "conf" / "clusters"
UNKNOWN, LIKE = "a100_80gb", "h200"  # what a GPU that is not known counts as, and one without a file
FORMS = "8xh200, 2x8xh100 (hosts x GPUs x kind), or a path that ends in .yaml"


@dataclass(frozen=True)
class Cluster:
    """Equal hosts of equal GPUs. Links are those of one GPU, in one direction.

    Args:
        gpu: a name in `recipes.planning.throughput.DEVICES`.
        memory_gib: of one GPU, as CUDA reports it.
        link_within_gb_per_s: what a GPU attains to another of its host, in 1e9 bytes per second.
        link_between_gb_per_s: the same to a GPU of another host.
        latency_us: of one message, for posting, launching and waiting.
        host_memory_gib: of one host.
        is_measured: whether speeds of such GPUs were measured, rather than taken from data sheets.
        measured: what recipe=calibrate measured on such a host; None: forecasts use the built-in tables.

    Raises:
        ConfigError: on construction, for an unknown GPU or a number that cannot be.
    """

    gpu: str
    gpus_per_host: int
    hosts: int
    memory_gib: float
    link_within_gb_per_s: float
    link_between_gb_per_s: float
    latency_us: float
    host_memory_gib: float
    is_measured: bool = False
    measured: MeasuredSpeeds | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.gpu, str) or self.gpu not in DEVICES:
            raise ConfigError(f"cluster.gpu={self.gpu} is not known: use {', '.join(DEVICES)}")
        for name in ("gpus_per_host", "hosts"):
            if not isinstance(value := getattr(self, name), int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"cluster.{name}={value} must be a whole number from 1: type cluster={FORMS}")
        for name in ("memory_gib", "link_within_gb_per_s", "link_between_gb_per_s", "host_memory_gib"):
            if not is_positive(value := getattr(self, name)):
                raise ConfigError(f"cluster.{name}={value} must be a number above 0: {_advice(name)}")
        if self.latency_us != 0 and not is_positive(self.latency_us):
            raise ConfigError(f"cluster.latency_us={self.latency_us} must be a number from 0: H100s have 20")
        if not isinstance(self.is_measured, bool):
            raise ConfigError(f"cluster.is_measured={self.is_measured} must be true or false: type false if not sure")

    @property
    def num_gpus(self) -> int:
        return self.hosts * self.gpus_per_host

    @property
    def spec(self) -> Gpu:
        return DEVICES[self.gpu]

    @property
    def ranks_per_device(self) -> int:
        """Ranks that share a device's data-sheet speeds: those of a host share its CPU."""
        return self.gpus_per_host if self.gpu == "cpu" else 1

    def __str__(self) -> str:
        hosts = f"{self.hosts} hosts of " if self.hosts > 1 else ""
        speeds = "" if self.is_measured else "; speeds of such GPUs were not measured"
        if self.measured:
            speeds = f"; measured on {self.measured.about}"
        return (
            f"{hosts}{self.gpus_per_host} x {self.spec.device_name}, {self.memory_gib:g} GiB each; "
            f"{self.link_within_gb_per_s:g} GB/s within a host, {self.link_between_gb_per_s:g} between hosts{speeds}"
        )


def parse_cluster(text: str) -> Cluster:
    """The cluster that a user typed.

    Args:
        text: `8xh200`, `2x8xh100` or `h200` (one host, as in its file), or the path of a YAML file.

    Raises:
        ConfigError: for another form, an unknown kind of GPU, more GPUs a host than its file has, or a file that
            cannot be read.
    """
    if text.endswith((".yaml", ".yml")):
        return _load(Path(text), text)
    parts = re.fullmatch(r"(?:(?:(\d+)x)?(\d+)x)?([a-z]\w*)", text)
    if parts is None:
        raise ConfigError(f"cluster={text} is not of a known form: use {FORMS}")
    hosts, gpus, kind = parts.groups()
    ready = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if kind not in ready:
        raise ConfigError(
            f"cluster={text} names {kind}, of which there is no file: use {', '.join(ready)}, or copy "
            f"conf/clusters/h200.yaml, change its numbers, and type cluster=MINE.yaml"
        )
    given = {name: int(number) for name, number in (("hosts", hosts), ("gpus_per_host", gpus)) if number is not None}
    usual = _load(FOLDER / f"{kind}.yaml", text)
    cluster = dataclasses.replace(usual, **given)
    if kind != "cpu" and cluster.gpus_per_host > usual.gpus_per_host:  # the link of a whole host would be a guess
        num_hosts = -(-cluster.num_gpus // usual.gpus_per_host)
        raise ConfigError(
            f"cluster={text} has hosts of {cluster.gpus_per_host} GPUs, and those of conf/clusters/{kind}.yaml have "
            f"{usual.gpus_per_host}: type cluster={num_hosts}x{usual.gpus_per_host}x{kind} (hosts x GPUs x kind), or "
            "copy the file, change its gpus_per_host and links, and type cluster=MINE.yaml"
        )
    return cluster


def cluster_of_ranks(
    device_name: str, memory_gib: float, num_ranks: int, ranks_per_host: int, typed: str | None = None
) -> Cluster:
    """The ranks of a run, as a cluster: with the numbers of `conf/clusters/` for such devices.

    A kind without a file has the links of H200s, and a GPU that is not known counts as an A100.

    Args:
        typed: a cluster of such devices that a user typed, whose numbers count instead.

    Raises:
        ConfigError: if it cannot be read, or is of other devices.
    """
    kind = kind_of(device_name, memory_gib) or UNKNOWN
    path = FOLDER / f"{kind}.yaml"
    ready = parse_cluster(typed) if typed else _load(path if path.exists() else FOLDER / f"{LIKE}.yaml", kind)
    if typed and ready.gpu != kind:
        raise ConfigError(
            f"cluster={typed} is of gpu={ready.gpu}, but the ranks are on {device_name}: type recipe=plan to plan for "
            "other GPUs, or leave it out"
        )
    return dataclasses.replace(
        ready,
        gpu=kind,
        gpus_per_host=ranks_per_host,
        hosts=-(-num_ranks // ranks_per_host),
        memory_gib=round(memory_gib, 1),
        is_measured=ready.is_measured and ready.gpu == kind,
    )


def calibration_refusal(device_name: str, num_ranks: int, ranks_per_host: int) -> str | None:
    """Why recipe=calibrate does not measure these ranks; None if it does."""
    if kind_of(device_name, 0) is None:
        return (
            f"recipe=calibrate does not know {device_name}: add its data sheet's peak and memory to GPUS in "
            "recipes/planning/throughput.py and conf/schema.py"
        )
    if num_ranks > ranks_per_host:
        return (
            f"recipe=calibrate measures one host, not the {num_ranks // ranks_per_host} of these {num_ranks} ranks: "
            "type python train.py recipe=calibrate on one of them"
        )
    return None


def calibration_file(config: Config, run_dir: Path) -> Path:
    """The file that recipe=calibrate writes. Raises ConfigError if it exists: it may hold measurements and edits."""
    path = Path(config.calibrate.output or run_dir / "cluster.yaml")
    if path.exists():
        typed = f"calibrate.output={path}" if config.calibrate.output else path
        raise ConfigError(
            f"{typed} exists, and recipe=calibrate replaces no file: type another calibrate.output=FILE.yaml, or "
            "remove it"
        )
    return path


def cluster_text(cluster: Cluster, comment: str) -> str:
    """A cluster's YAML file, which `parse_cluster` reads."""
    fields = dataclasses.asdict(cluster)
    if cluster.measured is None:
        del fields["measured"]
    else:
        for table in TABLES:
            fields["measured"][table] = [list(row) for row in getattr(cluster.measured, table)]
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return lines + yaml.safe_dump(fields, sort_keys=False, default_flow_style=None, width=120)


def _load(path: Path, typed: str) -> Cluster:
    try:
        fields: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, OmegaConfBaseException, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"cluster={typed} cannot be read ({reason}): use {FORMS}") from error
    known = {spec.name: spec for spec in dataclasses.fields(Cluster)}
    if not isinstance(fields, dict):
        raise ConfigError(f"cluster={typed} has no fields with values: use {', '.join(known)}")
    needed = [name for name, spec in known.items() if spec.default is dataclasses.MISSING]
    lacking, unknown = [name for name in needed if name not in fields], [str(n) for n in fields if n not in known]
    wrong = [f"{what} {', '.join(names)}" for what, names in (("has", unknown), ("lacks", lacking)) if names]
    if wrong:
        raise ConfigError(f"cluster={typed} {' and '.join(wrong)}: use {', '.join(known)}")
    measured = fields.get("measured")
    return Cluster(**{**fields, "measured": None if measured is None else parse_measured(measured, typed)})


def _advice(name: str) -> str:
    if name.startswith("link"):
        return "GB/s of one GPU in one direction; a cluster without links between its hosts is one of hosts=1"
    return "GiB of one host" if name.startswith("host") else "GiB of one GPU, as CUDA reports it; H100s have 79.2"
