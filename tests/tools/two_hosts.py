"""Two hosts on one machine: network namespaces joined by a cable that can be cut. Needs root and iproute2."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

CABLE = "eth0"  # its name on both hosts


def why_not() -> str:
    """Why this machine cannot create network namespaces; empty if it can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "two hosts need root and iproute2"
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=10)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    _ip("netns", "delete", name)
    return ""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=10)


@dataclass(frozen=True)
class Hosts:
    """Two hosts at 10.77.0.1 and 10.77.0.2, which reach only each other."""

    names: tuple[str, str]
    addresses: tuple[str, str] = ("10.77.0.1", "10.77.0.2")

    def command(self, host: int, *command: str) -> list[str]:
        """The command line that runs `command` on a host."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def cut(self) -> None:
        """Unplug the cable."""
        _ip("-netns", self.names[0], "link", "set", CABLE, "down")

    def mend(self) -> None:
        """Plug it in again."""
        _ip("-netns", self.names[0], "link", "set", CABLE, "up")


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """The hosts, which exist inside the block."""
    hosts = Hosts((f"ring{os.getpid()}a", f"ring{os.getpid()}b"))
    with contextlib.ExitStack() as stack:
        for name in hosts.names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
        first, second = hosts.names
        _ip("link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second)
        for name, address in zip(hosts.names, hosts.addresses, strict=True):
            _ip("-netns", name, "address", "add", f"{address}/24", "dev", CABLE)
            for link in ("lo", CABLE):
                _ip("-netns", name, "link", "set", link, "up")
        yield hosts
