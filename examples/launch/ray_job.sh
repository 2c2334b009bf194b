#!/usr/bin/env bash
# P-GRPO on several nodes. Submits a job to a running Ray cluster and follows its output to the end.
#
#     RAY_JOBS=http://head:8265 POLICY=... PROMPTS=... REWARD=reward.py OUT=/shared/run examples/launch/ray_job.sh
#
# All nodes must see every path. The same command again resumes from the last checkpoint.
set -euo pipefail

# --- Where -----------------------------------------------------------------------------------------------------------
NODES=${NODES:-2}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
GPUS_PER_ENGINE=${GPUS_PER_ENGINE:-1} # vLLM's tensor parallelism
RAY_JOBS=${RAY_JOBS:?the job server of the cluster, http://HEAD:8265}
DEVICE=${DEVICE:-gpu} # or cpu, to try the script on nodes without GPUs

# --- What ------------------------------------------------------------------------------------------------------------
POLICY=${POLICY:?the policy: a folder, or a name on the hub}
PROMPTS=${PROMPTS:?a JSONL file whose rows have prompt, label and persona}
REWARD=${REWARD:?a reward function in a .py file, or the address of a reward server}
OUT=${OUT:?a folder on a shared file system}

# --- How much --------------------------------------------------------------------------------------------------------
PROMPTS_PER_STEP=${PROMPTS_PER_STEP:-256}
SAMPLES_PER_PROMPT=${SAMPLES_PER_PROMPT:-8}
MAX_LEN=${MAX_LEN:-4096} # tokens of prompt and answer together
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-2048}
MICRO_BATCH=${MICRO_BATCH:-4} # samples that a GPU takes at once
EPISODES=${EPISODES:-1}
SAVE_STEPS=${SAVE_STEPS:-20}

GPUS=$((NODES * GPUS_PER_NODE))
if ((GPUS_PER_NODE < 1 || GPUS_PER_NODE % GPUS_PER_ENGINE)); then
    echo "ray_job.sh: an engine needs to fit into a node, got GPUS_PER_NODE=$GPUS_PER_NODE and" \
        "GPUS_PER_ENGINE=$GPUS_PER_ENGINE" >&2
    exit 2
fi
# The job runs in one of Ray's folders, so names of files here become full paths.
for name in POLICY PROMPTS REWARD OUT; do
    if [[ -e ${!name} || $name == OUT ]]; then
        printf -v "$name" %s "$(realpath -m "${!name}")"
    fi
done

FLAGS=(
    # The method
    --advantage_estimator pgrpo
    --data.pref_group_key persona
    --pgrpo.device "$DEVICE"

    # Policy, prompts, rewards
    --actor.model_name_or_path "$POLICY"
    --data.prompt_dataset "$PROMPTS"
    --data.input_key prompt
    --data.label_key label
    --data.max_len "$MAX_LEN"
    --reward.remote_url "$REWARD"

    # GPUs: policy, reference and vLLM share all of them and take turns
    --train.colocate_all
    --actor.num_nodes "$NODES"
    --actor.num_gpus_per_node "$GPUS_PER_NODE"
    --ref.num_nodes "$NODES"
    --ref.num_gpus_per_node "$GPUS_PER_NODE"
    --vllm.num_engines "$((GPUS / GPUS_PER_ENGINE))"
    --vllm.tensor_parallel_size "$GPUS_PER_ENGINE"

    # Generation
    --rollout.batch_size "$PROMPTS_PER_STEP"
    --rollout.n_samples_per_prompt "$SAMPLES_PER_PROMPT"
    --rollout.max_new_tokens "$MAX_NEW_TOKENS"
    --rollout.micro_batch_size "$MICRO_BATCH"
    --algo.advantage.is_correction_level token # vLLM's probabilities differ slightly from the trainer's

    # Training: one update in a step
    --train.batch_size "$((PROMPTS_PER_STEP * SAMPLES_PER_PROMPT))"
    --train.micro_batch_size "$MICRO_BATCH"
    --train.num_episodes "$EPISODES"
    --actor.adam.lr 1e-6
    --actor.gradient_checkpointing_enable
    --algo.kl.init_coef 1e-3
    --ds.zero_stage 3

    # Output: checkpoints contain the histories
    --ckpt.output_dir "$OUT"
    --ckpt.path "$OUT/checkpoints"
    --ckpt.save_steps "$SAVE_STEPS"
    --ckpt.max_num 3
    --logger.tensorboard_dir "$OUT/tensorboard"
)
if [[ $DEVICE == gpu ]]; then
    FLAGS+=(
        --ds.packing_samples
        --vllm.enable_sleep
        --ds.enable_sleep
        --vllm.gpu_memory_utilization 0.6
        --vllm.sync_backend nccl
    )
fi
if [[ -s $OUT/checkpoints/_actor/latest ]]; then
    FLAGS+=(--ckpt.load_enable)
fi

# Words after the script's name also go to the trainer: `ray_job.sh --data.apply_chat_template`.
exec ray job submit --address "$RAY_JOBS" -- python -m openrlhf_pgrpo.cli.train_ppo_ray "${FLAGS[@]}" "$@"
