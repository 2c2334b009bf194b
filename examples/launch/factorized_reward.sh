#!/usr/bin/env bash
# A reward for every user: train the factorized model, serve it, use it in PPO.
#
#     MODEL=... PAIRS=pairs.jsonl HELD_OUT=held_out.jsonl RM=/shared/rm examples/launch/factorized_reward.sh train
#     RM=/shared/rm examples/launch/factorized_reward.sh serve
#     RAY_JOBS=http://head:8265 RM=/shared/rm POLICY=... PROMPTS=... OUT=/shared/run \
#         examples/launch/factorized_reward.sh use
#
# `use` needs no server: the reward model runs on the GPUs of the policy. REWARD_URL=http://HOST:5000/get_reward makes
# it ask a server that `serve` started. The same command again resumes from the last checkpoint.
set -euo pipefail

# --- Where -----------------------------------------------------------------------------------------------------------
NODES=${NODES:-1}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
HOSTFILE=${HOSTFILE:-}            # to train on several nodes: a line `name slots=8` for each
MASTER_PORT=${MASTER_PORT:-29500} # a different one for every run on the same node
PORT=${PORT:-5000}                # serve; it takes all visible GPUs and needs one: CUDA_VISIBLE_DEVICES=0
DEVICE=${DEVICE:-gpu}             # or cpu, to try `train` and `serve` without GPUs

# --- What ------------------------------------------------------------------------------------------------------------
RM=${RM:?the folder of the reward model: train writes it, serve and use read it}

# --- How much --------------------------------------------------------------------------------------------------------
FACTORS=${FACTORS:-6}         # base rewards; a curve of openrlhf-pgrpo factorize shows how many are useful
BATCH=${BATCH:-128}           # train: pairs an update
MICRO_BATCH=${MICRO_BATCH:-4} # pairs or samples that a GPU takes at once
PROMPTS_PER_STEP=${PROMPTS_PER_STEP:-128}
SAMPLES_PER_PROMPT=${SAMPLES_PER_PROMPT:-8}
MAX_LEN=${MAX_LEN:-2048} # tokens of prompt and answer together
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-1024}
EPOCHS=${EPOCHS:-1} # over the pairs, or the prompts
SAVE_STEPS=${SAVE_STEPS:-20}

# Base rewards need one text in a row, so samples are never packed here.
train() {
    : "${MODEL:?the model whose backbone is trained: a folder, or a name on the hub}"
    : "${PAIRS:?a JSONL file whose rows have user, prompt, chosen and rejected}"
    : "${HELD_OUT:?a JSONL file like PAIRS, of the same users, to evaluate on}"
    local fit
    local launcher=(
        --num_gpus "$GPUS_PER_NODE"
        --master_port "$MASTER_PORT"
    )
    if ((NODES > 1)); then
        # DeepSpeed takes the first nodes of the file, even if they are too few or have too few slots.
        : "${HOSTFILE:?a file of $NODES lines, NAME slots=$GPUS_PER_NODE}"
        fit=$(awk -v nodes="$NODES" -v gpus="$GPUS_PER_NODE" \
            '!/^#/ && NF && n++ < nodes && substr($2, 7) + 0 >= gpus {fit++} END {print fit + 0}' "$HOSTFILE")
        if ((fit < NODES)); then
            echo "factorized_reward.sh: $HOSTFILE needs $NODES nodes of $GPUS_PER_NODE GPUs at its top, got $fit" >&2
            exit 2
        fi
        launcher+=(
            --hostfile "$HOSTFILE"
            --num_nodes "$NODES"
        )
    fi
    local flags=(
        # The method
        --reward.factors "$FACTORS"
        --reward.pooling last
        --data.user_key user
        --pgrpo.device "$DEVICE"

        # Model and pairs
        --model.model_name_or_path "$MODEL"
        --data.dataset "$PAIRS"
        --data.prompt_key prompt
        --data.chosen_key chosen
        --data.rejected_key rejected
        --data.max_len "$MAX_LEN"

        # Evaluation; without --eval.dataset the host evaluates on a hundredth of the training pairs
        --eval.dataset "$HELD_OUT"
        --eval.split train # the name of the only split of a file

        # Training; a user's coefficients are in few steps, so they learn faster
        --train.batch_size "$BATCH"
        --train.micro_batch_size "$MICRO_BATCH"
        --train.max_epochs "$EPOCHS"
        --adam.lr 1e-5
        --reward.coefficients_lr 0.01
        --model.gradient_checkpointing_enable
        --ds.zero_stage 3

        # Output
        --ckpt.output_dir "$RM"
        --ckpt.path "$RM/checkpoints"
        --ckpt.save_steps "$SAVE_STEPS"
        --ckpt.max_num 3
        --logger.tensorboard_dir "$RM/tensorboard"
    )
    if [[ -s $RM/checkpoints/latest ]]; then
        flags+=(--ckpt.load_enable)
    fi
    exec deepspeed "${launcher[@]}" --module openrlhf_pgrpo.cli.train_rm "${flags[@]}" "$@"
}

