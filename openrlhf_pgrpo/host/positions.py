"""How long a text, of prompt and answer together, the models of a run can read."""

import json
from pathlib import Path

# Models (their `model_type`) with a table of positions, where a longer text ends in an IndexError: tried with
# transformers 5.15. Those that compute positions only become worse.
TABLE_OF_POSITIONS = {
    *("gpt2", "gpt_neo", "gpt_bigcode", "opt", "openai-gpt", "gptj", "codegen", "ctrl", "biogpt", "xlm"),
    *("bert", "bert-generation", "megatron-bert", "mobilebert", "distilbert", "rembert", "albert", "electra", "ernie"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "mpnet"),
    *("deberta", "deberta-v2", "longformer", "big_bird", "nystromformer", "mra", "yoso", "fnet", "canine", "ibert"),
    *("roformer", "convbert", "nomic_bert", "flaubert", "luke", "esm", "roc_bert", "splinter", "layoutlm"),
    *("bart", "mbart", "plbart", "mvp", "pegasus", "bigbird_pegasus", "marian", "blenderbot", "blenderbot-small"),
    *("prophetnet", "trocr"),
}


def check(args, *sections: str) -> list[str]:
    """Compares the longest texts, of prompt and answer together, with the positions of models that are here.

    Args:
        sections: of the arguments, each with a model that the run may read.

    Raises:
        ValueError: a model has no positions for them.
    """
    said, length = [], args.data.max_len
    for section in sections:
        name = getattr(getattr(args, section, None), "model_name_or_path", None)
        kind, positions = _positions(name)
        if positions is None or length <= positions:
            continue
        flag = f"--{section}.model_name_or_path {name}"
        if kind in TABLE_OF_POSITIONS:
            raise ValueError(
                f"--data.max_len needs at most {positions} tokens, the positions of {flag}, got {length}: lower it or "
                "name another model, because a longer text, prompt and answer together, would end the run"
            )
        said.append(f"warning: --data.max_len {length} is more than the {positions} tokens that {flag} was made for")
    return said


def _positions(name: str | None) -> tuple[str | None, int | None]:
    """Type of a model, or of its part for text, and for how many tokens it was made; None is unknown."""
    try:
        config = json.loads((Path(name or "") / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        positions = config.get("max_position_embeddings", config.get("n_positions"))
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        stretched = rope.get("rope_type", rope.get("type", "default")) != "default"
    except (OSError, ValueError, AttributeError):  # what is wrong with it is said when the model is loaded
        return None, None
    known = isinstance(positions, int) and positions > 0 and not stretched
    return config.get("model_type"), positions if known else None
