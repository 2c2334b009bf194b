"""What the driver asks for on a machine without a GPU: environment, logical resources, other defaults, refusals."""

import os

from openrlhf_pgrpo.host import flags, plan

ENGINE_THREADS = "OPENRLHF_PGRPO_ENGINE_THREADS"  # environment variable, read where engines are started


def environment() -> dict[str, str]:
    """Environment variables that the driver and every Ray worker need. Those that the user has set stay."""
    cores = len(os.sched_getaffinity(0))
    defaults = {
        # DeepSpeed guesses its accelerator from what is installed, so we name it.
        "DS_ACCELERATOR": "cpu",
        # Two trainer ranks of one thread beat one rank of two threads: 23 against 30 s a step for SmolLM2-135M on two
        # cores, where one rank of one thread takes 32 s. So threads are kept few and ranks use the cores.
        "OMP_NUM_THREADS": str(max(1, cores // 2)),
        ENGINE_THREADS: os.environ.get("OMP_NUM_THREADS", str(cores)),
        # GiB; without it vLLM wants `gpu_memory_utilization` (host default 0.95) of the machine's memory.
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # vLLM would pin its threads to all cores but one.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Keeps vLLM's worker inside its engine process: one process less to start, and no engine that spins on a core
        # while it waits for the worker.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # The host (entropy) and vLLM (log-probs) decorate small functions with torch.compile, which on a CPU calls a
        # C++ compiler in the middle of the first step, for half a minute.
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray would start a worker for every logical CPU, without our environment, so that none could be used.
        "RAY_prestart_worker_first_driver": "0",
    }
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


def engine_threads(args) -> int:
    """The number of threads of each vLLM engine. Ranks sleep while engines sample, so these share all cores; in async
    training both work, and they get as many as every process. A number that the user chose is everybody's."""
    of_all = int(os.environ["OMP_NUM_THREADS"])
    if args.train.async_enable:
        return of_all
    return max(of_all, int(os.environ[ENGINE_THREADS]) // args.vllm.num_engines)


def logical_gpus(args) -> int:
    """The number of logical GPUs that Ray needs: one for every model process and vLLM engine.

    Colocated models need fewer; spare ones cost nothing.
    """
    roles = [getattr(args, role) for role in plan.roles(args)]
    engines = args.vllm.num_engines * args.vllm.tensor_parallel_size
    return sum(role.num_nodes * role.num_gpus_per_node for role in roles) + engines


def logical_cpus(args) -> int:
    """The number of logical CPUs that Ray needs: one for every logical GPU, and one for each actor that has none.

    Actors without a GPU are the trainer and, in async mode, the sampler, the training actor and two queues.
    """
    return logical_gpus(args) + (5 if args.train.async_enable else 1)


# Flag: the host's default, which suits only a GPU, and its replacement.
DEFAULTS = {
    "ds.attn_implementation": ("flash_attention_2", "sdpa"),
    "vllm.enforce_eager": (False, True),
    "actor.num_gpus_per_node": (8, 1),
    "ref.num_gpus_per_node": (8, 1),
    "critic.num_gpus_per_node": (8, 1),
    "reward.num_gpus_per_node": (8, 1),
}


def replace_gpu_defaults(args) -> None:
    """Replaces the defaults of the host's command line that suit a GPU only, and says so in one line.

    A typed value that equals the default is replaced as well: parsed arguments do not tell the two apart.
    """
    changed = []
    for flag, (default, value) in DEFAULTS.items():
        section, name = flag.split(".")
        values = getattr(args, section, None)  # the preference trainers have fewer sections and flags
        if values is not None and getattr(values, name, None) == default:
            setattr(values, name, value)
            changed.append(f"--{flag} {value}")
    if changed:
        print(f"[pgrpo] no GPU: instead of the host's defaults, {', '.join(changed)}")


# Flag: which values are refused, and what they need.
REFUSED = {
    "ds.packing_samples": (bool, "flash-attn"),
    "train.dynamic_batch_enable": (bool, "packed samples, and they need flash-attn"),
    "ds.ring_attn_size": (lambda size: size > 1, "packed samples, and they need flash-attn"),
    "ds.attn_implementation": (lambda name: "flash" in name, "flash-attn"),
    "vllm.enable_sleep": (bool, "GPU memory to give back"),
    "ds.enable_sleep": (bool, "GPU memory to give back"),
    "vllm.sync_with_ray": (bool, "a CUDA buffer for the weights"),
    "vllm.tensor_parallel_size": (lambda size: size > 1, "a GPU for every shard"),
    "ds.tensor_parallel_size": (lambda size: size > 1, "a GPU for every shard"),
    "ds.load_in_4bit": (bool, "bitsandbytes with CUDA"),
    "ds.param_dtype": (lambda dtype: dtype == "fp16", "a GPU (bf16 works without)"),
    "ds.adam_offload": (bool, "GPU memory to offload, and a compiler"),
    "ds.deepcompile": (bool, "a compiler for CUDA kernels"),
    "ds.use_liger_kernel": (bool, "Triton kernels"),
    "ds.lora.rank": (lambda rank: rank > 0, "a weight sync that merges adapters into the weights of vLLM"),
}


def refuse_unsupported(args) -> None:
    """Raises ValueError for the first flag that cannot work without a GPU. Call `replace_gpu_defaults` first."""
    for flag, (refused, need) in REFUSED.items():
        if flag == "ds.lora.rank" and not hasattr(args, "vllm"):  # the preference trainers do not send weights
            continue
        value = flags.value(args, flag, None)  # the preference trainers have fewer flags
        if value is not None and refused(value):
            raise ValueError(
                f"--{flag} needs {need}, got {value} on a machine without a GPU; leave it out, or use a GPU."
            )
