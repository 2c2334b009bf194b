#!/usr/bin/env bash
# DPO with LoRA: trains a few million parameters next to a frozen policy, which may have 4 bits. Runs with DeepSpeed's
# launcher, on one node or several.
#
#     POLICY=... PAIRS=pairs.jsonl OUT=run examples/launch/lora_dpo.sh
#     NODES=2 HOSTFILE=hosts POLICY=... PAIRS=... OUT=/shared/run examples/launch/lora_dpo.sh
#
# The same command again resumes from the last checkpoint. OUT gets the adapters alone; merge them with
# `python -m openrlhf.cli.lora_combiner --model_path POLICY --lora_path OUT --output_path MERGED`.
#
# There is no such script for PPO: the host sends parameters to vLLM under their names in training, and vLLM does not
# know the names of adapters.
set -euo pipefail

# --- Where -----------------------------------------------------------------------------------------------------------
NODES=${NODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
HOSTFILE=${HOSTFILE:-}            # for several nodes: a line `name slots=8` for each; ssh needs no password
MASTER_PORT=${MASTER_PORT:-29500} # a different one for every run on the same node
DEVICE=${DEVICE:-gpu}             # or cpu, to try the script without GPUs

# --- What ------------------------------------------------------------------------------------------------------------
POLICY=${POLICY:?the policy: a folder, or a name on the hub}
PAIRS=${PAIRS:?a JSONL file whose rows have prompt, chosen and rejected}
OUT=${OUT:?a folder for checkpoints, logs and adapters, visible to all nodes}

# --- How much --------------------------------------------------------------------------------------------------------
RANK=${RANK:-32}                 # of the adapters
LOAD_IN_4BIT=${LOAD_IN_4BIT:-no} # yes: QLoRA, which needs a quarter of the memory for the frozen weights
BATCH=${BATCH:-128}              # pairs in an update
MICRO_BATCH=${MICRO_BATCH:-4}    # pairs that a GPU takes at once
MAX_LEN=${MAX_LEN:-2048}         # tokens of prompt and answer together
EPOCHS=${EPOCHS:-1}
SAVE_STEPS=${SAVE_STEPS:-50}

LAUNCHER=(
    --num_gpus "$GPUS_PER_NODE"
    --master_port "$MASTER_PORT"
)
if ((NODES > 1)); then
    # DeepSpeed takes the first nodes of the file, even if they are too few or have too few slots.
    : "${HOSTFILE:?a file of $NODES lines, NAME slots=$GPUS_PER_NODE}"
    FIT=$(awk -v nodes="$NODES" -v gpus="$GPUS_PER_NODE" \
        '!/^#/ && NF && n++ < nodes && substr($2, 7) + 0 >= gpus {fit++} END {print fit + 0}' "$HOSTFILE")
    if ((FIT < NODES)); then
        echo "lora_dpo.sh: $HOSTFILE needs $NODES nodes of $GPUS_PER_NODE GPUs at its top, got $FIT" >&2
        exit 2
    fi
    LAUNCHER+=(
        --hostfile "$HOSTFILE"
        --num_nodes "$NODES"
    )
fi

FLAGS=(
    --pgrpo.device "$DEVICE"

    # Policy and pairs; a second copy of the policy is the reference
    --model.model_name_or_path "$POLICY"
    --data.dataset "$PAIRS"
    --data.prompt_key prompt
    --data.chosen_key chosen
    --data.rejected_key rejected
    --data.max_len "$MAX_LEN"

    # Adapters are in all linear layers: PEFT's all-linear is the host's default, and would not work as a flag
    --ds.lora.rank "$RANK"
    --ds.lora.alpha "$((2 * RANK))"
    --ds.lora.dropout 0

    # Training; ZeRO-2 is enough, because only adapters have gradients and moments
    --model.beta 0.1
    --train.batch_size "$BATCH"
    --train.micro_batch_size "$MICRO_BATCH"
    --train.max_epochs "$EPOCHS"
    --adam.lr 1e-4 # adapters start from zero and tolerate a higher rate than whole policies
    --model.gradient_checkpointing_enable
    --ds.zero_stage 2

    # Output
    --ckpt.output_dir "$OUT"
    --ckpt.path "$OUT/checkpoints"
    --ckpt.save_steps "$SAVE_STEPS"
    --ckpt.max_num 3
    --logger.tensorboard_dir "$OUT/tensorboard"
)
if [[ $DEVICE == gpu ]]; then
    FLAGS+=(--ds.packing_samples)
fi
if [[ $LOAD_IN_4BIT == yes ]]; then
    FLAGS+=(--ds.load_in_4bit)
fi
if [[ -s $OUT/checkpoints/latest ]]; then
    FLAGS+=(--ckpt.load_enable)
fi

# Words after the script's name also go to the trainer: `lora_dpo.sh --data.apply_chat_template`.
exec deepspeed "${LAUNCHER[@]}" --module openrlhf_pgrpo.cli.train_dpo "${FLAGS[@]}" "$@"
