#!/usr/bin/env bash
# P-GRPO on one machine: policy, reference and vLLM are on the same GPUs and take turns.
#
#     POLICY=... PROMPTS=prompts.jsonl REWARD=reward.py OUT=run examples/launch/single_node.sh
#
# The same command again resumes from the last checkpoint.
set -euo pipefail

# --- Where -----------------------------------------------------------------------------------------------------------
GPUS=${GPUS:-8}
GPUS_PER_ENGINE=${GPUS_PER_ENGINE:-1} # vLLM's tensor parallelism; increase it if the policy does not fit on one GPU

# --- What ------------------------------------------------------------------------------------------------------------
POLICY=${POLICY:?the policy: a folder, or a name on the hub}
PROMPTS=${PROMPTS:?a JSONL file whose rows have prompt, label and persona}
REWARD=${REWARD:?a reward function in a .py file, or the address of a reward server}
OUT=${OUT:?a folder for checkpoints, logs and the policy}

# --- How much --------------------------------------------------------------------------------------------------------
PROMPTS_PER_STEP=${PROMPTS_PER_STEP:-128}
SAMPLES_PER_PROMPT=${SAMPLES_PER_PROMPT:-8}
MAX_LEN=${MAX_LEN:-4096} # tokens of prompt and answer together
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-2048}
MICRO_BATCH=${MICRO_BATCH:-4} # samples that a GPU takes at once
EPISODES=${EPISODES:-1}
SAVE_STEPS=${SAVE_STEPS:-20}

SAMPLES=$((PROMPTS_PER_STEP * SAMPLES_PER_PROMPT))
if ((GPUS % GPUS_PER_ENGINE != 0)); then
    echo "single_node.sh: GPUS needs to be a multiple of GPUS_PER_ENGINE=$GPUS_PER_ENGINE, got $GPUS" >&2
    exit 2
fi
# Ray would wait for missing GPUs forever.
HERE=$(python -c 'import torch; print(torch.cuda.device_count())')
if ((HERE < GPUS)); then
    echo "single_node.sh: GPUS=$GPUS needs as many on this machine, got $HERE: lower it or change" \
        "CUDA_VISIBLE_DEVICES" >&2
    exit 2
fi

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

    # GPUs: all models are on all of them; a model that does not have its turn frees its memory
    --train.colocate_all
    --actor.num_nodes 1
    --actor.num_gpus_per_node "$GPUS"
    --ref.num_nodes 1
    --ref.num_gpus_per_node "$GPUS"
    --vllm.num_engines "$((GPUS / GPUS_PER_ENGINE))"
    --vllm.tensor_parallel_size "$GPUS_PER_ENGINE"
    --vllm.gpu_memory_utilization 0.6
    --vllm.enable_sleep
    --ds.enable_sleep

    # Generation
    --rollout.batch_size "$PROMPTS_PER_STEP"
    --rollout.n_samples_per_prompt "$SAMPLES_PER_PROMPT"
    --rollout.max_new_tokens "$MAX_NEW_TOKENS"
    --rollout.micro_batch_size "$MICRO_BATCH"
    --algo.advantage.is_correction_level token # vLLM's probabilities differ slightly from the trainer's

    # Training: one update in a step
    --train.batch_size "$SAMPLES"
    --train.micro_batch_size "$MICRO_BATCH"
    --train.num_episodes "$EPISODES"
    --actor.adam.lr 1e-6
    --actor.gradient_checkpointing_enable
    --algo.kl.init_coef 1e-3
    --ds.zero_stage 3
    --ds.packing_samples

    # Output: checkpoints contain the histories
    --ckpt.output_dir "$OUT"
    --ckpt.path "$OUT/checkpoints"
    --ckpt.save_steps "$SAVE_STEPS"
    --ckpt.max_num 3
    --logger.tensorboard_dir "$OUT/tensorboard"
)
if [[ -s $OUT/checkpoints/_actor/latest ]]; then
    FLAGS+=(--ckpt.load_enable)
fi

# Words after the script's name also go to the trainer: `single_node.sh --data.apply_chat_template`.
exec python -m openrlhf_pgrpo.cli.train_ppo_ray "${FLAGS[@]}" "$@"
