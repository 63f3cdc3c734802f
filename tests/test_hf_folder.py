"""Model folders: no bit lost, every mistake named, transformers' Auto classes, hub names and the model card."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model import CONFIG, UNTIED, lively, random_tokens
from torch.testing import assert_close

from minirlhf import tokenizer
from minirlhf.encode import encode_prompt
from minirlhf.files import source_hash
from minirlhf.generate import generate
from minirlhf.hf import folder, hub
from minirlhf.model import GPT, CheckpointError, GPTConfig
from minirlhf.reward import RewardModel
from minirlhf.runs.card import write_model_card
from minirlhf.runs.log import RunLog
from minirlhf.runtime import Interrupted, UserError, interruptible


# ------------------------------------------------------------------------------------------------- folders and errors
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("config", [CONFIG, UNTIED])
def test_saving_and_loading_changes_no_bit(config: GPTConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    gpt = lively(GPT(config)).to(dtype)
    gpt.save_pretrained(tmp_path / "new" / "folder")
    before = torch.get_rng_state()
    loaded = GPT.from_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(before, torch.get_rng_state())
    assert loaded.config == config
    for (name, ours), (other, theirs) in zip(gpt.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and theirs.dtype == dtype and torch.equal(ours, theirs)
        assert theirs.requires_grad and theirs.is_contiguous()
        assert theirs.untyped_storage().nbytes() == theirs.numel() * theirs.element_size()


def test_saving_over_the_folder_a_model_came_from(tmp_path: Path) -> None:
    lively(GPT(CONFIG)).save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    kept = copy.deepcopy(loaded.state_dict())
    lively(GPT(CONFIG), seed=5).save_pretrained(tmp_path)
    assert all(torch.equal(value, kept[name]) for name, value in loaded.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def rewrite(folder: Path, change: Callable[[dict], dict], file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    save_file(change(tensors), folder / file, metadata={"format": "pt"})


def test_names_without_prefix_stored_masks_and_a_repeated_tied_head_are_read(tmp_path: Path) -> None:
    gpt = lively(GPT(CONFIG))
    gpt.save_pretrained(tmp_path)

    def older(tensors: dict) -> dict:
        tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()
        return tensors

    rewrite(tmp_path, older)
    tokens = random_tokens(2, 8)
    assert torch.equal(GPT.from_pretrained(tmp_path)(tokens), gpt(tokens))
    rewrite(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors["wte.weight"] + 1})
    with pytest.raises(CheckpointError, match="unexpected lm_head.weight"):
        GPT.from_pretrained(tmp_path)


def test_an_untied_head_may_equal_the_embedding(tmp_path: Path) -> None:
    gpt = lively(GPT(UNTIED))
    with torch.no_grad():
        gpt.lm_head.weight.copy_(gpt.wte.weight)
    gpt.save_pretrained(tmp_path)
    assert torch.equal(GPT.from_pretrained(tmp_path).lm_head.weight, gpt.wte.weight)


def test_one_error_names_every_wrong_tensor(tmp_path: Path) -> None:
    GPT(UNTIED).save_pretrained(tmp_path)

    def damage(tensors: dict) -> dict:
        del tensors["transformer.h.1.ln_2.bias"], tensors["lm_head.weight"]
        tensors["transformer.h.0.mlp.c_fc.weight"] = tensors["transformer.h.0.mlp.c_fc.weight"].T.contiguous()
        tensors["transformer.wpe.weight"] = torch.zeros(16, 16, dtype=torch.long)
        tensors["transformer.h.2.ln_1.weight"] = torch.ones(16)
        tensors["ln_f.bias"] = torch.ones(16)  # a second time, without its prefix
        return tensors

    rewrite(tmp_path, damage)
    with pytest.raises(CheckpointError) as caught:
        GPT.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path) in message
    for part in (
        "missing transformer.h.1.ln_2.bias",
        "missing lm_head.weight",
        "transformer.h.0.mlp.c_fc.weight is F32 (64, 16) and not floating-point (16, 64)",
        "transformer.wpe.weight is I64",
        "unexpected transformer.h.2.ln_1.weight",
        "unexpected transformer.ln_f.bias",
    ):
        assert part in message, part
    assert message.count("missing") == 2 and message.count("unexpected") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"model_type": "gptj"}, "model_type is 'gptj'"),
        ({"n_inner": 32}, "n_inner is 32"),
        ({"eos_token_id": [1, 2]}, "eos_token_id is"),
        ({"n_head": 5}, "not a multiple"),
        ({"n_embd": "16"}, "config.json"),
        ({"n_embd": None, "vocab_size": None}, "vocab_size is missing; n_embd is missing"),
    ],
)
def test_settings_that_are_not_gpt2_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    GPT(CONFIG).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None or k not in change}))
    with pytest.raises(CheckpointError, match="config.json") as caught:
        GPT.from_pretrained(tmp_path)
    assert message in str(caught.value)


def test_settings_may_be_absent_where_gpt2_has_a_default(tmp_path: Path) -> None:
    gpt = lively(GPT(CONFIG))
    gpt.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    needed = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    path.write_text(json.dumps({name: settings[name] for name in needed} | {"n_inner": 64}))
    loaded = GPT.from_pretrained(tmp_path)
    assert torch.equal(loaded(random_tokens(2, 8)), gpt(random_tokens(2, 8))) and loaded.config.eos_token_id is None


@pytest.mark.parametrize("text", ["{", "[1]", None])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_unreadable_files_are_named(file: str, text: str | None, tmp_path: Path) -> None:
    GPT(CONFIG).save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    if text is not None:
        (tmp_path / file).write_text(text)
    with pytest.raises(CheckpointError, match=file):
        GPT.from_pretrained(tmp_path)


def test_square_projections_are_stored_the_other_way_round(tmp_path: Path) -> None:
    gpt = lively(GPT(CONFIG))
    gpt.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer, (name, weight) in itertools.product(range(2), {"attn.c_proj": (16, 16), "mlp.c_proj": (64, 16)}.items()):
        stored = tensors[f"transformer.h.{layer}.{name}.weight"]
        ours = gpt.get_submodule(f"h.{layer}.{name}").weight
        assert stored.shape == weight
        x = torch.randn(3, weight[0], generator=torch.Generator().manual_seed(0))
        assert_close(x @ stored, x @ ours.T)  # Conv1D multiplies from the right


def split_into_parts(folder: Path) -> dict[str, str]:
    """Divide model.safetensors as transformers does with large models: two parts and an index. Returns its map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    place = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for part in set(place.values()):
        held = {name: tensor for name, tensor in tensors.items() if place[name] == part}
        save_file(held, folder / part, metadata={"format": "pt"})
    (folder / hub.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": place}))
    return place


def test_weights_in_parts_are_read(tmp_path: Path) -> None:
    gpt = lively(GPT(CONFIG)).eval()
    gpt.save_pretrained(tmp_path)
    whole = source_hash(tmp_path)
    split_into_parts(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in gpt.state_dict().items())
    parts = source_hash(tmp_path)
    assert len(parts) == 64 and parts != whole
    rewrite(
        tmp_path,
        lambda tensors: tensors | {"transformer.ln_f.bias": torch.ones(16)},
        "model-00001-of-00002.safetensors",
    )
    assert source_hash(tmp_path) != parts


def test_what_transformers_saves_in_parts_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_positions=8, n_layer=2, n_head=2, n_embd=16, bos_token_id=0)
    ).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert_close(GPT.from_pretrained(tmp_path)(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("part", "model.safetensors.index.json: no model-00002-of-00002.safetensors beside it; fetch the whole model"),
        ("tensor", "model.safetensors.index.json: missing transformer.ln_f.bias"),
        ("twice", "model-00002-of-00002.safetensors: transformer.wte.weight is in another part too"),
        ("header", "model-00002-of-00002.safetensors: not a safetensors file"),
        ("index", "model.safetensors.index.json: not an index of weights"),
        ("outside", "model.safetensors.index.json: weight_map must name files beside it"),
    ],
)
def test_damaged_parts_are_named(damage: str, words: str, tmp_path: Path) -> None:
    GPT(CONFIG).save_pretrained(tmp_path)
    place = split_into_parts(tmp_path)
    second = "model-00002-of-00002.safetensors"
    if damage == "part":
        (tmp_path / second).unlink()
    elif damage == "tensor":
        rewrite(
            tmp_path, lambda t: {k: v for k, v in t.items() if "ln_f.bias" not in k}, place["transformer.ln_f.bias"]
        )
    elif damage == "twice":
        for part in set(place.values()):
            rewrite(tmp_path, lambda t: t | {"transformer.wte.weight": torch.zeros(13, 16)}, part)
    elif damage == "header":
        (tmp_path / second).write_text("nothing")
    else:
        outside = {"weight_map": {"transformer.wte.weight": "../model.safetensors"}}
        (tmp_path / hub.INDEX).write_text(json.dumps(outside if damage == "outside" else [1]))
    with pytest.raises(UserError) as caught:
        GPT.from_pretrained(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def anonymous_memory() -> int:
    """Bytes of this process that no file stands behind; a file that is mapped into memory does not count."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of the process from /proc")
def test_loading_holds_no_second_copy_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPTConfig(vocab_size=4096, n_positions=16, n_layer=6, n_head=1, n_embd=512)
    size = sum(p.numel() * 4 for p in GPT(config, seed=None).parameters())
    GPT(config).save_pretrained(tmp_path)
    seen = []
    parameter = torch.nn.Parameter
    monkeypatch.setattr(folder.nn, "Parameter", lambda t: seen.append(anonymous_memory()) or parameter(t))
    before = anonymous_memory()
    loaded = GPT.from_pretrained(tmp_path)
    assert len(seen) == len(list(loaded.parameters()))
    # One more tensor, at most the embedding's 8 MB, may live while it is copied, and the allocator rounds.
    assert max(seen) - before < 1.25 * size, (size, before, max(seen))


# ------------------------------------------------------------------------------------------------ transformers' classes
ENCODING = tokenizer.load("world")
WORLD_CONFIG = GPTConfig(
    vocab_size=ENCODING.n_vocab, n_positions=48, n_layer=2, n_head=2, n_embd=32, eos_token_id=ENCODING.eot_token
)


def test_auto_classes_write_the_same_greedy_text(tmp_path: Path) -> None:
    gpt = lively(GPT(WORLD_CONFIG)).eval()
    gpt.save_pretrained(tmp_path)
    tokenizer.save(ENCODING, tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert their_tokenizer.eos_token_id == ENCODING.eot_token
    for prompt in ("\n\nHuman: What does the lion eat?\n\nAssistant:", "Once <b>", "The"):
        ids = encode_prompt(ENCODING, prompt)
        inputs = their_tokenizer(prompt, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == ids
        with torch.no_grad():
            assert_close(gpt(torch.tensor([ids])), theirs(**inputs).logits, atol=1e-5, rtol=1e-5)
        ours = generate(gpt, [ids], max_new_tokens=20, eos_id=ENCODING.eot_token, temperature=0)
        written = theirs.generate(**inputs, max_new_tokens=20, do_sample=False)
        assert written[0].tolist() == ours.tokens[0, : ours.lengths[0]].tolist()
        text = tokenizer.decode(ENCODING, ours.tokens[0, : ours.lengths[0]].tolist())
        assert their_tokenizer.decode(written[0]) == text


# ------------------------------------------------------------------------------------------------------------ hub names
@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", [*hub.REVISIONS, "someone/gpt2-tuned", "someone/gpt2-tuned@v1"])
def test_without_a_network_the_error_says_how_to_provide_a_folder(name: str, empty_cache: Path) -> None:
    with pytest.raises(UserError) as caught:
        GPT.from_pretrained(name)
    bare = name.partition("@")[0]
    words = f"give a folder that holds config.json, model.safetensors, vocab.json and merges.txt: .*hf download {bare} "
    assert re.search(words, str(caught.value)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("variable", "seconds"), [(None, 1.5), ("1", 1)])
def test_a_hub_that_never_answers_is_not_waited_for(
    variable: str | None, seconds: float, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that drops every question keeps a client far longer than its own timeout."""
    silence = threading.Event()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: silence.wait(20))
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    monkeypatch.setattr(hub, "SECONDS", hub.SECONDS / 10)
    if variable:
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", variable)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", int(variable) / 10)
    started = time.perf_counter()
    with pytest.raises(UserError, match=f"no answer in {seconds / 10:g} seconds; HF_HUB_ETAG_TIMEOUT=30 waits longer"):
        hub.model_folder("gpt2")
    assert time.perf_counter() - started < 5  # and not 20; a busy machine may take long to start the thread
    silence.set()


