#!/usr/bin/env bash
# GR-DPO: preference groups with a higher loss count more, so that the worst one improves. Runs with DeepSpeed's
# launcher, on one node or several.
#
#     POLICY=... PAIRS=pairs.jsonl HELD_OUT=held_out.jsonl OUT=run examples/launch/group_robust_dpo.sh
#     NODES=2 HOSTFILE=hosts POLICY=... PAIRS=... HELD_OUT=... OUT=/shared/run examples/launch/group_robust_dpo.sh
#
# The same command again resumes from the last checkpoint. OUT/checkpoints/best_global_stepN is the best
# checkpoint: the held-out loss of its worst preference group is the lowest.
set -euo pipefail

# --- Where -----------------------------------------------------------------------------------------------------------
NODES=${NODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
HOSTFILE=${HOSTFILE:-}            # for several nodes: a line `name slots=8` for each; ssh needs no password
MASTER_PORT=${MASTER_PORT:-29500} # a different one for every run on the same node
DEVICE=${DEVICE:-gpu}             # or cpu, to try the script without GPUs

# --- What ------------------------------------------------------------------------------------------------------------
POLICY=${POLICY:?the policy: a folder, or a name on the hub}
PAIRS=${PAIRS:?a JSONL file whose rows have prompt, chosen, rejected, and PREF_GROUP_KEY}
HELD_OUT=${HELD_OUT:?a JSONL file like PAIRS, of other prompts, to evaluate on}
OUT=${OUT:?a folder for checkpoints, logs and the policy, visible to all nodes}
PREF_GROUP_KEY=${PREF_GROUP_KEY:-country} # the column that names the preference group of a pair

# --- How much --------------------------------------------------------------------------------------------------------
BATCH=${BATCH:-128}           # pairs in an update
MICRO_BATCH=${MICRO_BATCH:-4} # pairs that a GPU takes at once
MAX_LEN=${MAX_LEN:-2048}      # tokens of prompt and answer together
EPOCHS=${EPOCHS:-1}
EVAL_STEPS=${EVAL_STEPS:-25}
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
        echo "group_robust_dpo.sh: $HOSTFILE needs $NODES nodes of $GPUS_PER_NODE GPUs at its top, got $FIT" >&2
        exit 2
    fi
    LAUNCHER+=(
        --hostfile "$HOSTFILE"
        --num_nodes "$NODES"
    )
fi

FLAGS=(
    # The method; --model.ipo_enable makes it GR-IPO, which needs a small eta; --robust.chi 0 gives importance weights
    --data.pref_group_key "$PREF_GROUP_KEY"
    --robust.eta 0.1
    --robust.weights exact # with several micro batches it needs one more forward pass; `previous` does not
    --robust.save_best
    --pgrpo.device "$DEVICE"

    # Policy and pairs
    --model.model_name_or_path "$POLICY"
    --data.dataset "$PAIRS"
    --data.prompt_key prompt
    --data.chosen_key chosen
    --data.rejected_key rejected
    --data.max_len "$MAX_LEN"

    # Evaluation: loss and accuracy of each preference group, the worst and the gap
    --eval.dataset "$HELD_OUT"
    --eval.split train # the name of the only split of a file
    --eval.steps "$EVAL_STEPS"

    # Training
    --model.beta 0.1
    --train.batch_size "$BATCH"
    --train.micro_batch_size "$MICRO_BATCH"
    --train.max_epochs "$EPOCHS"
    --adam.lr 5e-7
    --model.gradient_checkpointing_enable
    --ds.zero_stage 3

    # Output: checkpoints contain the weights of preference groups
    --ckpt.output_dir "$OUT"
    --ckpt.path "$OUT/checkpoints"
    --ckpt.save_steps "$SAVE_STEPS"
    --ckpt.max_num 3
    --logger.tensorboard_dir "$OUT/tensorboard"
)
if [[ $DEVICE == gpu ]]; then
    FLAGS+=(--ds.packing_samples)
fi
if [[ -s $OUT/checkpoints/latest ]]; then
    FLAGS+=(--ckpt.load_enable)
fi

# Words after the script's name also go to the trainer: `group_robust_dpo.sh --robust.patience 4`.
exec deepspeed "${LAUNCHER[@]}" --module openrlhf_pgrpo.cli.train_dpo "${FLAGS[@]}" "$@"
