"""SFT at the peers: TRL's SFTTrainer, and a plain loop around transformers' GPT2LMHeadModel."""

import hf
import torch
import worker
import workloads


def trl(given, size, channel) -> None:
    import trl as library
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = hf.language_model(size)
    settings = hf.trainer_settings(given, per_device_train_batch_size=size.sft_rows, max_steps=10**6)
    rows = workloads.sft_batches(size).reshape(-1, size.sft_length).tolist()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings, max_length=size.sft_length),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=hf.tokenizer(size),
        callbacks=[hf.Told(channel, [model], trl=library.__version__)],
    )
    hf.in_order(trainer).train()


def loop(given, size, channel) -> None:
    device = torch.device(given.device)
    model = hf.language_model(size).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=hf.LEARNING_RATE, fused=True)
    batches = [torch.from_numpy(batch) for batch in workloads.sft_batches(size)]
    channel.ready(worker.training_state([model]), transformers=hf.transformers.__version__)

    def step(number: int) -> None:
        tokens = batches[number % len(batches)].to(device)
        with torch.autocast(given.device, torch.bfloat16, enabled=given.dtype == "bfloat16"):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    worker.serve(channel, step)


if __name__ == "__main__":
    given = hf.arguments(__doc__)
    run = {"trl": trl, "transformers": loop}[given.variant]
    run(given, workloads.size_of(given.size, given.device), worker.Channel(given))
