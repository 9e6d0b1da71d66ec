"""A real link with a rate each way: a network namespace for the device, and token buckets on the interfaces.

Needs Linux, root, and the commands `ip` and `tc`.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

__all__ = ["ShapedLink", "ShapingUnavailable", "shaped_link"]


class ShapingUnavailable(Exception):
    """This machine cannot shape a link: no root, no tools, or a kernel without them."""


def _sh(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ShapingUnavailable(f"{' '.join(map(str, command))}: {done.stderr.strip()}")


class ShapedLink:
    """A network namespace that plays the device. Both ways may have a rate.

    Attributes:
        inside: put these words before a command to run it on the device.
        host: the cloud's IP address.
        device: name of the device's interface, inside.
    """

    def __init__(self, name: str, host: str) -> None:
        self.name, self.host = name, host
        self.inside = ("ip", "netns", "exec", name)
        self.device = f"{name[:12]}-d"
        self._near = f"{name[:12]}-c"
        self._shaped: set[str] = set()

    def bytes_out(self) -> int:
        """Bytes that have left the device, counted by its interface: headers of Ethernet, IP and TCP included."""
        return self._count("tx_bytes")

    def bytes_in(self) -> int:
        """Bytes that have come to the device, counted likewise."""
        return self._count("rx_bytes")

    def set_rate(self, bits_per_s: int) -> None:
        """Set the rate out of the device. A packet that would wait for more than two seconds is dropped."""
        self._shape(self.inside, self.device, bits_per_s)

    def set_rate_in(self, bits_per_s: int) -> None:
        """Set the rate to the device, likewise."""
        self._shape((), self._near, bits_per_s)

    def _count(self, what: str) -> int:
        command = [*self.inside, "cat", f"/sys/class/net/{self.device}/statistics/{what}"]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    def _shape(self, inside: tuple[str, ...], device: str, bits_per_s: int) -> None:
        verb = "change" if device in self._shaped else "add"
        rate = ("rate", f"{bits_per_s}bit", "burst", "1600", "latency", "2s")
        _sh(*inside, "tc", "qdisc", verb, "dev", device, "root", "tbf", *rate)
        self._shaped.add(device)


@contextlib.contextmanager
def shaped_link() -> Iterator[ShapedLink]:
    """A cable between this machine and a namespace, for the length of a block.

    Raises:
        ShapingUnavailable: see the class.
    """
    if os.name != "posix" or os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        raise ShapingUnavailable("it needs root, ip and tc")
    number = os.getpid() % 250
    link = ShapedLink(f"bneck{os.getpid()}", f"10.213.{number}.1")
    near, far = f"{link.name[:12]}-c", f"{link.name[:12]}-d"
    _sh("ip", "netns", "add", link.name)
    try:
        _sh("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", link.name)
        _sh("ip", "addr", "add", f"{link.host}/30", "dev", near)
        _sh("ip", "link", "set", near, "up")
        _sh(*link.inside, "ip", "addr", "add", f"10.213.{number}.2/30", "dev", far)
        _sh(*link.inside, "ip", "link", "set", far, "up")
        yield link
    finally:
        subprocess.run(["ip", "link", "del", near], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", link.name], capture_output=True, check=False)
