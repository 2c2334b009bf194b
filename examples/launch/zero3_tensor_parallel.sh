#!/usr/bin/env bash
# P-GRPO for a large policy: ZeRO-3 splits it over all training GPUs, vLLM over the GPUs of an engine. Submits a job to
# a running Ray cluster and follows its output to the end.
#
#     RAY_JOBS=http://head:8265 POLICY=... PROMPTS=... REWARD=reward.py OUT=/shared/run \
#         examples/launch/zero3_tensor_parallel.sh
#
# All nodes must see every path. The same command again resumes from the last checkpoint.
set -euo pipefail

# --- Where -----------------------------------------------------------------------------------------------------------
# Adam in bf16 takes 16 bytes per parameter, split over the training GPUs: 32 billion parameters on 16 GPUs take 32 GB
# on each, plus activations. An engine needs 2 bytes per parameter and its cache.
NODES=${NODES:-4}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
TRAIN_NODES=${TRAIN_NODES:-$((NODES / 2))} # the others generate
GPUS_PER_ENGINE=${GPUS_PER_ENGINE:-4}      # vLLM's tensor parallelism, within a node
RAY_JOBS=${RAY_JOBS:?the job server of the cluster, http://HEAD:8265}

# --- What ------------------------------------------------------------------------------------------------------------
POLICY=${POLICY:?the policy: a folder, or a name on the hub}
PROMPTS=${PROMPTS:?a JSONL file whose rows have prompt, label and persona}
REWARD=${REWARD:?a reward function in a .py file, or the address of a reward server}
OUT=${OUT:?a folder on a shared file system}

# --- How much --------------------------------------------------------------------------------------------------------
PROMPTS_PER_STEP=${PROMPTS_PER_STEP:-128}
SAMPLES_PER_PROMPT=${SAMPLES_PER_PROMPT:-8}
MAX_LEN=${MAX_LEN:-4096} # tokens of prompt and answer together
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-2048}
MICRO_BATCH=${MICRO_BATCH:-1} # samples that a GPU takes at once
EPISODES=${EPISODES:-1}
SAVE_STEPS=${SAVE_STEPS:-20}

if ((TRAIN_NODES < 1 || TRAIN_NODES >= NODES)); then
    echo "zero3_tensor_parallel.sh: TRAIN_NODES needs to leave nodes to generate on: at least 1 and less than" \
        "NODES=$NODES, got $TRAIN_NODES" >&2
    exit 2
fi
if ((GPUS_PER_NODE % GPUS_PER_ENGINE != 0)); then
    echo "zero3_tensor_parallel.sh: GPUS_PER_NODE needs to be a multiple of GPUS_PER_ENGINE=$GPUS_PER_ENGINE, so" \
        "that no engine spans two nodes, got $GPUS_PER_NODE" >&2
    exit 2
fi
SAMPLES=$((PROMPTS_PER_STEP * SAMPLES_PER_PROMPT))
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
    --pgrpo.device gpu

    # Policy, prompts, rewards
    --actor.model_name_or_path "$POLICY"
    --data.prompt_dataset "$PROMPTS"
    --data.input_key prompt
    --data.label_key label
    --data.max_len "$MAX_LEN"
    --reward.remote_url "$REWARD"

    # Training: whole nodes, policy and reference on the same GPUs
    --actor.num_nodes "$TRAIN_NODES"
    --actor.num_gpus_per_node "$GPUS_PER_NODE"
    --ref.num_nodes "$TRAIN_NODES"
    --ref.num_gpus_per_node "$GPUS_PER_NODE"
    --train.colocate_actor_ref
    --ds.zero_stage 3
    --ds.packing_samples
    --ref.offload # the reference waits in CPU memory; --ds.adam_offload does the same for Adam, but is slower
    --actor.gradient_checkpointing_enable

    # Generation: the other nodes, several GPUs for an engine
    --vllm.num_engines "$(((NODES - TRAIN_NODES) * GPUS_PER_NODE / GPUS_PER_ENGINE))"
    --vllm.tensor_parallel_size "$GPUS_PER_ENGINE"
    --vllm.gpu_memory_utilization 0.9
    --vllm.sync_backend nccl
    --rollout.batch_size "$PROMPTS_PER_STEP"
    --rollout.n_samples_per_prompt "$SAMPLES_PER_PROMPT"
    --rollout.max_new_tokens "$MAX_NEW_TOKENS"
    --rollout.micro_batch_size "$MICRO_BATCH"
    --algo.advantage.is_correction_level token # vLLM's probabilities differ slightly from the trainer's

    # One update in a step
    --train.batch_size "$SAMPLES"
    --train.micro_batch_size "$MICRO_BATCH"
    --train.num_episodes "$EPISODES"
    --actor.adam.lr 1e-6
    --algo.kl.init_coef 1e-3

    # Output: checkpoints contain the histories; they are large, because they also contain Adam's state
    --ckpt.output_dir "$OUT"
    --ckpt.path "$OUT/checkpoints"
    --ckpt.save_steps "$SAVE_STEPS"
    --ckpt.max_num 2
    --logger.tensorboard_dir "$OUT/tensorboard"
)
if [[ -s $OUT/checkpoints/_actor/latest ]]; then
    FLAGS+=(--ckpt.load_enable)
fi

# Words after the script's name also go to the trainer.
exec ray job submit --address "$RAY_JOBS" -- python -m openrlhf_pgrpo.cli.train_ppo_ray "${FLAGS[@]}" "$@"