def test_a_stage_without_its_model_says_which_command_makes_it(tmp_path: Path) -> None:
    folder = tmp_path / "sft" / "model"
    command = f"`python train_sft.py --run {tmp_path} --train hh.gz`"
    words = re.escape(f"{folder}: no model yet; run {command} first, or name a model with --x")
    with pytest.raises(UserError, match=words):
        hub.model_or_earlier(None, "--x", folder, data="hh.gz")
    GPT(CONFIG).save_pretrained(folder)
    assert hub.model_or_earlier(None, "--x", folder) == folder
    assert hub.model_or_earlier(str(folder), "--x", tmp_path / "none") == folder
    with pytest.raises(UserError, match="run `python train_reward.py --run .*` first"):
        hub.model_or_earlier(None, "--x", tmp_path / "reward" / "model")


@pytest.mark.parametrize("source", ["./gpt2", "/no/such/folder", "a/b/c", "-x", Path("gpt2")])
def test_what_is_neither_a_folder_nor_a_name_is_refused_at_once(source: str | Path, empty_cache: Path) -> None:
    with pytest.raises(UserError, match="no such folder; give a folder that holds config.json and model.safetensors"):
        GPT.from_pretrained(source)


def test_a_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = lively(GPT(CONFIG))
    gpt.save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert hub.model_folder("gpt2") == Path("gpt2")
    assert torch.equal(GPT.from_pretrained("gpt2").wte.weight, gpt.wte.weight)


