"""The form in which the host writes prompts, as its flags say, and whether it is that of a reward model."""

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
