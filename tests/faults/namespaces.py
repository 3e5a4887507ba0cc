"""Two nodes on this machine: network namespaces with addresses of their own, joined by a cable."""

import ctypes
import functools
import itertools
import os
import shutil
import subprocess
from types import TracebackType

INTERFACE = "cable"  # in both namespaces
_SUBNET = "10.77.0"
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()


@functools.cache
def why_not() -> str | None:
    """Why there are no namespaces here; None if there are."""
    if shutil.which("ip") is None:
        return "the command ip is not installed"
    try:
        with Nodes():
            return None
    except subprocess.CalledProcessError as error:
        return f"no network namespace can be made: {error.stderr.strip()}"


def as_root() -> list[str]:
    """What goes before a command that needs the rights of root; nothing if it has them, or cannot get them."""
    new = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
    if os.geteuid() == 0 or shutil.which("unshare") is None:
        return []
    if subprocess.run([*new, "true"], capture_output=True).returncode != 0:
        return []
    return [*new, "sh", "-c", 'mount -t tmpfs tmpfs /run && ip link set lo up && exec "$0" "$@"']


class Nodes:
    """Namespaces 0 and 1. A context: they end with it, and so does what is still sent between them."""

    def __init__(self) -> None:
        number = next(_numbers)
        self.names = [f"pe-{os.getpid()}-{number}-{node}" for node in range(2)]

    def __enter__(self) -> "Nodes":
        try:
            for name in self.names:
                ip("netns", "add", name)
            first, second = self.names
            ends = ("link", "add", INTERFACE, "netns", first, "type", "veth")
            ip(*ends, "peer", "name", INTERFACE, "netns", second)
            for node, name in enumerate(self.names):
                ip("-n", name, "address", "add", f"{address(node)}/24", "dev", INTERFACE)
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", INTERFACE, "up")
        except subprocess.CalledProcessError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, _: type | None, __: BaseException | None, ___: TracebackType | None) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def command(self, node: int) -> list[str]:
        """What goes before a command that runs in a node."""
        return ["ip", "netns", "exec", self.names[node]]

    def mend(self) -> None:
        """Joins the nodes as at first."""
        for node, name in enumerate(self.names):
            for undone in (
                ["ip", "-n", name, "route", "delete", "blackhole", address(1 - node)],
                ["tc", "-n", name, "qdisc", "delete", "dev", INTERFACE, "root"],
            ):
                subprocess.run(undone, capture_output=True)  # most were never done
            ip("-n", name, "link", "set", INTERFACE, "up")


def address(node: int) -> str:
    return f"{_SUBNET}.{node + 1}"


def ip(*arguments: str) -> None:
    """Runs the command ``ip``. Raises CalledProcessError."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def enter(name: str) -> None:
    """Moves this thread, and those that it starts, into a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {name!r}")


# What a process does to the network of its own node, the second one.


def cut(seconds: float | None = None) -> None:
    """Takes the cable out; for so many seconds, or for good."""
    ip("link", "set", INTERFACE, "down")
    if seconds is not None:
        subprocess.Popen(["sh", "-c", f"sleep {seconds}; ip link set {INTERFACE} up"])


def send_nothing(node: int) -> None:
    """Loses all that goes to another node, without a word; what comes from there arrives."""
    ip("route", "add", "blackhole", address(node))


def slow_down(kilobits: int) -> None:
    """Sends at most so many kilobits a second."""
    limit = f"tc qdisc add dev {INTERFACE} root tbf rate {kilobits}kbit burst 4kb latency 2s"
    subprocess.run(limit.split(), check=True, capture_output=True)
