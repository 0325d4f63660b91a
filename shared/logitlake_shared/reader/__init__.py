"""Reading a lake to train from it, or to hand its rows to other tools.

    datasets      LakeDataset, PairDataset: the items of one snapshot, by position
    order         the order of an epoch: a function of snapshot, seed and epoch alone
    batches       that order cut into batches, by number or by tokens, and shared among ranks
    loader        LakeLoader: batches made ahead by threads, delivered in order
    row_groups    verified reads of single row groups
    held          what is decoded stays in memory, up to a number of bytes
    shard_copies  whole shards of an object store in a bounded local folder

`docs/reading.md` shows each in use.
"""

from logitlake_shared.reader.batches import Batches, EpochBatches
from logitlake_shared.reader.datasets import HELD_BYTES, WINDOW_BYTES, LakeDataset, PairDataset
from logitlake_shared.reader.loader import LakeLoader
from logitlake_shared.reader.order import Layout

__all__ = [
    "HELD_BYTES",
    "WINDOW_BYTES",
    "Batches",
    "EpochBatches",
    "LakeDataset",
    "LakeLoader",
    "Layout",
    "PairDataset",
]
