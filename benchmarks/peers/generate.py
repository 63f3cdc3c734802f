"""Sampling at the peer: transformers' generate with its dynamic cache. It returns no log-probabilities here."""

import hf
import torch
import worker
import workloads

if __name__ == "__main__":
    given = hf.arguments(__doc__)
    size, channel = workloads.size_of(given.size, given.device), worker.Channel(given)
    model = hf.language_model(size).eval().to(given.device, getattr(torch, given.dtype))
    model.generation_config.eos_token_id = None  # every response runs to its full length
    prompts = torch.from_numpy(workloads.generation_prompts(size)).to(given.device)
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": hf.PAD}
    channel.ready(0, transformers=hf.transformers.__version__)

    @torch.inference_mode()
    def step(number: int) -> None:
        result = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=size.new_tokens, **sampling
        )
        assert result.shape == (size.rows, size.prompt_length + size.new_tokens)

    worker.serve(channel, step)
