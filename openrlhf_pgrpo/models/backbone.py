"""A frozen backbone by folder or hub name: what is asked of it before anything is computed with it."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, GenerationConfig

from openrlhf_pgrpo.core.names import listed
from openrlhf_pgrpo.files import reading
from openrlhf_pgrpo.models.network import UNUSED, longest_text, skeleton
from openrlhf_pgrpo.models.remote_code import trusted
from openrlhf_pgrpo.models.tables import ON_THE_HUB
from openrlhf_pgrpo.progress import progress


def read_config(name: str | Path) -> Any:
    """The config of a model.

    Raises:
        ValueError, OSError: it is broken, or not there; names the file.
    """
    _check_there(name)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():  # it comes last when a model is written
        raise ValueError(
            f"a model needs a config.json, got none in {name}, so there is none or half of one: write it again"
        )
    with reading(f"{name}/config.json"):
        return AutoConfig.from_pretrained(name, trust_remote_code=trusted())


def read_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model.

    Raises:
        ValueError, OSError: it is broken, or not there; names the folder.
    """
    _check_there(name)
    with reading(f"the tokenizer in {name}"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trusted())


def read_stops(name: str | Path, tokenizer: Any) -> list[str]:
    """The tokens that end what vLLM generates with a model: those of its generation config, or of its config if
    that cannot be read.

    Raises:
        ValueError, OSError: the config is broken, or not there; names the file.
    """
    config = read_config(name)
    with reading(f"{name}/generation_config.json"):
        try:
            found = GenerationConfig.from_pretrained(name).eos_token_id
        except OSError:  # vLLM then does so too
            found = GenerationConfig.from_model_config(config).eos_token_id
    ids = found if isinstance(found, list) else [] if found is None else [found]
    return tokenizer.convert_ids_to_tokens(ids)


def _check_there(name: str | Path) -> None:
    if not Path(name).exists() and not ON_THE_HUB.fullmatch(str(name)):
        raise ValueError(f"a model needs to be a folder or a name on the hub, got {name}, which is none: correct it")
    if Path(name).is_file():
        raise ValueError(f"a model needs to be a folder or a name on the hub, got {name}, a file: name the folder")


def check(config: Any, name: str | Path) -> None:
    """Raises ValueError unless a model with this config can be a backbone: it reads texts alone and gives states."""
    check_config(config, name)
    with reading(f"{name}/config.json"):
        backbone = skeleton(config)
    try:
        words = backbone.get_input_embeddings().num_embeddings
    except (NotImplementedError, AttributeError):
        words = 0
    if not words:
        raise ValueError(f"{_need(config, name)}, which reads no texts, or none without images: name another")


def check_config(config: Any, name: str | Path) -> None:
    """The part of `check` that looks at the config alone."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{_need(config, name)}, of encoder and decoder: name another")
    if type(config) not in AutoModel._model_mapping:
        raise ValueError(f"{_need(config, name)}, which transformers has no class for: name another")
    with reading(f"{name}/config.json"):
        size = getattr(config.get_text_config(), "hidden_size", None)
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{_need(config, name)}, with hidden_size {size!r}: name another")


def _need(config: Any, name: str | Path) -> str:
    kind = getattr(config, "model_type", type(config).__name__)
    return f"a backbone needs to be a causal model or an encoder of texts, got a {kind} in {name}/config.json"


def load(name: str | Path, dtype: Any = torch.float32) -> Any:
    """The backbone, in evaluation mode.

    Raises:
        ValueError, OSError: it is no backbone, broken, lacks weights that a state depends on, or has some that are
            not finite; names the folder.
    """
    config = read_config(name)
    check(config, name)
    with progress(f"loading {name}"), reading(f"the weights of {name}"):
        model, report = AutoModel.from_pretrained(
            name, config=config, dtype=dtype, trust_remote_code=trusted(), output_loading_info=True
        )
    check_complete(report["missing_keys"], name)
    check_finite(model.named_parameters(), name)
    return model.eval()


def is_unused(weight: str) -> bool:
    """Whether no state depends on the weight of this name."""
    return re.search(UNUSED, weight) is not None


def check_complete(missing: Iterable[str], name: str | Path) -> None:
    """Raises ValueError if a state depends on one of the weights that a checkpoint lacks."""
    if lacking := sorted(weight for weight in missing if not is_unused(weight)):
        raise ValueError(
            f"{name} needs all weights, got none for {listed(lacking, 5)}, which would be random: save it again, whole"
        )


def check_finite(weights: Iterable[tuple[str, torch.Tensor]], name: str | Path) -> None:
    """Raises ValueError if one of the weights is not finite."""
    for weight, numbers in weights:
        if not torch.isfinite(numbers.detach().sum(dtype=torch.float32)):
            raise ValueError(f"{name} needs finite weights, got nan or inf in {weight}: train or save it again")


def max_length(backbone: Any, tokenizer: Any) -> int:
    """The longest text in tokens: as many as the backbone has positions for, or fewer if its tokenizer says so."""
    return min(longest_text(backbone), tokenizer.model_max_length)
