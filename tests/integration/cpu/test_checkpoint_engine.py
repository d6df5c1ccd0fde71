"""The bed's way of the weights to samplers of their own: what arrives is what was sent, bit by bit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")

from verl_on_cpu.checkpoint_engine import OUTSIDE, Bucket, GlooBroadcast, packed, unpacked

Weights = list[tuple[str, "torch.Tensor"]]
# None divides it, so that tensors are split where their elements are.
BUCKET = 1001


@pytest.fixture
def weights() -> Weights:
    """One of each kind: sizes around that of a bucket, dtypes, values that arithmetic would change."""
    generator = torch.Generator().manual_seed(0)
    larger = torch.randn(64, 64, generator=generator)
    return [
        ("larger", larger),
        ("half", larger.half()),
        ("bfloat16", larger[:3].bfloat16()),
        ("transposed", larger[:4].T),
        ("nothing", torch.empty(0, 7)),
        ("scalar", torch.tensor(0.1, dtype=torch.float64)),
        ("bits", torch.tensor([0x7FC00001, 0x80000000 - 2**32, 1], dtype=torch.int32).view(torch.float32)),
        ("fills a bucket", torch.arange(BUCKET).to(torch.uint8)),
        ("float8", larger[:2].to(torch.float8_e4m3fn)),
        ("last of nothing", torch.empty(0, dtype=torch.int64)),
    ]


def assert_same(received: Weights, sent: Weights) -> None:
    assert [name for name, _ in received] == [name for name, _ in sent]
    for (name, got), (_, gave) in zip(received, sent, strict=True):
        assert (got.dtype, got.shape) == (gave.dtype, gave.shape), name
        assert bits(got) == bits(gave), name


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


async def listed(tensors: AsyncIterator[tuple[str, torch.Tensor]]) -> Weights:
    return [each async for each in tensors]


async def kept(buckets: Iterator[Bucket]) -> AsyncIterator[Bucket]:
    for bucket in buckets:
        yield Bucket(bucket.parts, bucket.content.clone(), bucket.is_last)


@pytest.mark.parametrize("size", [1, 7, BUCKET, 10**6])
def test_buckets_of_any_size_hold_the_same_bytes(weights: Weights, size: int) -> None:
    assert_same(asyncio.run(listed(unpacked(kept(packed(weights, size))))), weights)


def test_buckets_are_full_but_the_last_one_and_split_tensors(weights: Weights) -> None:
    buckets = [(len(bucket.content), bucket.is_last, bucket.parts) for bucket in packed(weights, BUCKET)]
    total = sum(weight.nbytes for _, weight in weights)
    assert [size for size, _, _ in buckets] == [BUCKET] * (total // BUCKET) + [total % BUCKET]
    assert [last for _, last, _ in buckets] == [False] * (total // BUCKET) + [True]
    assert sum(part.name == "larger" for _, _, parts in buckets for part in parts) == 64 * 64 * 4 // BUCKET + 1


def test_no_weights_are_one_empty_bucket() -> None:
    assert asyncio.run(listed(unpacked(kept(packed([], BUCKET))))) == []


def test_two_samplers_receive_what_the_learners_first_rank_sends_again_and_again(weights: Weights) -> None:
    learners = [GlooBroadcast(BUCKET, is_master=rank == 0) for rank in range(2)]
    samplers = [GlooBroadcast(BUCKET) for _ in range(2)]
    for sent in (weights, weights[::-1]):
        first, second, *received = synced(learners, samplers, sent)
        assert first == second == []
        for each in received:
            assert_same(each, sent)


def synced(learners: Sequence[GlooBroadcast], samplers: Sequence[GlooBroadcast], weights: Weights) -> list[Weights]:
    """What verl's manager has all engines do, each in its own process, here in a thread: what each one received."""
    engines = [*learners, *samplers]
    metadata = [engine.prepare() for engine in engines]
    of_learners, of_samplers = GlooBroadcast.build_topology(len(learners), len(samplers), metadata)
    assert of_learners["rank"] == [0, *[OUTSIDE] * (len(learners) - 1)]
    arguments = [
        {name: values[number] for name, values in of_group.items()}
        for of_group, group in ((of_learners, learners), (of_samplers, samplers))
        for number in range(len(group))
    ]

    def take_part(number: int) -> Weights:
        engine = engines[number]
        engine.init_process_group(**arguments[number])
        if number >= len(learners):
            return asyncio.run(listed(engine.receive_weights(global_steps=1)))
        remaining = iter(weights)
        asyncio.run(engine.send_weights(remaining, global_steps=1))
        # A rank that sends nothing gathers with the others all the same.
        assert next(remaining, None) is None
        return []

    with ThreadPoolExecutor(len(engines)) as threads:
        received = list(threads.map(take_part, range(len(engines))))
    for engine in engines:
        engine.finalize()
    return received


@pytest.mark.verl
def test_verl_knows_it_by_name() -> None:
    pytest.importorskip("verl")
    from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry

    engine = CheckpointEngineRegistry.new("gloo", bucket_size=BUCKET, is_master=False)
    assert isinstance(engine, (GlooBroadcast, CheckpointEngine))
    assert engine.prepare() is None
