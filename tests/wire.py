"""Two hosts on one machine: network namespaces, and between them a wire that delays, loses, or is cut.

    with two_hosts(delay=0.02, loss=0.01) as hosts:
        hosts.start(0, command, environment, log)      the command, on the first host
        hosts.cut() · hosts.mend()                     the wire is pulled out, and put back

Each host has a network of its own with one interface, whose packets this process carries to the other: what a kernel
without `netem` cannot do, a few lines in between can. Packets keep their order. Wants root and /dev/net/tun.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ADDRESSES = ("10.77.0.1", "10.77.0.2")
TUN = Path("/dev/net/tun")
TUNSETIFF = 0x400454CA
IFF_TUN_NO_PI = 0x1001
PACKET = 65536
SEED = 8


def why_not() -> str | None:
    """Why this machine cannot make two hosts, or None."""
    if os.geteuid() != 0:
        return "network namespaces want root"
    if not TUN.exists():
        return f"there is no {TUN}"
    try:
        tried = subprocess.run(["ip", "netns", "add", "tether-try"], capture_output=True, text=True, check=False)
        if tried.returncode == 0:
            subprocess.run(["ip", "netns", "del", "tether-try"], check=False)
            os.close(_interface("tether-try"))
    except OSError as error:
        return f"no network namespaces here: {error}"
    return None if tried.returncode == 0 else f"no network namespaces here: {tried.stderr.strip()}"


@dataclass
class Hosts:
    """Two hosts, their wire, and what was started on them."""

    names: tuple[str, str]
    ends: tuple[int, int]
    delay: float
    loss: float
    carried: int = 0
    lost: int = 0
    _cut: bool = False
    _over: bool = False
    _started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, host: int, command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen:
        """Start a command on one of the hosts; what it says goes into the log."""
        with log.open("w") as said:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *command],
                env=dict(environment), stdout=said, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        self._started.append(process)
        return process

    def cut(self) -> None:
        """From now on nothing arrives."""
        self._cut = True

    def mend(self) -> None:
        self._cut = False

    def interface(self, host: int, state: Literal["up", "down"]) -> None:
        """Take down a host's interface, with its routes, or bring it up again."""
        _ip("-n", self.names[host], "link", "set", _port(self.names[host]), state)

    def end(self) -> None:
        """Kill what still runs, and stop carrying."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._over = True

    def carry(self) -> None:
        """Take packets from each end to the other, `delay` seconds later."""
        draw = random.Random(SEED)
        under_way: deque[tuple[float, int, bytes]] = deque()
        while not self._over:
            patience = max(0.0, under_way[0][0] - time.monotonic()) if under_way else 0.05
            ready, _, _ = select.select(self.ends, [], [], patience)
            for end in ready:
                packet = os.read(end, PACKET)
                self.carried += 1
                if self._cut or draw.random() < self.loss:
                    self.lost += 1
                    continue
                other = self.ends[1 - self.ends.index(end)]
                under_way.append((time.monotonic() + self.delay, other, packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, end, packet = under_way.popleft()
                if not self._cut:
                    with suppress(OSError):  # its interface is down
                        os.write(end, packet)


@contextmanager
def two_hosts(delay: float = 0.0, loss: float = 0.0) -> Iterator[Hosts]:
    """Two hosts with `ADDRESSES`, as long as the block runs; what was started on them ends with it."""
    names = (f"tether-{os.getpid()}-a", f"tether-{os.getpid()}-b")
    with ExitStack() as stack:
        ends = tuple(stack.enter_context(_host(name, at)) for name, at in zip(names, ADDRESSES, strict=True))
        hosts = Hosts(names, (ends[0], ends[1]), delay, loss)
        wire = threading.Thread(target=hosts.carry, daemon=True)
        wire.start()
        try:
            yield hosts
        finally:
            hosts.end()
            wire.join(5.0)


@contextmanager
def _host(name: str, address: str) -> Iterator[int]:
    """A namespace with one interface; yields our end of it."""
    port = _port(name)
    _ip("netns", "add", name)
    try:
        end = _interface(port)
        try:
            _ip("link", "set", port, "netns", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", port)
            _ip("-n", name, "link", "set", port, "up")
            yield end
        finally:
            os.close(end)
    finally:
        _ip("netns", "del", name)


def _port(name: str) -> str:
    return f"tw{os.getpid()}{name[-1]}"


def _interface(name: str) -> int:
    """A new network interface, as the file whose reads are what it sends."""
    end = os.open(TUN, os.O_RDWR)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN_NO_PI))
    return end


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
