"""The reward model at the peer: TRL's RewardTrainer."""

import hf
import trl
import worker
import workloads
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

if __name__ == "__main__":
    given = hf.arguments(__doc__)
    size, channel = workloads.size_of(given.size, given.device), worker.Channel(given)
    model = hf.scalar_model(size, 1)
    settings = hf.trainer_settings(given, per_device_train_batch_size=size.pairs, max_steps=10**6)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**settings, max_length=size.context),
        train_dataset=Dataset.from_list(hf.pair_texts(size)),
        processing_class=hf.tokenizer(size),
        callbacks=[hf.Told(channel, [model], trl=trl.__version__)],
    )
    hf.in_order(trainer).train()
