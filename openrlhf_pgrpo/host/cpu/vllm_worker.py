"""vLLM's side of the weight sync without a GPU: `patches.send_weights` writes a file, this reads it.

Runs inside vLLM: vLLM mixes this class into its worker (`worker_extension_cls`). Ray's hook does not reach that
process, so this file imports neither Ray, DeepSpeed nor the host.
"""

import logging
import os

from safetensors import safe_open

from openrlhf_pgrpo.host.cpu.bfloat16 import speed_up_bfloat16

speed_up_bfloat16()  # vLLM imports this file before it loads the model, and nothing else of ours


class WeightsFromFile:
    """Replaces openrlhf.trainer.ray.vllm_worker_wrap.WorkerWrap."""

    def update_weight(self, name, dtype, shape, empty_cache=False) -> None:
        """Loads all weights from the safetensors file `name`, which holds `shape` tensors.

        The signature is the host's; `dtype` and `empty_cache` are not used. vLLM has packed its linear layers for the
        CPU and dropped the originals. So the layers are put back to their checkpoint form, loaded and packed again.

        Raises FileNotFoundError if this node does not see the file, ValueError if the file is not the whole model.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        if not os.path.exists(name):
            raise FileNotFoundError(
                f"Without a GPU, vLLM needs to see the weights that the trainer writes, got a file {name} that is not "
                "on this node; let --ckpt.path be a folder that all nodes share."
            )
        # At every sync it warns of layers that have no weights of their own; the check below is stricter.
        logging.getLogger(initialize_layerwise_reload.__module__).setLevel(logging.ERROR)
        model = self.model_runner.get_model()
        expected = {parameter for parameter, _ in model.named_parameters()}
        with safe_open(name, framework="pt") as weights, set_current_vllm_config(self.vllm_config):
            tensors = list(weights.keys())
            if len(tensors) != shape:
                raise ValueError(f"The weight sync needs {shape} tensors, got {len(tensors)}; report this as a bug.")
            initialize_layerwise_reload(model)
            loaded = model.load_weights((tensor, weights.get_tensor(tensor)) for tensor in tensors)
            finalize_layerwise_reload(model, self.model_config)
        missing = sorted(expected - loaded)
        if missing:
            raise ValueError(
                f"The weight sync needs every parameter of vLLM's model, got nothing for {', '.join(missing)}; "
                "use a model whose parameter names vLLM knows."
            )
        repack_heads(model)


def repack_heads(model) -> None:
    """Packs the output layer again. Where it is tied to the embedding, the reload does not renew its packed copy, and
    vLLM would go on sampling from old weights."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)
