#!/usr/bin/env bash
# P-GRPO that never waits for its longest answers: generation and training run at the same time, and new weights reach
# vLLM in the middle of answers. Submits a job to a running Ray cluster and follows its output to the end.
#
#     RAY_JOBS=http://head:8265 POLICY=... PROMPTS=... REWARD=reward.py OUT=/shared/run \
#         examples/launch/async_partial_rollout.sh
#
# All nodes must see every path. The same command again resumes from the last checkpoint; answers that waited for
# training are generated again.
set -euo pipefail

# --- Where -----------------------------------------------------------------------------------------------------------
NODES=${NODES:-2}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
TRAIN_GPUS_PER_NODE=${TRAIN_GPUS_PER_NODE:-$((GPUS_PER_NODE / 2))} # the others generate; neither should wait
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
MAX_LEN=${MAX_LEN:-16384} # tokens of prompt and answer together
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-14336}
MICRO_BATCH=${MICRO_BATCH:-1} # samples that a GPU takes at once
QUEUE=${QUEUE:-1}             # batches that may wait; with more, answers are older when they are trained on
EPISODES=${EPISODES:-1}
SAVE_STEPS=${SAVE_STEPS:-20}

if ((TRAIN_GPUS_PER_NODE < 1 || TRAIN_GPUS_PER_NODE >= GPUS_PER_NODE)); then
    echo "async_partial_rollout.sh: TRAIN_GPUS_PER_NODE needs to leave GPUs to generate on: at least 1 and less than" \
        "GPUS_PER_NODE=$GPUS_PER_NODE, got $TRAIN_GPUS_PER_NODE" >&2
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
    --pgrpo.device "$DEVICE"

    # Policy, prompts, rewards
    --actor.model_name_or_path "$POLICY"
    --data.prompt_dataset "$PROMPTS"
    --data.input_key prompt
    --data.label_key label
    --data.max_len "$MAX_LEN"
    --reward.remote_url "$REWARD"

    # Generation continues while a batch is trained on. It pauses for new weights, and then continues the same answers
    --train.async_enable
    --train.async_queue_size "$QUEUE"
    --train.partial_rollout_enable

    # So tokens of one answer may come from different policies. The loss of a token is multiplied by the ratio of its
    # probability now to that when it was generated; outside of these bounds the token is left out
    --algo.advantage.is_correction_level token
    --algo.advantage.is_correction_gating ratio
    --algo.advantage.is_correction_mode mask
    --algo.advantage.is_correction_threshold 0.5 5.0

    # GPUs: no --train.colocate_all and no sleep, because the models do not take turns here
    --actor.num_nodes "$NODES"
    --actor.num_gpus_per_node "$TRAIN_GPUS_PER_NODE"
    --ref.num_nodes "$NODES"
    --ref.num_gpus_per_node "$TRAIN_GPUS_PER_NODE"
    --train.colocate_actor_ref
    --vllm.num_engines "$((NODES * (GPUS_PER_NODE - TRAIN_GPUS_PER_NODE)))"
    --vllm.tensor_parallel_size 1

    # Generation
    --rollout.batch_size "$PROMPTS_PER_STEP"
    --rollout.n_samples_per_prompt "$SAMPLES_PER_PROMPT"
    --rollout.max_new_tokens "$MAX_NEW_TOKENS"
    --rollout.micro_batch_size "$MICRO_BATCH"

    # Training: one update in a step
    --train.batch_size "$SAMPLES"
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
        --vllm.gpu_memory_utilization 0.9
        --vllm.sync_backend nccl
    )
fi
if [[ -s $OUT/checkpoints/_actor/latest ]]; then
    FLAGS+=(--ckpt.load_enable)
fi

# Words after the script's name also go to the trainer.
exec ray job submit --address "$RAY_JOBS" -- python -m openrlhf_pgrpo.cli.train_ppo_ray "${FLAGS[@]}" "$@"
