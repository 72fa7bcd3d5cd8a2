"""Ranks that ask a staged group and gloo's for the same: `spawn(SIZE, FOLDER)`. Each rank writes what differs."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from r1mega.parallel import shared_gpu


def rank(at: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    limit = timedelta(seconds=60)
    dist.init_process_group(shared_gpu.register(), store=store, rank=at, world_size=size, timeout=limit)
    gloo = dist.new_group(backend="gloo", timeout=limit)
    differences = {name: case(at, size, gloo) for name, case in CASES.items()}
    Path(folder, f"{at}.json").write_text(json.dumps({name: bool(same) for name, same in differences.items()}))
    dist.destroy_process_group()


def tensor(at: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(at))


def _reduced(at, size, gloo):
    found, expected = tensor(at, 3, 4).t(), tensor(at, 3, 4).t().contiguous()  # found is not contiguous
    dist.all_reduce(found)
    dist.all_reduce(expected, group=gloo)
    return torch.equal(found, expected)


def _broadcast(at, size, gloo):
    found = tensor(at, 5)
    dist.broadcast(found, src=size - 1)
    return torch.equal(found, tensor(size - 1, 5))


def _gathered(at, size, gloo):
    whole = torch.empty(size * 2, 3)
    dist.all_gather_into_tensor(whole, tensor(at, 2, 3))
    return torch.equal(whole, torch.cat([tensor(other, 2, 3) for other in range(size)]))


def _gathered_of_unequal_size(at, size, gloo):
    parts = [torch.empty(other + 1, 2) for other in range(size)]
    dist.all_gather(parts, tensor(at, at + 1, 2))
    return all(torch.equal(part, tensor(other, other + 1, 2)) for other, part in enumerate(parts))


def _scattered_sums(at, size, gloo):
    own = torch.empty(2, 3)
    dist.reduce_scatter_tensor(own, tensor(at, 2 * size, 3))
    return torch.allclose(own, sum(tensor(other, 2 * size, 3) for other in range(size)).split(2)[at], atol=1e-6)


def _scattered_sums_of_unequal_size(at, size, gloo):
    own = torch.empty(at + 1)
    sizes = [other + 1 for other in range(size)]
    dist.reduce_scatter(own, list(tensor(at, sum(sizes)).split(sizes)))
    return torch.allclose(own, sum(tensor(other, sum(sizes)) for other in range(size)).split(sizes)[at], atol=1e-6)


def _exchanged(at, size, gloo):
    # Rank i sends j + 1 rows to rank j.
    sends, receives = [other + 1 for other in range(size)], [at + 1] * size
    found, expected = torch.empty(sum(receives), 2), torch.empty(sum(receives), 2)
    dist.all_to_all_single(found, tensor(at, sum(sends), 2), receives, sends)
    dist.all_to_all_single(expected, tensor(at, sum(sends), 2), receives, sends, group=gloo)
    return torch.equal(found, expected)


def _ring(at, size, gloo):
    # Everybody sends before, and receives before, anybody has waited.
    found = torch.zeros(2, 3).t()
    after, before = (at + 1) % size, (at - 1) % size
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.irecv, found, before), dist.P2POp(dist.isend, tensor(at, 3, 2), after)]
    )
    for work in works:
        work.wait()
    return torch.equal(found, tensor(before, 3, 2))


def _waited_for_twice(at, size, gloo):
    # What is there already is not overwritten either.
    found = torch.zeros(3)
    after, before = (at + 1) % size, (at - 1) % size
    works = [dist.isend(tensor(at, 3), after), dist.irecv(found, before)]
    for work in works:
        work.wait()
    found += 1
    for work in works:
        work.wait()
    return torch.equal(found, tensor(before, 3) + 1) and all(work.is_completed() for work in works)


def _coalesced(at, size, gloo):
    tensors = [tensor(at + 10 * index, index + 1) for index in range(3)]
    with dist._coalescing_manager(device=torch.device("cpu")):
        for each in tensors:
            dist.all_reduce(each)
    expected = [sum(tensor(other + 10 * index, index + 1) for other in range(size)) for index in range(3)]
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(tensors, expected, strict=True))


def _subgroup(at, size, gloo):
    pair = dist.new_group([0, 1])
    found = tensor(at, 4)
    if at < 2:
        dist.all_reduce(found, group=pair)
    return torch.equal(found, tensor(0, 4) + tensor(1, 4) if at < 2 else tensor(at, 4))


def _objects(at, size, gloo):
    found = [None] * size
    dist.all_gather_object(found, {"rank": at})
    return found == [{"rank": other} for other in range(size)]


CASES = {
    function.__name__.strip("_"): function
    for function in (
        _reduced, _broadcast, _gathered, _gathered_of_unequal_size, _scattered_sums, _scattered_sums_of_unequal_size,
        _exchanged, _ring, _waited_for_twice, _coalesced, _subgroup, _objects,
    )
}  # fmt: skip

if __name__ == "__main__":
    mp.spawn(rank, (int(sys.argv[1]), sys.argv[2]), nprocs=int(sys.argv[1]))
