"""What the peers share: GPT-2 as transformers builds it, a local tokenizer, and TRL trainers that step when told to.

These files run in the peers' own environment and import nothing of this project but the workloads and the worker.
The peers are at their best here: dropout 0, gradient checkpointing off, fused AdamW, no logging, no evaluation.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_name] = "1"
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# What follows reads the environment above when it is imported.
import torch  # noqa: E402
import transformers  # noqa: E402
import worker  # noqa: E402
import workloads  # noqa: E402
from torch.utils.data import SequentialSampler  # noqa: E402
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

LEARNING_RATE = 1e-5  # ours too
PAD = 1


def arguments(description: str | None) -> argparse.Namespace:
    """The settings of the worker; sets the number of threads."""
    parser = worker.parser(description)
    parser.add_argument("--variant", required=True, help="trl or transformers")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    return given


def config(size: workloads.Size, **more: Any) -> GPT2Config:
    """The same shape as ours."""
    shape = {"n_layer": size.layers, "n_head": size.heads, "n_embd": size.width, "n_positions": size.context}
    return GPT2Config(
        vocab_size=size.vocabulary,
        **shape,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), workloads.EOS),
        pad_token_id=PAD,
        **more,
    )


def language_model(size: workloads.Size) -> GPT2LMHeadModel:
    """A language model of random weights."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(config(size))


def scalar_model(size: workloads.Size, seed: int) -> GPT2ForSequenceClassification:
    """A model with one number a row: reward or value."""
    torch.manual_seed(seed)
    return GPT2ForSequenceClassification(config(size, num_labels=1))


def tokenizer(size: workloads.Size) -> PreTrainedTokenizerFast:
    """One token a word, so that TRL's readers of text get exactly the workload's tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<eos>", "<pad>", "<unk>", *(f"t{i}" for i in range(workloads.FIRST, size.vocabulary))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)
    folder = tempfile.mkdtemp(prefix="speed-tokenizer-")
    fast.save_pretrained(folder)  # TRL asks where its tokenizer came from
    return PreTrainedTokenizerFast.from_pretrained(folder)


def pair_texts(size: workloads.Size) -> list[dict[str, str]]:
    """Every pair of every batch as text; a prompt ends with a space, so that an answer begins with a word."""

    def text(ids: list[int]) -> str:
        return " ".join("<eos>" if i == workloads.EOS else f"t{i}" for i in ids)

    return [
        {"prompt": text(p.prompt) + " ", "chosen": text(p.chosen), "rejected": text(p.rejected)}
        for batch in workloads.pair_batches(size)
        for p in batch
    ]


def trainer_settings(given: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Arguments of a TRL configuration that make its trainer train and do nothing else."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="speed-trl-"),
        "use_cpu": given.device == "cpu",
        "bf16": given.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 10**9,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
        **more,
    }


class Told(transformers.TrainerCallback):
    """Makes a trainer's loop wait before each step until the driver asks for it.

    A step is what lies between: fetching and collating the batch, forward, backward, clipping, optimizer, bookkeeping.
    """

    def __init__(self, channel: worker.Channel, trained: list[torch.nn.Module], **about: object) -> None:
        self.channel, self.trained, self.about = channel, trained, about
        self.parts: dict[str, float] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.channel.ready(worker.training_state(self.trained), transformers=transformers.__version__, **self.about)
        self.channel.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.channel.done(**self.parts)
        self.channel.wait()


def in_order(trainer: Any) -> Any:
    """Let a trainer take the batches in the workload's order, as ours does."""
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    return trainer
