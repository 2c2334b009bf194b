"""Hashes of the host's functions that we replace, wrote anew, call or count on, by its version.

They are of the source, so that a change of a body is seen where the signature stays. All functions of the contracts in
`seams.py` are here, under the module that defines them, and some more whose steps or arithmetic ours follow. The
newest version comes first and has all of them; each version after it has those that differ from the one before it in
this list. `tests/host/test_bodies.py` compares them with the installed host.
"""

Hashes = dict[str, dict[str, str]]  # module -> path of a function in it -> hash


BODIES: dict[str, Hashes] = {
    "0.11.2": {
        "openrlhf.cli.train_dpo": {
            "train": "ba4810da5aef",
        },
        "openrlhf.cli.train_ppo_ray": {
            "train": "e4fb14095396",
        },
        "openrlhf.cli.train_rm": {
            "train": "ba51eb256140",
        },
        "openrlhf.datasets.prompts_dataset": {
            "PromptDataset.__getitem__": "8d6bd7794074",
            "PromptDataset.__init__": "a4b3d3271917",
            "PromptDataset.collate_fn": "94f658e19de5",
        },
        "openrlhf.datasets.reward_dataset": {
            "RewardDataset.__getitem__": "5bcdb043f3fa",
            "RewardDataset.__init__": "0d01cac5c3fb",
            "RewardDataset.collate_fn": "e1a725419a85",
            "RewardDataset.process_data": "dda43128ce0a",
        },
        "openrlhf.datasets.utils": {
            "blending_datasets": "3a7604eb8f88",
        },
        "openrlhf.models.loss": {
            "DPOLoss.forward": "62d0ce90a589",
            "PairWiseLoss.forward": "4ddfbb442418",
        },
        "openrlhf.models.model": {
            "_get_reward_model": "b1c2c94d82b1",
            "get_llm_for_sequence_regression": "e5ec1d560371",
        },
        "openrlhf.models.utils": {
            "compute_reward": "548aa0341385",
        },
        "openrlhf.trainer.dpo_trainer": {
            "DPOTrainer.__init__": "802c60d83633",
            "DPOTrainer.concatenated_forward": "32a9d05be5c7",
            "DPOTrainer.evaluate": "e705a48b1428",
            "DPOTrainer.fit": "83db52288c7b",
            "DPOTrainer.save_logs_and_checkpoints": "b20eb0a523c7",
        },
        "openrlhf.trainer.ppo_trainer": {
            "BasePPOTrainer.__init__": "454739bd7ff7",
            "BasePPOTrainer.init_checkpoint_states": "bfecd4414c25",
            "BasePPOTrainer.save_logs_and_checkpoints": "616d0be4a784",
            "BasePPOTrainer.train_step": "06fbbd9f0f5e",
            "PPOTrainer.fit": "d75282d97812",
            "prepare_datasets": "55832fcd023e",
        },
        "openrlhf.trainer.ppo_trainer_async": {
            "GenerateSamplesActor.fit": "2bff666e2fd1",
            "TrainingActor.fit": "cf19b46aa0d5",
        },
        "openrlhf.trainer.ppo_utils.experience_maker": {
            "RemoteExperienceMaker.__init__": "b527974b2776",
            "RemoteExperienceMaker.compute_advantages_and_returns": "1ca04eaeb719",
            "RemoteExperienceMaker.get_cumulative_returns": "efc4ed33b976",
            "RemoteExperienceMaker.make_experience": "a34b51e990de",
            "RemoteExperienceMaker.make_experience_batch": "b5693a55753f",
        },
        "openrlhf.trainer.ppo_utils.length_penalty": {
            "apply_length_penalties": "d5d6d7ff6bbd",
        },
        "openrlhf.trainer.ppo_utils.replay_buffer": {
            "NaiveReplayBuffer.__init__": "ee37108b4b5d",
        },
        "openrlhf.trainer.ppo_utils.samples_generator": {
            "SamplesGenerator._dispatch_prompts_to_vllm": "a5b0d5d17e1a",
            "SamplesGenerator._generate_vllm": "a83606979701",
            "SamplesGenerator._process_response_into_experience": "aa6f20ae54e9",
            "SamplesGenerator.generate_samples": "6d3b87ed46f6",
            "_collect_prompt_batch": "df02f677c380",
        },
        "openrlhf.trainer.ray.launcher": {
            "RayActorGroup.async_run_method": "633d0895d775",
            "RayActorGroup.async_run_method_batch": "7ef91c484441",
        },
        "openrlhf.trainer.ray.ppo_actor": {
            "ActorPPOTrainer._init_vllm_sync_group": "2af981ae42b8",
            "ActorPPOTrainer.broadcast_to_vllm": "a7ed79f664d6",
            "ActorPPOTrainer.ppo_train": "7ae7b7f52336",
        },
        "openrlhf.trainer.ray.vllm_engine": {
            "create_vllm_engines": "af57ea163173",
        },
        "openrlhf.trainer.rm_trainer": {
            "RewardModelTrainer.__init__": "5fc4d247f1c7",
            "RewardModelTrainer.concatenated_forward": "65c38afafbda",
            "RewardModelTrainer.concatenated_inputs": "22a49a1f54ba",
            "RewardModelTrainer.evaluate": "61882b53e367",
            "RewardModelTrainer.fit": "af2031a866f1",
            "RewardModelTrainer.save_logs_and_checkpoints": "b1a66afb0981",
        },
        "openrlhf.utils.agent": {
            "MultiTurnAgentExecutor.__init__": "5aad68560711",
            "MultiTurnAgentExecutor.execute": "222ed1020823",
            "SingleTurnAgentExecutor.__init__": "e2b66a9ca9f0",
            "SingleTurnAgentExecutor._fetch_rewards_via_func": "1a1e2ce28243",
            "SingleTurnAgentExecutor._fetch_rewards_via_http": "5e4b159ffa54",
            "SingleTurnAgentExecutor.execute": "e557741c5553",
        },
        "openrlhf.utils.config": {
            "hierarchize": "b1125e611a02",
        },
        "openrlhf.utils.deepspeed.deepspeed": {
            "DeepspeedStrategy.__init__": "07ffb03e0b05",
            "DeepspeedStrategy._get_model_parameters": "c6c4dad36a87",
            "DeepspeedStrategy._read_ckpt_metric": "605774cce8a1",
            "DeepspeedStrategy.load_ckpt": "e817862bff66",
            "DeepspeedStrategy.moving_average": "a76aee0620b4",
            "DeepspeedStrategy.save_ckpt": "4b6663616894",
            "DeepspeedStrategy.save_model": "14c67be849f9",
            "DeepspeedStrategy.setup_dataloader": "ded8a2194ee2",
            "DeepspeedStrategy.setup_distributed": "fcd16efe9656",
        },
        "openrlhf.utils.deepspeed.deepspeed_utils": {
            "get_train_ds_config": "2e79fbb11ad6",
        },
    },
    "0.11.1": {
        "openrlhf.cli.train_dpo": {
            "train": "63087cbfc4b3",
        },
        "openrlhf.cli.train_ppo_ray": {
            "train": "06e2bb6c06b9",
        },
        "openrlhf.cli.train_rm": {
            "train": "28be4df0cdae",
        },
        "openrlhf.datasets.utils": {
            "blending_datasets": "7de97178b24a",
        },
        "openrlhf.trainer.dpo_trainer": {
            "DPOTrainer.evaluate": "36a1b59235bc",
        },
        "openrlhf.trainer.ppo_trainer": {
            "BasePPOTrainer.save_logs_and_checkpoints": "bbe498c736aa",
        },
        "openrlhf.trainer.ppo_utils.experience_maker": {
            "RemoteExperienceMaker.compute_advantages_and_returns": "af35fd140544",
        },
        "openrlhf.trainer.ppo_utils.samples_generator": {
            "SamplesGenerator._dispatch_prompts_to_vllm": "0a272f8a2e58",
        },
        "openrlhf.trainer.rm_trainer": {
            "RewardModelTrainer.evaluate": "3bedbf1c9451",
        },
        "openrlhf.utils.agent": {
            "SingleTurnAgentExecutor.__init__": "c2dde70c4d28",
            "SingleTurnAgentExecutor._fetch_rewards_via_http": "2aa6df7bfb6f",
        },
    },
    "0.11.0": {
        "openrlhf.trainer.ppo_utils.samples_generator": {
            "SamplesGenerator._generate_vllm": "dd0b98c6694e",
            "SamplesGenerator.generate_samples": "04e51ad9c6f5",
        },
        "openrlhf.utils.agent": {
            "MultiTurnAgentExecutor.execute": "37157f6ed1dc",
            "SingleTurnAgentExecutor._fetch_rewards_via_http": "5fdf44528646",
        },
        "openrlhf.utils.deepspeed.deepspeed": {
            "DeepspeedStrategy.save_model": "cac91fe1ecd4",
        },
    },
}


def of(version: str) -> Hashes:
    """All hashes of a version; of the newest, if it is none of ours."""
    found = {}
    for known, differing in BODIES.items():
        found = {module: found.get(module, {}) | differing.get(module, {}) for module in found | differing}
        if known == version or version not in BODIES:
            break
    return found
