from __future__ import annotations

from collections.abc import Sequence

import pytest

from r1mega.launch.placement import PORTS_EACH, Place, Seat, place


def places(engines: int, nodes: int = 1, ranks: int = 4, hosts: Sequence[str] = (), first_gpu: int = 0) -> list[Place]:
    return place(
        engines,
        nodes=nodes,
        ranks_per_node=ranks,
        hosts=hosts,
        first_port=30000,
        first_gpu=first_gpu,
        free_port=lambda taken: 20000 + len(taken),
    )


def test_servers_on_this_machine_share_its_gpus() -> None:
    found = places(3, first_gpu=2)
    assert [where.seats[0].first_gpu for where in found] == [2, 6, 10]
    ports = [where.seats[0].port for where in found]
    assert len(set(ports)) == 3 and [where.url for where in found] == [f"http://127.0.0.1:{port}" for port in ports]
    assert all(where.rendezvous is None for where in found)


def test_servers_of_two_nodes_each() -> None:
    found = places(2, nodes=2, ranks=8, hosts=["a", "b", "c", "d"])
    assert found == [
        Place((Seat("a", 30000, 0), Seat("b", 30000, 0)), "a:30001"),
        Place((Seat("c", 30000, 0), Seat("d", 30000, 0)), "c:30001"),
    ]
    assert [where.url for where in found] == ["http://a:30000", "http://c:30000"]


def test_a_host_that_is_named_again() -> None:
    found = places(4, hosts=["a", "b", "a", "b"])
    assert [where.seats for where in found] == [
        (Seat("a", 30000, 0),), (Seat("b", 30000, 0),), (Seat("a", 30010, 4),), (Seat("b", 30010, 4),)
    ]  # fmt: skip


@pytest.mark.parametrize(("engines", "nodes", "hosts"), [(3, 2, []), (4, 2, ["a", "a", "b", "c", "a", "a", "c", "b"])])
def test_no_two_processes_share_a_port_or_a_gpu(engines: int, nodes: int, hosts: list[str]) -> None:
    found = places(engines, nodes, 2, hosts)
    seats = [seat for where in found for seat in where.seats]
    listening = [(seat.name, seat.port) for seat in seats]
    listening += [(name, int(port)) for name, _, port in (str(where.rendezvous).rpartition(":") for where in found)]
    assert len(set(listening)) == len(listening)
    gpus = [(seat.name, seat.first_gpu + rank) for seat in seats for rank in range(2)]
    assert len(set(gpus)) == len(gpus)
    assert len({where.rendezvous for where in found}) == engines


def test_ports_that_sglang_counts_on_from_the_meeting_point_are_nobody_elses() -> None:
    first, second = (where.seats[0].port for where in places(2, hosts=["a", "a"]))
    meeting, derived = first + 1, 6
    assert second > meeting + derived and second - first == PORTS_EACH


def test_hosts_that_do_not_suffice() -> None:
    with pytest.raises(ValueError, match="hosts: got 3, must be 4, one for each process of a server"):
        places(2, nodes=2, hosts=["a", "b", "c"])
