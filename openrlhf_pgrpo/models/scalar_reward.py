"""One user of a factorized reward model as a plain reward model of the host, for every tool that takes one.

    lambda_u . (head h) = (lambda_u head) . h

so the user's coefficients (D,) and the head (D, H) fold into a head of one row (1, H).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from openrlhf_pgrpo.files import reading
from openrlhf_pgrpo.models.backbone import check_finite, read_tokenizer
from openrlhf_pgrpo.models.folder import COEFFICIENTS, CONFIG_KEYS, SCALE, Folder, write_files
from openrlhf_pgrpo.models.form import KEY as FORM
from openrlhf_pgrpo.models.output_folder import WEIGHTS, check_new


def export_user(model: Folder, coefficients: np.ndarray, output: str | Path) -> None:
    """Writes the reward lambda . phi for coefficients (D,) to the new folder `output`.

    Raises:
        ValueError: coefficients that do not fit, or whose weights do not fit into float32; a folder that is not empty;
            a model that was replaced meanwhile; or base rewards of the mean over a text: the host's reward model reads
            the last token only.
    """
    check_new(output, "--output", [model.name])
    head = model.tensor(f"{model.head_name}.weight")
    coefficients = np.asarray(coefficients, np.float64)
    if coefficients.shape != (len(head),) or not np.isfinite(coefficients).all():
        raise ValueError(f"a user of {model.name} needs {len(head)} finite coefficients, got {coefficients}")
    if model.config.base_reward_pooling != "last":
        raise ValueError(
            f"a plain reward model needs base rewards of the last token, got a mean over all in {model.name}: train "
            "it with --reward.pooling last, or serve it as it is"
        )
    model.check_shapes()
    with reading(f"{model.name}/{WEIGHTS}"):
        weights = load_file(model.path(WEIGHTS))
    check_finite(weights.items(), model.path(WEIGHTS))
    del weights[COEFFICIENTS]
    weights[f"{model.head_name}.weight"] = own = torch.from_numpy(coefficients @ head)[None].float()
    if not own.isfinite().all() or not own.any():
        got = "inf or nan" if own.any() else "only zeros"
        raise ValueError(
            f"a user of {model.name} needs weights that float32 can hold, got {got} as coefficients times head: train "
            "it again, or look at these coefficients"
        )
    config: Any = type(model.config).from_dict(
        {name: value for name, value in model.config.to_dict().items() if name not in (*CONFIG_KEYS, *SCALE)}
    )
    config.architectures = ["RewardModel"]  # the host's name for it
    setattr(config, FORM, model.form.record())  # PPO writes its prompts alike, or refuses
    tokenizer = read_tokenizer(model.name)
    tokenizer.chat_template = model.form.chat_template
    model.check_unchanged()
    write_files(output, config, weights, tokenizer)