# The label of a query is its user. --reward.profiles FOLDER adds new users, here and in `use`.
serve() {
    local flags=(
        --reward.model_name_or_path "$RM"
        --batch_size "$MICRO_BATCH"
        --host 0.0.0.0 # everybody who reaches this port gets answers
        --port "$PORT"
        --pgrpo.device "$DEVICE"
    )
    exec python -m openrlhf_pgrpo.cli.serve_rm "${flags[@]}" "$@"
}

# `openrlhf-pgrpo groups --model RM --data PROMPTS --user_key user` makes preference groups of users.
use() {
    : "${RAY_JOBS:?the job server of the cluster, http://HEAD:8265}"
    : "${POLICY:?the policy: a folder, or a name on the hub}"
    : "${PROMPTS:?a JSONL file whose rows have prompt, user and pref_group}"
    : "${OUT:?a folder on a shared file system}"
    local samples=$((PROMPTS_PER_STEP * SAMPLES_PER_PROMPT)) name
    # The job runs in one of Ray's folders, so names of files here become full paths.
    for name in RM POLICY PROMPTS OUT; do
        if [[ -e ${!name} || $name == OUT ]]; then
            printf -v "$name" %s "$(realpath -m "${!name}")"
        fi
    done
    local flags=(
        # The method
        --advantage_estimator pgrpo
        --data.pref_group_key pref_group
        --data.user_key user
        --pgrpo.device gpu

        # Policy and prompts
        --actor.model_name_or_path "$POLICY"
        --data.prompt_dataset "$PROMPTS"
        --data.input_key prompt
        --data.max_len "$MAX_LEN"

        # GPUs: all models are on all of them; a model that does not have its turn frees its memory
        --train.colocate_all
        --actor.num_nodes "$NODES"
        --actor.num_gpus_per_node "$GPUS_PER_NODE"
        --ref.num_nodes "$NODES"
        --ref.num_gpus_per_node "$GPUS_PER_NODE"
        --vllm.num_engines "$((NODES * GPUS_PER_NODE))"
        --vllm.tensor_parallel_size 1
        --vllm.gpu_memory_utilization 0.5
        --vllm.enable_sleep
        --ds.enable_sleep

        # Generation
        --rollout.batch_size "$PROMPTS_PER_STEP"
        --rollout.n_samples_per_prompt "$SAMPLES_PER_PROMPT"
        --rollout.max_new_tokens "$MAX_NEW_TOKENS"
        --rollout.micro_batch_size "$MICRO_BATCH"
        --algo.advantage.is_correction_level token # vLLM's probabilities differ slightly from the trainer's

        # Training: one update in a step
        --train.batch_size "$samples"
        --train.micro_batch_size "$MICRO_BATCH"
        --train.num_episodes "$EPOCHS"
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
    if [[ -n ${REWARD_URL:-} ]]; then
        flags+=(
            --reward.remote_url "$REWARD_URL"
            --data.label_key user
        )
    else
        flags+=(
            --reward.model_name_or_path "$RM"
            --reward.num_nodes "$NODES"
            --reward.num_gpus_per_node "$GPUS_PER_NODE"
        )
    fi
    if [[ -s $OUT/checkpoints/_actor/latest ]]; then
        flags+=(--ckpt.load_enable)
    fi
    exec ray job submit --address "$RAY_JOBS" -- python -m openrlhf_pgrpo.cli.train_ppo_ray "${flags[@]}" "$@"
}

# Words after the name of the use also go to the trainer or the server.
case ${1:-} in
train | serve | use) "$@" ;;
*) echo "factorized_reward.sh: needs train, serve or use, got '${1:-}'" >&2 && exit 2 ;;
esac
