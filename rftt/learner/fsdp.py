"""Manage ranks and shard models over them with FSDP2. A single process uses the same code path.

There is always a process group and every model is always sharded, so world size 1 tests the code
that a cluster runs. Gradients are SUMMED over ranks and not averaged, because losses are divided by
one global count before `backward`. Gloo does not support PREMUL_SUM, hence the plain SUM below.
"""

from __future__ import annotations

import gc
import math
import os
import socket
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from random import Random
from threading import Event, Thread
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rftt.batch import Batch
from rftt.learner.lora import lora_config, merged
from rftt.learner.prefix_tree import tree_microbatches
from rftt.run.files import one_line
from rftt.types import UserError

TIMEOUT = timedelta(hours=4)
"""Search lengths are skewed, so a rank may wait for long. NCCL's default is 10 minutes."""
FORMING = timedelta(seconds=25)
"""Time within which all ranks must start if they are not started by torchrun. Waiting for the first
rank and then for the others takes less than a minute."""
GROUP_KEYS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
"""Environment variables that describe a process group."""
Number = TypeVar("Number", float, Tensor)
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all ranks. Every method is collective: all ranks call it in order."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files."""
        return self.rank == 0

    def sum(self, x: Number) -> Number:
        """Return the sum of `x` over all ranks. A tensor is summed element by element."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def max(self, x: Number) -> Number:
        """Return the maximum of `x` over all ranks."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def gather(self, obj: Any) -> list[Any]:
        """Return every rank's object, in rank order, on every rank."""
        gathered = [None] * self.size
        dist.all_gather_object(gathered, obj)
        return gathered

    def gather_or_raise(self, work: Callable[[], T]) -> list[T]:
        """Return every rank's result of `work`, in rank order.

        A UserError on one rank is raised on all ranks, so that none waits for ever.
        """
        found: list[T] = []
        failure = ""
        try:
            found = [work()]
        except UserError as error:
            failure = str(error)
        shares = self.gather((found, failure))
        if failures := [failure for _, failure in shares if failure]:
            raise UserError(failures[0])
        return [result for found, _ in shares for result in found]

    def in_turns(self, work: Callable[[], T]) -> T:
        """Return this rank's result of `work`, which the ranks of a node run one after another.

        A model that is loaded takes host memory for all of it until it is sharded. A UserError on
        one rank is raised on all ranks.
        """
        turn = int(os.environ.get("LOCAL_RANK", "0"))  # torchrun sets it
        mine: list[T] = []
        for number in range(int(self.max(float(turn))) + 1):
            self.gather_or_raise(lambda now=number: mine.append(work()) if now == turn else None)
        return mine[0]

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        # An all-reduce behaves the same on gloo and nccl. dist.barrier() would guess a device.
        self.sum(0.0)

    def _reduce(self, x: Number, op: dist.ReduceOp.RedOpType) -> Number:
        if isinstance(x, Tensor):
            reduced = x.detach().to(self.device, copy=True)
            dist.all_reduce(reduced, op)
            return reduced
        scalar = torch.tensor(x, dtype=torch.float64, device=self.device)
        dist.all_reduce(scalar, op)
        return scalar.item()


def open_world(device: str = "auto", *, hsdp: bool = False) -> World:
    """Join torchrun's process group if its environment is set, else open a group of one.

    With `hsdp` models are sharded within a node and replicated across nodes.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"device={device} is not available here; use auto, cpu or cuda.")
    if device == "cuda":
        torch.cuda.set_device(own_gpu(torch.cuda.device_count()))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if any(name in os.environ for name in GROUP_KEYS):
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun itself watches its processes
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            store, rank, size = _meet_others()
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT
            )
    else:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
    name = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else "cpu"
    mesh = mesh_of(device, hsdp=hsdp)
    return World(dist.get_rank(), dist.get_world_size(), torch.device(name), mesh)


def mesh_of(device: str, *, hsdp: bool) -> DeviceMesh:
    """Return the mesh over which models are sharded: all ranks, or (nodes, ranks of a node).

    FSDP replicates over the first of two dimensions: what crosses it is one all-reduce of gradients
    per microbatch, instead of every weight twice.
    """
    size = dist.get_world_size()
    if not hsdp:
        return init_device_mesh(device, (size,))
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", size))  # torchrun sets it
    if size % on_node:
        raise UserError(
            f"hsdp: true needs equally many ranks on every node, got {size} ranks and {on_node} on "
            "this node; start the same number on each, or set hsdp: false."
        )
    names = ("replicate", "shard")
    return init_device_mesh(device, (size // on_node, on_node), mesh_dim_names=names)


def own_gpu(n_gpus: int) -> int:
    """Return the number of this rank's GPU."""
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= n_gpus:
        raise UserError(
            f"each rank needs a GPU of its own, but rank {number} of this machine finds {n_gpus}; "
            f"start at most {n_gpus} ranks, or set device: cpu."
        )
    return number


