"""Several processes that train one student: joining, waiting, and who writes.

A launcher (torchrun, Ray Train) starts the command once a rank and says in the environment who is who. The first rank
writes, the others wait for it; every rank reads.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

__all__ = ["first_rank_first", "is_first_rank", "join_ranks", "leave_ranks", "wait_for_ranks", "world_size"]


def world_size() -> int:
    """Ranks that train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this rank writes."""
    return int(os.environ.get("RANK", "0")) == 0


def join_ranks(device: str, timeout_s: float) -> None:
    """Waits until all ranks are there. A rank that then says nothing for `timeout_s` ends all the others."""
    import torch
    import torch.distributed as dist

    if world_size() > 1 and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(seconds=timeout_s))


def leave_ranks() -> None:
    """Ends the exchange between ranks, if there is one; the command is done."""
    import sys

    dist = sys.modules.get("torch.distributed")
    if world_size() > 1 and dist is not None and dist.is_initialized():
        dist.destroy_process_group()


def wait_for_ranks() -> None:
    """Returns when every rank has come here."""
    import torch.distributed as dist

    if world_size() > 1:
        dist.barrier()


@contextmanager
def first_rank_first() -> Iterator[None]:
    """The first rank does what is inside while the others wait; then they do it."""
    if not is_first_rank():
        wait_for_ranks()
    yield
    if is_first_rank():
        wait_for_ranks()
