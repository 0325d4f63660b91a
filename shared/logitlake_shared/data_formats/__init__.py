"""Training data as people have it, each format a stream of checked records.

    for read in llava_records(Path("train.jsonl"), ReadOptions(image_root="images")):
        if isinstance(read, BadRecord): ...    # train.jsonl: line 7: <reason>; the stream goes on
        else: ...                              # a Conversation, or a PreferencePair

One file a format: `llava` (LLaVA JSON and JSONL), `openai` (`messages` JSONL and the batch file), `rlaif_v`
(preference pairs in Parquet), `hf_dataset` (a folder of Hugging Face `datasets`), `made_up` (seeded records without
any file). No reader holds a file in memory, and images are only located: `ImageRef` says where one is and loads it
when a unit is captured. A record that cannot be used is a `BadRecord` and the caller's to judge; a file that cannot be
read on is a `DataError`, whatever the caller thinks of bad records. `read_llava` and `read_rlaif_v` are the same
streams for callers that want every record or none: they raise the first bad one.
"""

from logitlake_shared.data_formats.files import InputFile, InputLog, check_unchanged, input_files
from logitlake_shared.data_formats.hf_dataset import HfColumns, hf_dataset_records
from logitlake_shared.data_formats.image_refs import ImageRef
from logitlake_shared.data_formats.llava import llava_records, read_llava
from logitlake_shared.data_formats.made_up import made_up_records
from logitlake_shared.data_formats.openai import openai_records
from logitlake_shared.data_formats.records import (
    BadRecord,
    Conversation,
    Messages,
    PreferencePair,
    Read,
    ReadOptions,
    good_records,
)
from logitlake_shared.data_formats.rlaif_v import read_rlaif_v, rlaif_v_records
from logitlake_shared.data_formats.selection import Selection, selected

__all__ = [
    "BadRecord",
    "Conversation",
    "HfColumns",
    "ImageRef",
    "InputFile",
    "InputLog",
    "Messages",
    "PreferencePair",
    "Read",
    "ReadOptions",
    "Selection",
    "check_unchanged",
    "good_records",
    "hf_dataset_records",
    "input_files",
    "llava_records",
    "made_up_records",
    "openai_records",
    "read_llava",
    "read_rlaif_v",
    "rlaif_v_records",
    "selected",
]
