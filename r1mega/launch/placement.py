"""Where the processes of a run's servers go: on which host, at which port, on which GPUs. Integers and names only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Of one process: where it answers, where the ranks of its server meet, and 6 that SGLang 0.5.21 counts on from there.
PORTS_EACH = 10


@dataclass(frozen=True)
class Seat:
    """Of one process: its host (None: this machine), where it answers, and the first GPU there that is its own."""

    host: str | None
    port: int
    first_gpu: int

    @property
    def name(self) -> str:
        """The host as others reach it."""
        return self.host or "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """Of one server: a seat on each of its nodes, and where their ranks meet (None: it has one node)."""

    seats: tuple[Seat, ...]
    rendezvous: str | None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{self.seats[0].name}:{self.seats[0].port}"


def place(
    engines: int,
    *,
    nodes: int,
    ranks_per_node: int,
    hosts: Sequence[str],
    first_port: int,
    first_gpu: int,
    free_port: Callable[[Sequence[int]], int],
) -> list[Place]:
    """A place for each of `engines` servers of `nodes` nodes.

    `hosts` names one for each process in order, server by server; one that is named again takes the next
    `ranks_per_node` GPUs and the next ports of that host. Without hosts all are on this machine, at ports of
    `free_port(taken)`. Raises ValueError where there is not one host for each process.
    """
    if hosts and len(hosts) != engines * nodes:
        raise ValueError(f"hosts: got {len(hosts)}, must be {engines * nodes}, one for each process of a server")
    on_host: Counter[str | None] = Counter()
    taken: list[int] = []
    places = []
    for engine in range(engines):
        seats, meeting = [], []
        for node in range(nodes):
            host = hosts[engine * nodes + node] if hosts else None
            slot = on_host[host]
            on_host[host] += 1
            if host is None:
                port, meet = (_take(free_port, taken) for _ in range(2))
            else:
                port = first_port + PORTS_EACH * slot
                meet = port + 1
            seats.append(Seat(host, port, first_gpu + slot * ranks_per_node))
            meeting.append(meet)
        rendezvous = f"{seats[0].name}:{meeting[0]}" if nodes > 1 else None
        places.append(Place(tuple(seats), rendezvous))
    return places


def _take(free_port: Callable[[Sequence[int]], int], taken: list[int]) -> int:
    taken.append(free_port(taken))
    return taken[-1]
