"""What tests of several folders share: a tiny model with prompts and a reward function, made on the spot, a copy of
the installed host that may be patched, and a real headless Chromium."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
REWARD = """
import torch

def reward_func(queries, prompts, labels):
    assert type(labels[0]) is str, f"a label of type {type(labels[0])}"
    answer = queries[0][len(prompts[0]):]
    scale = {"ann": 1.0, "bob": 5.0, "cleo/3": 0.2}[labels[0]]
    vowels = scale * sum(letter in "aeiouAEIOU" for letter in answer)
    return {"rewards": torch.tensor([vowels]), "scores": torch.tensor([vowels]), "extra_logs": {"vowels": vowels}}
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a two-layer Llama (head_dim 32, as vLLM's CPU attention wants), prompts and a reward function."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, max_position_embeddings=256)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)
    tokens = dict(vocab_size=len(vocab), pad_token_id=0, eos_token_id=1, bos_token_id=None)
    LlamaForCausalLM(LlamaConfig(**shape, **heads, **tokens)).to(torch.bfloat16).save_pretrained(folder / "model")

    rows = []
    for i in range(24):
        owner = {"persona": ["ann", "bob", "ann", "cleo/3"][i % 4], "who": f"u{i % 6}"}
        rows.append({"input": f"{i} says ", "answer": owner["persona"], **owner, "struct": {**owner, "nested": [i]}})
    write_jsonl(folder / "prompts.jsonl", rows)
    write_jsonl(folder / "eval.jsonl", [{"input": "who says ", "answer": "ann"}])
    (folder / "reward.py").write_text(REWARD)
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class HostCopy:
    """The installed host, files and metadata, in a folder that comes first where `environment` is used."""

    def __init__(self, folder: Path):
        self.folder = folder
        installed = Path(importlib.util.find_spec("openrlhf").origin).parent
        metadata = importlib.metadata.distribution("openrlhf").locate_file("openrlhf-0.11.2.dist-info")
        shutil.copytree(installed, folder / "openrlhf", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(metadata, folder / "openrlhf-0.11.2.dist-info")
        self.script = folder / "openrlhf" / "cli" / "train_ppo_ray.py"
        self.environment = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}

    def files(self) -> dict[str, bytes]:
        """Every file of the host, by name."""
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}

    def command(self, *words: str) -> subprocess.CompletedProcess:
        """Runs `openrlhf-pgrpo` where this copy is the installed host."""
        return subprocess.run(
            [sys.executable, "-m", "openrlhf_pgrpo.cli.main", *words],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
        )


@pytest.fixture
def host_copy(tmp_path) -> HostCopy:
    return HostCopy(tmp_path / "host")


@pytest.fixture(scope="module")  # no longer: while it lives, Playwright's event loop counts as running in this thread
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    executable = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if executable is None:
        pytest.skip(f"needs a Chromium on the PATH, found none of {', '.join(CHROMIUM)}: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens a page: `with visit(path_or_address, width=..., dark=...) as seen` gives `page`, and what it asked for,
    complained of and popped up, as lists `requests`, `complaints` and `dialogs`."""

    @contextmanager
    def visit(address, width=1200, height=900, dark=False):
        address = address if "://" in str(address) else address.resolve().as_uri()
        scheme = "dark" if dark else "light"
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        page = context.new_page()
        seen = SimpleNamespace(page=page, requests=[], complaints=[], dialogs=[])
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on("console", lambda message: seen.complaints.append(message.text) if message.type != "log" else None)
        page.on("dialog", lambda dialog: (seen.dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        yield seen
        context.close()

    return visit
