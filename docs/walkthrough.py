# %% [markdown]
# # RLHF, stage by stage
#
# This notebook runs the whole pipeline of **minirlhf** on its embedded world, a little zoo about which people ask
# questions. A simulated annotator stands in for the people. A judge that no stage is trained on says how good the
# answers really are. No GPU and no network are needed. On two CPU cores it takes about four minutes.
#
# The chapters beside this file (`1-model.md` to `6-evaluation.md`) explain each stage; here you look at it.
#
# *Made from `walkthrough.py` by `python docs/make_walkthrough.py`; change that file, not the notebook.*

# %% [markdown]
# ## Where the code comes from
#
# In a clone of the repository the next cell finds the package by itself. On Colab, put the repository's address into
# `REPOSITORY`, and the cell clones and installs it.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""  # on Colab: the address that you would give to git clone

for folder in (Path.cwd(), *Path.cwd().parents):
    if (folder / "train_sft.py").is_file():
        sys.path.insert(0, str(folder))
        break
if importlib.util.find_spec("train_sft") is None:
    assert REPOSITORY, "minirlhf is not here: write its address into REPOSITORY, above"
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, "minirlhf-code"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", "minirlhf-code"], check=True)
    sys.path.insert(0, str(Path("minirlhf-code").resolve()))

# %%
import json

import matplotlib.pyplot as plt

import train_dpo
import train_ppo
import train_reward
import train_sft
from minirlhf import data, tokenizer
from minirlhf.__main__ import SMOKE
from minirlhf.encode import encode_prompt
from minirlhf.evaluate import evaluation
from minirlhf.feedback import __main__ as feedback
from minirlhf.generate import generate
from minirlhf.model import GPT
from minirlhf.runs.log import read_rows
from minirlhf.world import judge

RUN = Path("runs/walkthrough")
SMALL = SMOKE if os.environ.get("MINIRLHF_WALKTHROUGH") == "small" else {}  # for the tests: seconds, and little learned


def settings(stage):
    """The settings that all stages share; everything else keeps its default."""
    return {"run": RUN, "seed": 0, "device": "cpu", **SMALL.get(stage, {})}


