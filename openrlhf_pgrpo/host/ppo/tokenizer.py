"""Each rollout engine gets the tokenizer once, and not with every prompt.

The host pickles it anew for every prompt: 40 ms of the one process that trains and 1.6 MB for SmolLM2's 49,000 tokens,
and 100 ms in the engine. Here it lies in Ray's store, calls name it, and an engine builds it once. Samples of one
prompt have always shared one object; now those of all prompts do. Remove it once the host's engines keep a tokenizer;
`docs/upstream/tokenizer.md` is the first half.
"""

import uuid
from typing import Any

import wrapt

from openrlhf_pgrpo.host.flags import in_our_runs

_built: dict[str, Any] = {}  # tokenizers of this process, by key


def install(module) -> None:
    """Lets `SamplesGenerator` send a reference. `module` is the host's samples_generator."""

    def dispatch(wrapped, generator, args, kwargs):
        tokenizer = generator.tokenizer
        sent, reference = getattr(generator, "_pgrpo_tokenizer", (None, None))
        if sent is not tokenizer:
            reference = module.ray.put(Sent(tokenizer))
            generator._pgrpo_tokenizer = tokenizer, reference
        generator.tokenizer = reference
        try:
            return wrapped(*args, **kwargs)
        finally:
            generator.tokenizer = tokenizer

    wrapt.wrap_function_wrapper(module, "SamplesGenerator._dispatch_prompts_to_vllm", in_our_runs(dispatch))


class Sent:
    """An object that arrives as itself, built once in each process."""

    def __init__(self, content):
        from ray import cloudpickle

        self.key, self.pickled = uuid.uuid4().hex, cloudpickle.dumps(content)

    def __reduce__(self):
        return build, (self.key, self.pickled)


def build(key: str, pickled: bytes):
    from ray import cloudpickle

    if key not in _built:
        _built[key] = cloudpickle.loads(pickled)
    return _built[key]
