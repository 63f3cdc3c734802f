"""Records, the readers that make them from files of many formats, and the right-padded batches they become.

`load` is the one entry for data; `python -m minirlhf.data check FILE` shows what it makes of a file.
"""

from minirlhf.data.batch import (
    Batch,
    Comparison,
    Example,
    PairBatch,
    batch_indices,
    micro_batches,
    pad,
    pad_comparisons,
    pair_micro_batches,
    permutation,
    steps_per_epoch,
    token_count,
)
from minirlhf.data.encode import (
    Record,
    differing_tokens,
    encode_comparison,
    encode_comparisons,
    encode_demonstration,
    encode_demonstrations,
    encode_example,
    encode_prompt,
    encode_prompts,
    pairs_from_ranks,
    split_by_prompt,
)
from minirlhf.data.readers import Dataset, Kind, load, read, write_records
from minirlhf.data.sources import is_hub_name, local_files

__all__ = [
    "Batch",
    "Comparison",
    "Dataset",
    "Example",
    "Kind",
    "PairBatch",
    "Record",
    "batch_indices",
    "differing_tokens",
    "encode_comparison",
    "encode_comparisons",
    "encode_demonstration",
    "encode_demonstrations",
    "encode_example",
    "encode_prompt",
    "encode_prompts",
    "is_hub_name",
    "load",
    "local_files",
    "micro_batches",
    "pad",
    "pad_comparisons",
    "pair_micro_batches",
    "pairs_from_ranks",
    "permutation",
    "read",
    "split_by_prompt",
    "steps_per_epoch",
    "token_count",
    "write_records",
]
