"""minirlhf: RLHF from scratch in plain PyTorch. Start reading in ops, ppo, dpo and bradley_terry."""

__version__ = "0.1.0"
