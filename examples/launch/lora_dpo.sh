#!/usr/bin/env bash
# DPO with LoRA: a few million parameters are trained beside a frozen policy, of 4 bits if you like, by DeepSpeed's
# launcher, on one node or several.
#
#     POLICY=... PAIRS=pairs.jsonl OUT=run examples/launch/lora_dpo.sh
#     NODES=2 HOSTFILE=hosts POLICY=... PAIRS=... OUT=/shared/run examples/launch/lora_dpo.sh
#
# The same command again resumes from the last checkpoint. OUT ends with the adapters alone; merge them with
# `python -m openrlhf.cli.lora_combiner --model_path POLICY --lora_path OUT --output_path MERGED`.
#
# There is no such script for PPO: the host sends parameters to vLLM under the names they have in training, and with
# adapters those are not the names that vLLM knows.
set -euo pipefail

# --- Where -----------------------------------------------------------------------------------------------------------
NODES=${NODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
HOSTFILE=${HOSTFILE:-}            # several nodes: a line `name slots=8` for each, reached by ssh without a password
MASTER_PORT=${MASTER_PORT:-29500} # another for every run that shares a node
DEVICE=${DEVICE:-gpu}             # or cpu, to try the script without GPUs

# --- What ------------------------------------------------------------------------------------------------------------
POLICY=${POLICY:?the policy: a folder, or a name on the hub}
PAIRS=${PAIRS:?a JSONL file whose rows have prompt, chosen and rejected}
OUT=${OUT:?a folder for checkpoints, logs and adapters, which all nodes see}

# --- How much --------------------------------------------------------------------------------------------------------
RANK=${RANK:-32}                 # of the adapters
LOAD_IN_4BIT=${LOAD_IN_4BIT:-no} # yes: QLoRA, a quarter of the memory for the frozen weights
BATCH=${BATCH:-128}              # pairs an update
MICRO_BATCH=${MICRO_BATCH:-4}    # pairs a GPU takes at once
MAX_LEN=${MAX_LEN:-2048}         # tokens of prompt and answer together
EPOCHS=${EPOCHS:-1}
SAVE_STEPS=${SAVE_STEPS:-50}

AT_ONCE=$((NODES * GPUS_PER_NODE * MICRO_BATCH))
if ((BATCH % AT_ONCE != 0)); then
    echo "lora_dpo.sh: BATCH needs to be a multiple of NODES x GPUS_PER_NODE x MICRO_BATCH = $AT_ONCE, got $BATCH" >&2
    exit 2
fi

LAUNCHER=(
    --num_gpus "$GPUS_PER_NODE"
    --master_port "$MASTER_PORT"
)
if ((NODES > 1)); then
    # DeepSpeed would take the first nodes of the file, as many as there are, and not look at their slots.
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

    # Adapters in all linear layers: what PEFT calls all-linear is the host's default, and would not work as a flag
    --ds.lora.rank "$RANK"
    --ds.lora.alpha "$((2 * RANK))"
    --ds.lora.dropout 0

    # Training; ZeRO-2 is enough, as adapters alone have gradients and moments
    --model.beta 0.1
    --train.batch_size "$BATCH"
    --train.micro_batch_size "$MICRO_BATCH"
    --train.max_epochs "$EPOCHS"
    --adam.lr 1e-4 # adapters start from nothing and bear more than whole policies
    --model.gradient_checkpointing_enable
    --ds.zero_stage 2

    # What stays
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

# Anything after the script's name goes to the trainer as well: `lora_dpo.sh --data.apply_chat_template`.
exec deepspeed "${LAUNCHER[@]}" --module openrlhf_pgrpo.cli.train_dpo "${FLAGS[@]}" "$@"
