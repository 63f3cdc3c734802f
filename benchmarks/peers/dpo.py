"""DPO at the peer: TRL's DPOTrainer, which computes the reference's log-probabilities within each step.

Computing them beforehand (precompute_ref_log_probs) takes TRL longer for one epoch, so this is its faster way.
"""

import hf
import trl
import worker
import workloads
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

if __name__ == "__main__":
    given = hf.arguments(__doc__)
    size, channel = workloads.size_of(given.size, given.device), worker.Channel(given)
    model, reference = hf.language_model(size), hf.language_model(size)
    settings = hf.trainer_settings(given, per_device_train_batch_size=size.pairs, max_steps=10**6)
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(**settings, max_length=size.context, beta=0.1),
        train_dataset=Dataset.from_list(hf.pair_texts(size)),
        processing_class=hf.tokenizer(size),
        callbacks=[hf.Told(channel, [model], trl=trl.__version__)],
    )
    hf.in_order(trainer).train()
