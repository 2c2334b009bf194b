"""The form in which the host writes prompts, as its flags say."""

import json
from hashlib import sha256

from openrlhf_pgrpo.models import backbone
from openrlhf_pgrpo.models.form import Form


def asked_form(data, name: str) -> Form:
    """The form that the flags of a trainer ask for.

    Args:
        data: nested arguments of `--data.*`. name: the model whose tokenizer the trainer uses.

    Raises:
        ValueError: a chat template is asked for, and the model has none.
    """
    if not data.apply_chat_template:
        return Form(input_template=data.input_template or None)
    tokenizer = backbone.read_tokenizer(name)
    if given := getattr(data, "tokenizer_chat_template", None):
        tokenizer.chat_template = given
    return Form.of_tokenizer(tokenizer, name)


def settings(data, form: Form) -> dict:
    """What decides which texts a trainer on pairs sees, for the check at resume; nested arguments of `--data.*`.

    A digest stands for a chat template, which is long, and its special tokens.
    """
    template = form.chat_template and sha256(json.dumps(form.record()).encode()).hexdigest()[:12]
    return {
        **{f"data.{name}": getattr(data, name) for name in ("prompt_key", "chosen_key", "rejected_key", "max_len")},
        "data.input_template": form.input_template,
        "data.apply_chat_template, the digest of the template,": template,
    }