def _meet_others() -> tuple[Any, int, int]:
    """Wait for all ranks that the environment defines. Return (store, rank, world size).

    Raises UserError after FORMING, because a single process with the environment of another job
    would wait for hours. The wait is in Python or in a thread: a SIGTERM handler cannot run while
    the main thread is in C++.
    """
    missing = [name for name in GROUP_KEYS if name not in os.environ]
    found = ", ".join(f"{name}={os.environ[name]}" for name in GROUP_KEYS if name in os.environ)
    cure = "unset these variables for a single process, or start every rank (torchrun does)"
    if missing:
        raise UserError(f"the environment has {found} but lacks {', '.join(missing)}; {cure}.")
    met: list[tuple[Any, int, int]] = []
    reason = f"no answer within {FORMING.seconds} s"

    def meet() -> None:
        nonlocal reason
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=FORMING))  # pyright: ignore[reportPrivateImportUsage]
            store.set(f"rftt/{rank}", "here")
            store.wait([f"rftt/{other}" for other in range(size)], FORMING)
            store.set_timeout(TIMEOUT)
            met.append((store, rank, size))
        except (RuntimeError, ValueError) as error:  # DistStoreError, or an invalid port
            reason = one_line(error, 120)

    if os.environ["RANK"] == "0" or _answers(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]):
        thread = Thread(target=meet, daemon=True)
        thread.start()
        thread.join(2 * FORMING.total_seconds())
    if not met:
        raise UserError(f"the process group of {found} cannot be formed ({reason}); {cure}.")
    return met[0]


def _answers(host: str, port: str) -> bool:
    """Return whether rank 0 starts to listen within FORMING.

    torch's client cannot be interrupted, and it ends the interpreter if it is still waiting.
    """
    waiting, tries = Event(), FORMING.seconds
    for _ in range(tries):
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return True
        except (OSError, ValueError, OverflowError):
            waiting.wait(1)
    return False


def close_world(world: World, *, wait: bool = True) -> None:
    """Leave the process group. Call it after the function that owned the models has returned.

    A gloo thread that outlives the interpreter can abort the process at exit. Destroying the group
    joins its threads, but only if no reference to it remains. Sharded models have one in reference
    cycles. The mesh has another one, and torch's caches never release the mesh.
    """
    if wait and dist.is_initialized():  # an in-process vLLM that closed took the group with it
        world.barrier()
    world.mesh._pg_registry.clear()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def process_group(device: str, *, wait: bool = False, hsdp: bool = False) -> Iterator[World]:
    """Open the process group and leave it even if the work fails.

    With `wait` a finished rank waits for the others, which ranks that share a model must do. A
    failed rank never waits.
    """
    world = open_world(device, hsdp=hsdp)
    try:
        yield world
    except BaseException:
        if "vllm" not in sys.modules:  # an in-process vLLM leaves the group itself, at exit
            close_world(world, wait=False)
        raise
    close_world(world, wait=wait)


