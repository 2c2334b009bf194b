"""The form of a reward model's texts: how a prompt and its answer are written, from strings or from lists of messages.

A reward means something only for texts of the form that the model was made from. So the model's config records it,
and whoever scores a text writes it here:

    plain           the prompt, then the answer, as they are
    chat template   the text that the template makes of messages, as a policy is prompted; a prompt that is a string is
                    the message of a user
    input template  a text with {} where the prompt goes, as the host's --data.input_template
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from openrlhf_pgrpo.core.names import in_words, listed
from openrlhf_pgrpo.models import backbone as backbones
from openrlhf_pgrpo.models.messages import Text, no_messages

KEY = "base_reward_form"  # in the config of a model
NO_TEMPLATE = "plain"  # instead of the folder of a template

# Conversations that tell templates apart: a system prompt of their own, how roles are written, where spaces go.
PROBES: tuple[list[dict], ...] = (
    [{"role": "user", "content": " one\n"}],
    [{"role": "system", "content": "two"}, {"role": "user", "content": "three"}],
    [*({"role": role, "content": role} for role in ("user", "assistant", "user"))],
)
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")  # as Qwen3 writes before an answer without a thought


@dataclass(frozen=True)
class Form:
    """How texts are written; at most one of the two templates is given.

    Attributes:
        chat_template: in Jinja. special_tokens: those of the tokenizer that it was made for, by name, because it may
            print them. input_template: a text with {} where the prompt goes.
    """

    chat_template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)
    input_template: str | None = None

    @classmethod
    def of_tokenizer(cls, tokenizer: Any, name: str | Path) -> "Form":
        """The chat template of the tokenizer of `name`.

        Raises:
            ValueError: it has none.
        """
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise ValueError(
                f"a chat template needs a model that has one, got none in the tokenizer of {name}: name another model"
            ) from error
        return cls(template, {key: str(token) for key, token in tokenizer.special_tokens_map.items()})

    @classmethod
    def of_model(cls, config: Any, name: str, given: str | None = None) -> "Form":
        """The form that a model's config records.

        Args:
            given: the value of --chat_template, for a model that was written before forms were recorded.

        Raises:
            ValueError: there is no record and nothing given, both, or a broken record.
        """
        if not recorded(config):
            if given is None:
                raise ValueError(
                    f"{name} needs a record of how its texts are written, got a model from before there was one: say "
                    f"it with --chat_template {NO_TEMPLATE}, or with the folder of the model whose template it was"
                )
            return read(given)
        if given is not None:
            raise ValueError(
                f"--chat_template needs a model without a record of its texts, got {name}, which has one: leave it out"
            )
        record = getattr(config, KEY)
        wrong = not isinstance(record, dict) or record.keys() != asdict(PLAIN).keys()
        if wrong or not isinstance(record["special_tokens"], dict) or all(record[key] for key in TEMPLATES):
            raise ValueError(
                f"{name}/config.json needs a form of texts as {KEY}, got {str(record)[:80]}: write it again"
            )
        return cls(**record)

    def record(self) -> dict:
        """For the config of a model."""
        return asdict(self)

    def __str__(self) -> str:
        if self.chat_template is not None:
            return "by a chat template"
        return NO_TEMPLATE if self.input_template is None else f"by the input template {self.input_template!r}"


PLAIN = Form()
TEMPLATES = ("chat_template", "input_template")


def read(name: str) -> Form:
    """The form that a value of --chat_template names: `plain`, or a folder or hub name of a model with a template."""
    return PLAIN if name == NO_TEMPLATE else Form.of_tokenizer(backbones.read_tokenizer(name), name)


def recorded(config: Any) -> bool:
    """Whether a model says how its texts are written; older ones do not."""
    return getattr(config, KEY, None) is not None


class Writer:
    """Writes prompts and answers in one form."""

    def __init__(self, form: Form, tokenizer: Any):
        self.form, self.tokenizer = form, tokenizer

    def prompt(self, prompt: Text) -> str:
        """The text of a prompt, up to where its answer begins.

        Raises:
            ValueError: it is neither text nor messages, or messages that this form cannot write.
        """
        if self.form.chat_template is not None:
            return self._rendered(_messages(prompt, "user"), add_generation_prompt=True)
        text = _plain(prompt, "prompt")
        return text if self.form.input_template is None else self.form.input_template.format(text)

    def response(self, prompt: Text, response: Text) -> str:
        """The text of a response to `prompt`, as a policy makes it: that of a text, or `words` of the messages that
        follow the prompt. So an answer that is one message is the same text as its words alone.

        Raises:
            ValueError: as `prompt`, or a template that does not begin a conversation with its prompt.
        """
        if isinstance(response, str):
            return self.begun(response)
        if self.form.chat_template is None:
            return _plain(response, "response")
        before = self.prompt(prompt)
        whole = self._rendered([*_messages(prompt, "user"), *_messages(response, "assistant")])
        if not whole.startswith(before):
            raise ValueError(
                f"a chat template needs to begin a conversation with its prompt, got {whole[-80:]!r} after "
                f"{before[-80:]!r}: write the answer as a text, or take another template"
            )
        return self.words(whole[len(before) :])

    def begun(self, words: str) -> str:
        """An answer with the white space that the chat template has a policy begin it with, unless it brings some."""
        before = self.around[0]
        return before + words if before.isspace() and not words[:1].isspace() else words

    def words(self, turn: str) -> str:
        """What a policy writes of the text that the chat template writes behind a prompt: all but an empty thought
        that the prompt does not begin, and the mark that closes the turn."""
        before, behind = self.around
        if EMPTY_THOUGHT.fullmatch(before):
            turn = turn.removeprefix(before)
        return turn.removesuffix(behind)

    @cached_property
    def around(self) -> tuple[str, str]:
        """What the chat template writes before and behind an assistant's words, whatever they are."""
        for probe in PROBES if self.form.chat_template is not None else ():
            try:
                prompt = self.prompt(probe)
                one, other = (self._rendered([*probe, {"role": "assistant", "content": word}]) for word in "ab")
            except ValueError:  # a template that needs a system prompt, for instance
                continue
            begun = one.startswith(prompt) and other.startswith(prompt)
            before = os.path.commonprefix([one[len(prompt) :], other[len(prompt) :]]) if begun else ""
            return before, os.path.commonprefix([one[::-1], other[::-1]])[::-1]
        return "", ""

    @property
    def ends(self) -> list[str]:
        """Texts that close an answer of the policy whose chat template this is: its end token, all that closes a turn,
        and the first token of that."""
        closer = self.around[1].strip()
        tokens = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True) if closer else []
        first = next((token for token in tokens if closer.startswith(token)), None)
        return [*dict.fromkeys(filter(None, (self.form.special_tokens.get("eos_token"), closer, first)))]

    def pairs(
        self, prompts: Sequence[Text], responses: Sequence[Text], place: Callable[[int], str] | None = None
    ) -> tuple[list[str], list[str]]:
        """The texts of prompts and their responses, both (N,). Each prompt is written once.

        Args:
            place: says where the text of a number stands, for a message.

        Raises:
            ValueError: as `response`, with its place or its number.
        """
        written: dict[str, str] = {}
        texts: tuple[list[str], list[str]] = ([], [])
        for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            try:
                key = json.dumps(prompt, default=str)
                if key not in written:
                    written[key] = self.prompt(prompt)
                texts[0].append(written[key])
                texts[1].append(self.response(prompt, response))
            except ValueError as error:
                raise ValueError(f"{place(number)}: {error}" if place else f"{error} (text {number})") from error
        return texts

    @cached_property
    def opening(self) -> str:
        """What this form writes between the words of a prompt and its answer, such as the name of a role."""
        begun = self._tried("a"), self._tried("b")
        return os.path.commonprefix([text[::-1] for text in begun if text])[::-1]

    def same_prompts(self, other: "Writer") -> bool:
        """Whether both make one text of the same prompts, as far as PROBES tell."""
        if (self.form.chat_template is None) != (other.form.chat_template is None):
            return False
        probes = PROBES if self.form.chat_template is not None else ("one", " two\n")
        return all(self._tried(probe) == other._tried(probe) for probe in probes)

    def _tried(self, prompt: Text) -> str | None:
        try:
            return self.prompt(prompt)
        except ValueError:  # a template without a system prompt, for instance
            return None

    def _rendered(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.form.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.form.special_tokens,
            )
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"a chat template needs messages that it knows, got {type(error).__name__}, {str(error)[:200]}, for "
                f"the roles {listed([message['role'] for message in messages])}: change them or the template"
            ) from error


def _messages(text: Text, role: str) -> list[dict]:
    if isinstance(text, str):
        return [{"role": role, "content": text}]
    if wrong := no_messages(text):
        raise ValueError(
            f"a conversation needs a list of messages, {{'role': ..., 'content': ...}}, got {wrong}: correct it"
        )
    return text


def _plain(text: Text, what: str) -> str:
    if isinstance(text, str):
        return text
    raise ValueError(
        f"a {what} needs to be a text, because this model's texts are written without a chat template, got "
        f"{in_words(text)}: write it as one, or make the model with --chat_template"
    )