def curves(stage, *names):
    """Plot metrics of a stage, one panel per metric."""
    rows = read_rows(RUN / stage)
    figure, panels = plt.subplots(1, len(names), figsize=(4 * len(names), 2.8), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        points = [(row["step"], row[name]) for row in rows if name in row]
        panel.plot(*zip(*points, strict=True))
        panel.set_title(name)
        panel.set_xlabel("iteration" if stage == "ppo" else "step")
        panel.grid(alpha=0.3)
    figure.tight_layout()
    plt.show()


# %% [markdown]
# ## 1. A model that answers: SFT
#
# Each demonstration is a question with an answer. Some writers are careful and some are not, so the model that
# imitates them is sometimes right and sometimes wrong. The loss is the mean negative log-likelihood of the answer's
# tokens; the prompt's tokens are read, not learned.

# %%
demonstrations = data.load(train_sft.Config().train, "demonstrations")
for record in demonstrations[:4]:
    print(f"{record['prompt'].strip()!r}\n   {record['response']!r}")

# %%
sft = train_sft.main(train_sft.Config(**settings("sft")))
curves("sft", "loss", "validation_loss")

# %% [markdown]
# Ask it each question four times. It samples, so the answers differ. The judge scores each between -1 and 1.

# %%
encoding = tokenizer.load(sft)
questions = [record["prompt"] for record in data.load(evaluation.Config().prompts, "prompts")[:3]]


def answers(folder, prompts, count=1, seed=0):
    """`count` sampled answers to each prompt."""
    model = GPT.from_pretrained(folder).eval()
    ids = [encode_prompt(encoding, prompt) for prompt in prompts for _ in range(count)]
    samples = generate(model, ids, max_new_tokens=32, eos_id=encoding.eot_token, seed=seed)
    texts = [encoding.decode([t for t in row if t != encoding.eot_token]) for row in samples.response_ids()]
    return [texts[i : i + count] for i in range(0, len(texts), count)]


for question, texts in zip(questions, answers(sft, questions, count=4), strict=True):
    print(question.strip())
    for text in texts:
        print(f"  {judge(question, text).total:+.2f}  {text.strip()}")

# %% [markdown]
# ## 2. What people prefer: feedback
#
# The simulated annotator ranks four answers to each prompt. It is noisy: sometimes it prefers the worse answer. You
# can label by hand instead: `python -m minirlhf.feedback label`.

# %%
rankings = feedback.main(feedback.Config(**settings("feedback")))
record = next(r for r in map(json.loads, rankings.read_text(encoding="utf-8").splitlines()) if len(set(r["ranks"])) > 2)
print(record["prompt"].strip())
for rank, text in sorted(zip(record["ranks"], record["responses"], strict=True)):
    print(f"  place {rank + 1}: {text.strip()}")

# %% [markdown]
# ## 3. A model of the preferences: the reward model
#
# The reward model is the SFT model with a scalar head. Bradley and Terry: the chosen answer is preferred with
# probability sigmoid(score of the chosen - score of the rejected), and the loss is the negative logarithm of this
# probability. A coin has a loss of ln 2 = 0.69.

# %%
reward = train_reward.main(train_reward.Config(**settings("reward")))
curves("reward", "loss", "accuracy", "validation_accuracy")

# %% [markdown]
# ## 4. Reinforcement learning: PPO
#
# PPO maximises E[r(x, y)] - beta KL(pi || pi_sft). Watch four curves: `score` is the reward model's, `kl` says how far
# the policy has moved from SFT, in nats per response, `explained_variance` whether the value model follows, and
# `clip_fraction` the share of tokens that the clip stopped.

# %%
ppo = train_ppo.main(train_ppo.Config(**settings("ppo")))
curves("ppo", "score", "kl", "explained_variance", "clip_fraction")

# %% [markdown]
# ## 5. Without a reward model: DPO
#
# DPO uses the same preferences directly: beta times the policy's log-ratio to the reference is the implicit reward.

# %%
dpo = train_dpo.main(train_dpo.Config(**settings("dpo")))
curves("dpo", "loss", "validation_accuracy", "reward_chosen", "reward_rejected")

# %% [markdown]
# ## 6. Is it better?
#
# Each model answers held-out prompts, and the judge scores the answers in three parts. Best-of-n needs no training: it
# takes the best of n SFT answers by the reward model's score. Its KL is at most log n - (n-1)/n.

# %%
summary = evaluation.main(evaluation.Config(**settings("evaluate")))

# %%
figure, panel = plt.subplots(figsize=(5, 3.4))
for name, row in summary["models"].items():
    low, high = row["total"]["interval"]
    mean = row["total"]["mean"]
    panel.errorbar(row["kl"], mean, [[mean - low], [high - mean]], marker="o", capsize=3, label=name)
panel.set_xlabel("KL to SFT (nats per response)")
panel.set_ylabel("judge")
panel.legend()
figure.tight_layout()
plt.show()

# %%
for question, *texts in zip(questions, *(answers(folder, questions) for folder in (sft, ppo, dpo)), strict=True):
    print(question.strip())
    for name, (text,) in zip(("SFT", "PPO", "DPO"), texts, strict=True):
        print(f"  {name}  {judge(question, text).total:+.2f}  {text.strip()}")

# %% [markdown]
# ## What to try now
#
# - `train_ppo.Config(..., stage="ppo-bold", beta=0.005, learning_rate=1e-3, value_learning_rate=1e-3)`: the score goes
#   on rising while the judge falls. That is over-optimisation; chapter 6 explains it.
# - `advantages="rloo", group_size=4`: no value model.
# - A reward of your own, a function of prompts and responses: `docs/extending.md`.