def test_a_cached_model_needs_no_network(empty_cache: Path) -> None:
    commit = hub.REVISIONS["gpt2-medium"]
    folder = empty_cache / "models--gpt2-medium" / "snapshots" / commit
    lively(GPT(CONFIG)).save_pretrained(folder)
    tokenizer.save(tokenizer.load("bytes"), folder)
    assert hub.model_folder("gpt2-medium") == folder
    assert isinstance(GPT.from_pretrained("gpt2-medium"), GPT)
    split_into_parts(folder)
    assert hub.model_folder("gpt2-medium") == folder
    (folder / "model-00002-of-00002.safetensors").unlink()  # a download that was interrupted
    with pytest.raises(UserError, match="gives no model of this name"):
        hub.model_folder("gpt2-medium")
    (folder / hub.INDEX).unlink()
    with pytest.raises(UserError, match="gives no model of this name"):
        hub.model_folder("gpt2-medium")


@pytest.mark.parametrize(
    ("name", "asked", "commit"),
    [
        ("gpt2", hub.REVISIONS["gpt2"], hub.REVISIONS["gpt2"]),
        ("openai-community/gpt2-xl", hub.REVISIONS["gpt2-xl"], hub.REVISIONS["gpt2-xl"]),
        ("someone/tuned@v1", "v1", "c0ffee"),
        ("someone/tuned", None, "c0ffee"),
    ],
)
def test_downloads_are_of_one_commit_and_never_of_pickles(
    name: str,
    asked: str | None,
    commit: str,
    empty_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    calls, download = [], huggingface_hub.snapshot_download

    def snapshot(repo: str, **arguments: object) -> str:
        if arguments.get("local_files_only"):
            return download(repo, **arguments)
        calls.append((repo, arguments))
        return str(tmp_path)

    def model_info(self: object, repo: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
        assert (repo, revision) == (name.partition("@")[0], asked) and timeout <= 5
        return SimpleNamespace(sha=commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    assert hub.model_folder(name) == tmp_path
    files = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
    files += ["vocab.json", "merges.txt"]
    assert calls == [(name.partition("@")[0], {"revision": commit, "allow_patterns": files})]
    said = capsys.readouterr().out
    assert said == ("" if asked else f"{name}: at commit {commit}; write {name}@{commit} to stay with it\n")


# ------------------------------------------------------------------------------------------------------- the model card
def test_the_model_card_names_data_configuration_and_results(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("x")
    gpt = GPT(CONFIG)
    gpt.save_pretrained(base := tmp_path / "base")
    config = make_dataclass("Config", ["learning_rate", "train"])(0.5, os.fspath(file))
    log = RunLog(
        tmp_path / "reward",
        config,
        **{"inputs": {str(file): source_hash(file)}, "models": {str(base): source_hash(base)}},
    )
    log.row(0, {"loss": 0.75, "validation_loss": 0.5}, tokens=1)
    log.row(1, {"loss": 0.25}, tokens=1)
    log.close()
    RewardModel.from_gpt(gpt, generator=torch.Generator()).save_pretrained(tmp_path / "reward" / "model")
    write_model_card(tmp_path / "reward" / "model", script="train_reward.py", objective="A reward model.")
    card = (tmp_path / "reward" / "model" / "README.md").read_text()
    for line in (
        "# reward: a GPT-2 trained with minirlhf",
        "AutoModelForSequenceClassification.from_pretrained",
        "- pairs.jsonl, SHA-256 2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881",
        "| loss | 0.25 |",
        "| validation_loss | 0.5 |",
        "| learning_rate | 0.5 |",
        "| train | pairs.jsonl |",
        f"Versions: python {'.'.join(map(str, sys.version_info[:3]))}, torch {torch.__version__}",
    ):
        assert line in card, line
    assert "for 2 steps" in card and str(tmp_path) not in card


def test_a_signal_while_weights_are_read_waits_for_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the library an exception would turn into another one."""
    GPT(GPTConfig(vocab_size=11, n_positions=4, n_layer=1, n_head=1, n_embd=8), seed=0).save_pretrained(tmp_path)
    opened = folder.safe_open

    class Signalling:
        def __init__(self, *args: object, **kwargs: object) -> None:
            self.file = opened(*args, **kwargs)

        def __enter__(self) -> Signalling:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def get_tensor(self, name: str) -> torch.Tensor:
            try:
                signal.raise_signal(signal.SIGTERM)
                return self.file.get_tensor(name)
            except Interrupted as error:
                raise ValueError("could not determine the shape") from error

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

    monkeypatch.setattr(folder, "safe_open", Signalling)
    with pytest.raises(Interrupted), interruptible():
        GPT.from_pretrained(tmp_path)
