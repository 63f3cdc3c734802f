"""PPO at the peer: the PPOTrainer of TRL 1.12, found in the folder TRL_PPO_PATH (later releases have none).

Its three parts are told apart from outside: generation is TRL's `batch_generation`, training begins with the first
`accelerator.accumulate` after it, and scoring lies between. What follows a step's end until the next rollout, TRL's
garbage collections among it, counts in the update and in no part.
"""

import os
import sys
from typing import Any

import hf

sys.path.insert(0, os.environ["TRL_PPO_PATH"])

import importlib.metadata

import worker
import workloads
from datasets import Dataset
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Parts(hf.Told):
    """Notes when generation began and ended and when training began."""

    def on_train_begin(self, *arguments: Any, **named: Any) -> None:
        self.trainer_marks: list[float] = []
        super().on_train_begin(*arguments, **named)

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        began, generated, scored = self.trainer_marks
        self.trainer_marks.clear()
        end = self.channel.now()
        self.parts = {"generation_s": generated - began, "scoring_s": scored - generated, "training_s": end - scored}
        super().on_step_end(*arguments, **named)

    def watch(self, trainer: PPOTrainer) -> None:
        """Put the notes in place."""
        generate, accumulate = ppo_trainer.batch_generation, trainer.accelerator.accumulate

        def generation(*arguments: Any, **named: Any) -> Any:
            self.trainer_marks.append(self.channel.now())
            result = generate(*arguments, **named)
            self.trainer_marks.append(self.channel.now())
            return result

        def training(*models: Any) -> Any:
            if len(self.trainer_marks) == 2:
                self.trainer_marks.append(self.channel.now())
            return accumulate(*models)

        ppo_trainer.batch_generation, trainer.accelerator.accumulate = generation, training


def main() -> None:
    given = hf.arguments(__doc__)
    size, channel = workloads.size_of(given.size, given.device), worker.Channel(given)
    settings = hf.trainer_settings(given, per_device_train_batch_size=size.prompts, eval_strategy="no")
    config = PPOConfig(
        **settings,
        gradient_accumulation_steps=1,
        num_mini_batches=size.minibatches,
        num_ppo_epochs=size.epochs,
        total_episodes=size.prompts * 10**4,
        response_length=size.response_length,
        temperature=1.0,
        local_rollout_forward_batch_size=size.prompts,
        num_sample_generations=0,
        kl_coef=0.05,
    )
    prompts = workloads.prompt_batches(size).reshape(-1, size.prompt_length).tolist()
    policy, value_model = hf.language_model(size), hf.scalar_model(size, 2)
    version = next(d.version for d in importlib.metadata.distributions(path=sys.path[:1]) if d.name == "trl")
    watcher = Parts(channel, [policy, value_model], trl=version)
    trainer = PPOTrainer(
        args=config,
        processing_class=hf.tokenizer(size),
        model=policy,
        ref_model=hf.language_model(size),
        reward_model=hf.scalar_model(size, 1),
        value_model=value_model,
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        callbacks=[watcher],
    )
    batch = (trainer.args.batch_size, trainer.args.local_mini_batch_size)
    assert batch == (size.prompts, size.prompts // size.minibatches), batch  # TRL derives both from other settings
    watcher.watch(trainer)
    trainer.train()


if __name__ == "__main__":
    main()
