"""Whether Python code that came with a model may run in this process and its children. It may not unless asked for.

A model's folder may name Python files of its own (`auto_map` in its config.json or tokenizer_config.json). Libraries
run them when they are told `trust_remote_code=True`, and the host tells them always. `HOOKS` stand where transformers
runs such a file, whatever its callers say. vLLM comes through there, too; its child processes are told by its engine.

Light: it runs in every Ray worker.
"""

import os

import wrapt

VARIABLE = "OPENRLHF_PGRPO_TRUST_REMOTE_CODE"  # so that child processes and Ray workers know


def trusted() -> bool:
    """Whether the user asked for it, by --trust_remote_code."""
    return os.environ.get(VARIABLE) == "1"


def trust() -> None:
    """Lets it run from now on, in processes that start later, too."""
    os.environ[VARIABLE] = "1"


def guard_transformers(module) -> None:
    """Wraps the function that decides about such code, and the one that runs it.

    A model that transformers knows itself is loaded without its code, as transformers does by default. For any other,
    and wherever code is about to run, a ValueError names model, flag and risk.
    """

    def decide(resolve, _, args, kwargs):
        return resolve(*args, **kwargs) if trusted() else _local_code(*args, **kwargs)

    def _local_code(trust_remote_code, model_name, has_local_code, has_remote_code, *_, **__) -> bool:
        if has_remote_code and not has_local_code:
            raise ValueError(refusal(model_name))
        return False

    def run(get_class, _, args, kwargs):
        if not trusted():
            raise ValueError(refusal(kwargs.get("module_path") or args[1]))
        return get_class(*args, **kwargs)

    wrapt.wrap_function_wrapper(module, "resolve_trust_remote_code", decide)
    wrapt.wrap_function_wrapper(module, "get_class_in_module", run)


def guard_generation(module) -> None:
    """Lets a model whose folder has a `generate` function of its own (custom_generate/) be loaded without it."""

    def load(load_custom_generate, model, args, kwargs):
        if not trusted():
            raise OSError(refusal(args[0] if args else model.name_or_path))  # its callers go on without the function
        return load_custom_generate(*args, **kwargs)

    wrapt.wrap_function_wrapper(module, "GenerationMixin.load_custom_generate", load)


def guard_vllm(module) -> None:
    """Makes an engine of vLLM trust only what the user trusts; it hands this on to the processes that it starts."""

    def check(post_init, engine_args, args, kwargs):
        engine_args.trust_remote_code = trusted()
        return post_init(*args, **kwargs)

    wrapt.wrap_function_wrapper(module, "EngineArgs.__post_init__", check)


HOOKS = {
    "transformers.dynamic_module_utils": guard_transformers,
    "transformers.generation.utils": guard_generation,
    "vllm.engine.arg_utils": guard_vllm,
}


def refusal(name) -> str:
    """What to say of a model that cannot be loaded without its code."""
    return (
        f"{name} needs Python code of its own to be run, which may do whatever you may do on this machine and its "
        "cluster: read that code, and pass --trust_remote_code if you would run programs of the people it comes from"
    )
