"""Answers of a policy to prompts, as they come, from vLLM in a process of its own.

At its end a process gives back all memory, which an engine of vLLM in our own process does not: so two policies can be
asked one after the other.
"""

import importlib.util
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from openrlhf_pgrpo.host.cpu.launch import environment
from openrlhf_pgrpo.models import backbone as backbones
from openrlhf_pgrpo.models.form import PLAIN, Form, Writer
from openrlhf_pgrpo.models.messages import Text
from openrlhf_pgrpo.models.remote_code import trusted

PATIENCE = 20.0  # seconds for a process to end before it is killed


@dataclass(frozen=True)
class Sampling:
    """How a policy answers.

    Raises:
        ValueError: what vLLM would refuse only after its start, or a seed that it takes for none.
    """

    temperature: float = 1.0
    max_tokens: int = 512
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"--temperature needs a number from 0 to 2, got {self.temperature}: correct it")
        if self.max_tokens < 1:
            raise ValueError(f"--max_tokens needs at least 1, got {self.max_tokens}: correct it")
        if self.seed < 0:
            raise ValueError(f"--seed needs at least 0, got {self.seed}: correct it")


class Answer(NamedTuple):
    """Of a prompt, by its number; `cut` if --max_tokens was its end."""

    number: int
    text: str
    cut: bool


def writers_for(policies: Sequence[str], plain_prompts: bool = False) -> list[Writer]:
    """What writes the prompts of each policy: by its own chat template, or all of them plain if none has one.

    Args:
        plain_prompts: plain, whatever they have.

    Raises:
        ValueError, OSError: some have a chat template and others have none, or a tokenizer cannot be read.
    """
    tokenizers = [backbones.read_tokenizer(policy) for policy in policies]
    has_template = [bool(tokenizer.chat_template) for tokenizer in tokenizers]
    if plain_prompts or not any(has_template):
        return [Writer(PLAIN, tokenizer) for tokenizer in tokenizers]
    if not all(has_template):
        with_one, without = (policies[has_template.index(has)] for has in (True, False))
        raise ValueError(
            f"policies need to be prompted alike, got {with_one} with a chat template and {without} without one: give "
            "that one a template, or pass --plain_prompts to prompt both without"
        )
    return [Writer(Form.of_tokenizer(tokenizer, name), tokenizer) for tokenizer, name in zip(tokenizers, policies)]


def suit_vllm_to_this_machine() -> None:
    """Without a GPU, sets the environment variables that limit what vLLM takes."""
    if not torch.cuda.is_available():
        os.environ.update(environment())


def written(writer: Writer, prompts: dict[str, Text]) -> list[str]:
    """The texts of prompts, by their places in a file.

    Raises:
        ValueError: a prompt that cannot be written, with its place.
    """
    texts = []
    for place, prompt in prompts.items():
        try:
            texts.append(writer.prompt(prompt))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return texts


def prompt_ids(writer: Writer, prompts: dict[str, Text]) -> list[list[int]]:
    """The tokens of prompts, as `written`: with nothing in front, as in a rollout."""
    return writer.tokenizer(written(writer, prompts), add_special_tokens=False, verbose=False)["input_ids"]


def generate(policy: str, ids: dict[int, list[int]], sampling: Sampling) -> Iterator[Answer]:
    """An answer to each prompt (number -> tokens), in the order in which they are finished.

    The sampling of a prompt depends on its number and the seed alone, not on which others are asked with it.

    Raises:
        ValueError: vLLM cannot answer; names the policy.
        ModuleNotFoundError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ModuleNotFoundError("answers need vLLM, which is not installed: install it", name="vllm")
    suit_vllm_to_this_machine()
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_generate, args=(sending, policy, ids, sampling), name=f"vLLM with {policy}")
    # Ctrl-C reaches the command alone, which then ends this process. It is deaf from its start on: by itself it could
    # be so only after its imports, which take seconds.
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, heard)
    sending.close()
    try:
        for _ in ids:
            sent = receiving.recv()
            if isinstance(sent, str):
                raise ValueError(f"{policy} cannot answer with vLLM, {sent}")
            yield sent
        process.join(PATIENCE)  # it ends by itself
    except EOFError:
        process.join(PATIENCE)
        raise ValueError(
            f"{policy} needs a vLLM that goes on, got one that ended with exit code {process.exitcode}: look at its "
            "output above, and start the command again"
        ) from None
    finally:
        process.terminate()
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()


def _generate(sending: Any, policy: str, ids: dict[int, list[int]], sampling: Sampling) -> None:
    """Runs in the process. Sends each answer, or a text that says what is wrong."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what vLLM says is no result of the command
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that processes of vLLM's own are ended, too
    try:
        for answer in _answers(policy, ids, sampling):
            sending.send(answer)
    except BrokenPipeError:
        pass  # the command was killed, and nobody waits for answers
    except Exception as error:
        said = str(error).strip() or "nothing more"
        sending.send(f"{type(error).__name__}: {said[:500]}")


def _answers(policy: str, ids: dict[int, list[int]], sampling: Sampling) -> Iterator[Answer]:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = {
        number: SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed + number,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for number in ids
    }
    eager = not torch.cuda.is_available()  # compiling pays off on a GPU only
    engine = LLM(policy, enforce_eager=eager, trust_remote_code=trusted()).llm_engine
    longest = engine.model_config.max_model_len
    for number, prompt in ids.items():
        if len(prompt) >= longest:
            raise ValueError(f"a prompt needs fewer than its {longest} tokens, got {len(prompt)} in prompt {number}")
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params[number])
    while engine.has_unfinished_requests():  # what LLM.generate does, which gives no answer before the last one
        for output in engine.step():
            if output.finished:
                answer = output.outputs[0]
                yield Answer(int(output.request_id), answer.text, answer.finish_reason == "length")
