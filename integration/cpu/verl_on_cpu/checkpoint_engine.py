"""The way of the weights to samplers on devices of their own: verl has it for GPUs and NPUs, here it is gloo's.

Rank 0 of the learner broadcasts to all of the samplers' workers, bucket by bucket: a header that says which bytes of
which tensors follow, then the bytes. They go as they are, in whatever dtype the learner hands them out.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed
import wrapt

BACKEND = "gloo"
TIMEOUT = timedelta(minutes=5)
# The bed is one machine.
HOST = "127.0.0.1"
OUTSIDE = -1


def install() -> None:
    wrapt.register_post_import_hook(register, "verl.checkpoint_engine.base")


def register(base: ModuleType) -> None:
    """Known to verl as ``checkpoint_engine.backend=gloo``."""
    base.CheckpointEngineRegistry.register(BACKEND)(
        type("GlooCheckpointEngine", (GlooBroadcast, base.CheckpointEngine), {})
    )


class Part(NamedTuple):
    """Bytes of a tensor, from ``start`` on."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start: int
    size: int


@dataclass(frozen=True)
class Bucket:
    """What is sent at once: ``content`` has the bytes of the parts, one after the other, until the next bucket."""

    parts: list[Part]
    content: torch.Tensor
    is_last: bool


def packed(weights: Iterable[tuple[str, torch.Tensor]], bucket_size: int) -> Iterator[Bucket]:
    """Fill buckets of ``bucket_size`` bytes; a tensor that does not fit into what is left of one is split."""
    content = torch.empty(bucket_size, dtype=torch.uint8)
    parts: list[Part] = []
    filled = 0
    for name, weight in weights:
        data = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        start = 0
        while True:
            if filled == bucket_size:
                yield Bucket(parts, content, is_last=False)
                parts, filled = [], 0
            size = min(len(data) - start, bucket_size - filled)
            content[filled : filled + size] = data[start : start + size]
            parts.append(Part(name, weight.shape, weight.dtype, start, size))
            filled, start = filled + size, start + size
            if start == len(data):
                break
    yield Bucket(parts, content[:filled], is_last=True)


async def unpacked(buckets: AsyncIterator[Bucket]) -> AsyncIterator[tuple[str, torch.Tensor]]:
    """Each tensor when its last byte is there."""
    data = torch.empty(0, dtype=torch.uint8)
    async for bucket in buckets:
        offset = 0
        for part in bucket.parts:
            if part.start == 0:
                data = torch.empty(part.shape.numel() * part.dtype.itemsize, dtype=torch.uint8)
            end = part.start + part.size
            data[part.start : end] = bucket.content[offset : offset + part.size]
            offset += part.size
            if end == len(data):
                yield part.name, data.view(part.dtype).reshape(part.shape)


class GlooBroadcast:
    """verl's interface of a checkpoint engine; each sync has a process group of its own, as samplers come and go."""

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.bucket_size = bucket_size
        self.is_master = is_master
        self._store: torch.distributed.TCPStore | None = None
        self._group: torch.distributed.ProcessGroupGloo | None = None
        self._rank = OUTSIDE

    def prepare(self) -> int | None:
        """The port at which the group meets, of whoever opened it."""
        if not self.is_master:
            return None
        self._store = torch.distributed.TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        return int(self._store.port)

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[int | None]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """The learner's first rank and all samplers are in the group, in this order."""
        (port,) = (each for each in metadata if each is not None)
        members = 1 + rollout_world_size

        def arguments(ranks: list[int]) -> dict[str, list[Any]]:
            return {"rank": ranks, "world_size": [members] * len(ranks), "port": [port] * len(ranks)}

        return arguments([0] + [OUTSIDE] * (actor_wg_world_size - 1)), arguments(list(range(1, members)))

    def init_process_group(self, rank: int, world_size: int, port: int) -> None:
        self._rank = rank
        if rank == OUTSIDE:
            return
        if self._store is None:
            self._store = torch.distributed.TCPStore(HOST, port, is_master=False, timeout=TIMEOUT)
        store = torch.distributed.PrefixStore("weights", self._store)
        self._group = torch.distributed.ProcessGroupGloo(store, rank, world_size, TIMEOUT)

    def finalize(self) -> None:
        self._group = self._store = None

    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, Any]:
        if self._rank == OUTSIDE:
            # The ranks gather each tensor together.
            for _ in weights:
                pass
            return {}
        for bucket in packed(weights, self.bucket_size):
            await asyncio.to_thread(self._send, bucket)
        return {}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        async for name, weight in unpacked(self._buckets()):
            yield name, weight

    async def _buckets(self) -> AsyncIterator[Bucket]:
        is_last = False
        while not is_last:
            bucket = await asyncio.to_thread(self._receive)
            is_last = bucket.is_last
            yield bucket

    def _send(self, bucket: Bucket) -> None:
        header = torch.frombuffer(bytearray(pickle.dumps((bucket.parts, bucket.is_last))), dtype=torch.uint8)
        self._broadcast(torch.tensor([len(header), len(bucket.content)]))
        self._broadcast(header)
        self._broadcast(bucket.content)

    def _receive(self) -> Bucket:
        sizes = torch.zeros(2, dtype=torch.int64)
        self._broadcast(sizes)
        header, content = (torch.empty(size, dtype=torch.uint8) for size in sizes.tolist())
        self._broadcast(header)
        self._broadcast(content)
        parts, is_last = pickle.loads(header.numpy().tobytes())
        return Bucket(parts, content, is_last)

    def _broadcast(self, tensor: torch.Tensor) -> None:
        """From rank 0."""
        assert self._group is not None
        if len(tensor):
            self._group.broadcast(tensor, 0).wait()