def shard(
    model: nn.Module,
    world: World,
    *,
    param_dtype: torch.dtype | None = None,
    cpu_offload: bool = False,
) -> nn.Module:
    """Shard a model in place and move it to the device. Each decoder layer is one FSDP unit.

    The model must come from model.py, because it is called through its `packed_forward`.
    `param_dtype` is the dtype of forward and backward. Weights keep their own dtype, and reductions
    use float32: at a learning rate of 5e-7 a bfloat16 weight would not change.
    """
    precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    on_gpu = world.device.type == "cuda"  # otherwise the weights are on the CPU already
    offload = CPUOffloadPolicy() if cpu_offload and on_gpu else OffloadPolicy()
    for unit in [*decoder_layers(model), model]:
        sharded = fully_shard(
            unit,
            mesh=world.mesh,
            mp_policy=precision,
            offload_policy=offload,
            reshard_after_forward=True,
        )
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "packed_forward")
    return model


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the model's blocks: the elements of its longest ModuleList."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len))


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, this rank's shard or whole tensor); a tied head comes once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            yield name, tensor.detach()
        seen.add(id(tensor))


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, whole tensor); a tied head comes once. Collective.

    The adapter of an adapted model (lora.py) is merged.
    """
    if lora_config(model):
        yield from merged(cast(PreTrainedModel, model), own_tensors(model), whole)
        return
    for name, tensor in own_tensors(model):
        yield name, whole(tensor)


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor that a shard is part of, or a tensor that is not sharded. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, or the tensor itself if it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_shard(own: Tensor, like: Tensor) -> Tensor:
    """Return the tensor whose shards have the rows of those of `like`. `own` is this rank's."""
    if not isinstance(like, DTensor):
        return own
    shape = torch.Size((len(like), *own.shape[1:]))
    sharded = DTensor.from_local(
        own,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
    return sharded.to(like.device)  # with cpu_offload the mesh's device is another one


def rows_on_all_ranks(tensor: Tensor) -> bool:
    """Return whether every rank has a row of the tensor."""
    if not isinstance(tensor, DTensor):
        return True
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    n_shards = math.prod(size for size, placement in sizes if placement.is_shard())
    longest = -(-len(tensor) // n_shards)
    return longest * (n_shards - 1) < len(tensor)


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients to at most `max_norm`. Return their norm before that, over all ranks."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


# ---- Work and figures shared among ranks ----


def deal(
    sizes: Sequence[int],
    n_minibatches: int,
    seed: int,
    world: World,
    groups: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return this rank's share of each minibatch of a shuffled batch, with lengths spread evenly.

    With `groups` (tree packing) a group stays on one rank, except that each rank may cut one group.
    The minibatches depend neither on `groups` nor on the number of ranks, so the updates do not
    either. Advantages are computed before, so groups may be split across minibatches.
    """
    order = list(range(len(sizes)))
    Random(seed).shuffle(order)
    minibatches = [order[i::n_minibatches] for i in range(n_minibatches)]
    if groups is not None:
        return [_run(sorted(m, key=groups.__getitem__), sizes, world) for m in minibatches]
    return [
        sorted(minibatch, key=lambda i: (-sizes[i], i))[world.rank :: world.size]
        for minibatch in minibatches
    ]


def _run(order: list[int], sizes: Sequence[int], world: World) -> list[int]:
    """Return this rank's contiguous part of `order`, with balanced sizes."""
    ends = list(accumulate(sizes[i] for i in order))
    middles = [(end - sizes[i] / 2) / ends[-1] for i, end in zip(order, ends, strict=True)]
    share = [int(middle * world.size) for middle in middles]
    return [i for i, rank in zip(order, share, strict=True) if rank == world.rank]


class Totals:
    """Sums of metrics over microbatches, then over ranks. Keys that end in _max are maxima."""

    def __init__(self) -> None:
        self._values: defaultdict[str, Tensor | float] = defaultdict(float)

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Add the metrics of one microbatch."""
        for key, value in metrics.items():
            value = value.detach().float() if isinstance(value, Tensor) else value
            old = self._values[key]
            self._values[key] = max(old, value) if key.endswith("_max") else old + value

    def reduce(self, world: World, per: float) -> dict[str, float]:
        """Reduce over all ranks and divide sums by `per`, the global count of action tokens."""
        return {
            key: float(world.max(float(value)))
            if key.endswith("_max")
            else float(world.sum(float(value))) / max(per, 1.0)
            for key, value in sorted(self._values.items())
        }


def flat_microbatches(batch: Batch, max_tokens: int) -> list[list[int]]:
    """Return groups of documents with at most `max_tokens` each, longest documents first.

    Documents of similar length share a group, which keeps padding in the CPU's attention small. A
    document or pair longer than the limit has a group of its own. Tree packing uses
    `tree_microbatches`.
    """
    groups: list[list[int]] = []
    room = 0
    n = batch.documents_per_term  # a pair stays a pair
    firsts = range(0, len(batch.lengths), n)
    sizes = {first: sum(batch.lengths[first : first + n]) for first in firsts}
    for first in sorted(firsts, key=lambda i: (-sizes[i], i)):
        if not groups or sizes[first] > room:
            groups.append([])
            room = max_tokens
        groups[-1] += range(first, first + n)
        room -= sizes[first]
    return groups


def equal_count(batch: Batch, max_tokens: int, world: World) -> list[list[int]]:
    """Return microbatches as lists of document indices, the same number on all ranks.

    FSDP would hang on different numbers. [] is an empty microbatch.
    """
    groups = (tree_microbatches if batch.packs_prefixes else flat_microbatches)(batch, max_tokens)
    return groups + [[]] * (int(world.max(float(len(groups)))) - len(groups))


def empty_like(batch: Batch) -> Batch:
    """Return masked documents of two tokens: a rank without work must still run its forwards."""
    n = batch.documents_per_term  # a pair stays a pair
    empty = batch.map(lambda tensor: tensor.new_zeros(2 * n))
    return empty.replace(lengths=(2,) * n, names=("",) * n, ref_sums=(0.0,) * n)


def per_token(
    function: Callable[[Batch], Tensor], batch: Batch, max_tokens: int, world: World
) -> Tensor:
    """Return the (T,) values of `function` on every microbatch, without gradients, in order."""
    result = torch.zeros_like(batch.rewards)
    with torch.no_grad():
        for group in equal_count(batch, max_tokens, world):
            if group:
                result[batch.token_index(group)] = function(batch.select(group)).to(result.dtype)
            else:
                function(empty_like(batch))
    return result


def agreed(checksums: list[float]) -> float:
    """Return the checksum of the engines' weights, which must agree on all ranks."""
    if not max(checksums) - min(checksums) <= 1e-9 * max(checksums):  # NaN differs as well
        raise UserError(
            f"the engines of all ranks must have the same weights, got checksums {checksums}; "
            "start again from the last checkpoint."
        )
    return checksums[0]
