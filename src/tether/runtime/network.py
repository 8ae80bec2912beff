"""Which network interface leads to the other processes, where the machine's own name does not tell.

gloo listens where the host's name points, and on many machines that is the loopback, where no other host arrives. The
address of the first process says better: the interface that packets to it leave by is the one to listen on.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress

IFNAME = "GLOO_SOCKET_IFNAME"
ELSEWHERE = "192.0.2.1"
"""An address that is on no network, RFC 5737: packets to it take the default route."""
ANY_PORT = 9
LOOPBACK = "127."
SIOCGIFADDR = 0x8915


def choose_interface(master: str, several_hosts: bool) -> None:
    """Set GLOO_SOCKET_IFNAME to the interface that leads to `master`, unless the user has chosen one.

    A machine that knows itself as 127.0.1.1, and is the first of several, listens where its default route leads. With
    one host, or where nothing is found, torch chooses as ever.
    """
    if IFNAME in os.environ or not several_hosts:
        return
    with suppress(OSError):
        own = own_address(master)
        name = interface_of(own_address(ELSEWHERE) if own.startswith(LOOPBACK) else own)
        if name is not None:
            os.environ[IFNAME] = name


def own_address(master: str) -> str:
    """The IPv4 address of this machine that packets to `master` come from; nothing is sent. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, ANY_PORT))
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The interface that has this IPv4 address; None where none has, or the system does not say."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                said = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
                if socket.inet_ntoa(said[20:24]) == address:
                    return name
    return None
