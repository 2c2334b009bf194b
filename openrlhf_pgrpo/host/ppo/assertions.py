"""What the host's PPO script asserts, as sentences and at once.

The host does so after a minute of imports, with a traceback, and names the base of a robust estimator, which nobody
has typed. `tests/host/ppo/test_assertions.py` compares these refusals with its assertions.
"""

from openrlhf_pgrpo.host import plan

COMPARE_ANSWERS = ("rloo", "reinforce_baseline", "group_norm", "dr_grpo")  # of one prompt: one alone teaches nothing


def check(args) -> None:
    """Refuses combinations of the host's flags; `args` are nested host arguments.

    Raises:
        ValueError: the message says what is needed, what was given and what to do.
    """
    name, samples = args.algo.advantage.estimator, args.rollout.n_samples_per_prompt
    typed = args.robust.estimator or name
    if name in COMPARE_ANSWERS and samples < 2:
        base = f", whose base is {name}," * (name != typed)
        raise ValueError(
            f"{typed}{base} needs --rollout.n_samples_per_prompt of at least 2, got {samples}: raise it, because it "
            "compares answers to one prompt"
        )
    threshold = getattr(args.algo.advantage, "is_correction_threshold", [0.0])  # before 0.11.2 it has another name
    if not 1 <= len(threshold) <= 2:
        raise ValueError(
            f"--algo.advantage.is_correction_threshold needs HIGH or LOW HIGH, got {len(threshold)} numbers: correct "
            "it"
        )
    _check_images(args)
    _check_async(args)
    _check_rewards(args)


def _check_images(args) -> None:
    if args.data.max_images_per_prompt < 1:
        return
    if args.algo.advantage.estimator == "gae":
        raise ValueError("--data.max_images_per_prompt needs an estimator without a critic, got gae: take another one")
    if args.ds.packing_samples:
        raise ValueError(
            "--data.max_images_per_prompt needs samples in rows of their own, got --ds.packing_samples: leave one out"
        )


def _check_async(args) -> None:
    """What asynchronous training needs, and what needs it."""
    train, rollout = args.train, args.rollout
    if train.async_enable:
        if args.vllm.enable_sleep and train.colocate_all:  # without colocation the host itself takes it back
            raise ValueError(
                "--train.async_enable needs engines that stay awake, got --vllm.enable_sleep: leave one of them out"
            )
        return
    if train.partial_rollout_enable:
        raise ValueError("--train.partial_rollout_enable needs --train.async_enable, got none: pass both or neither")
    generated = rollout.vllm_generate_batch_size or 0
    if generated > rollout.batch_size:
        raise ValueError(
            "--rollout.vllm_generate_batch_size above --rollout.batch_size needs --train.async_enable, got "
            f"{generated} and {rollout.batch_size} without it: make them equal, or train asynchronously"
        )


def _check_rewards(args) -> None:
    """What a local reward model, which the host asks only in training, cannot do."""
    local = plan.rewards_are_local(args)
    algo, samples = args.algo, args.rollout.n_samples_per_prompt
    if args.eval.dataset and local:
        raise ValueError(
            "--eval.dataset needs rewards of --reward.remote_url or --train.agent_func_path, got a local reward "
            "model, which the host does not ask there: leave it out, or serve the model (openrlhf_pgrpo.cli.serve_rm)"
        )
    if not algo.dynamic_filtering_enable:
        return
    low, high = algo.dynamic_filtering_range
    if not low < high:
        raise ValueError(
            f"--algo.dynamic_filtering_range needs a lower and a higher number, got {low} {high}: correct it"
        )
    if local or samples < 2:
        got = "a local reward model" if local else f"{samples} answer"
        raise ValueError(
            "--algo.dynamic_filtering_enable needs scores of a reward function, server or agent, and at least 2 "
            f"answers to a prompt (--rollout.n_samples_per_prompt), got {got}: leave it out, or change these"
        )
