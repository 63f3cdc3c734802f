"""minirlhf: RLHF from scratch in plain PyTorch. The maths is in ops, ppo, dpo and bradley_terry; start reading there."""

__version__ = "0.1.0"
