"""`openrlhf_pgrpo.cli.train_dpo` in float32, which the host's command line does not offer.

bf16 would round away what the tests of independence check: it adds gradients of micro batches and of ranks.
"""

import torch
import wrapt

from openrlhf_pgrpo.host import doors


@wrapt.when_imported("openrlhf.utils.utils")
def models_in_float32(module):
    module.convert_to_torch_dtype = lambda name: torch.float32


@wrapt.when_imported("openrlhf.utils.deepspeed.deepspeed_utils")
def engines_in_float32(module):
    def in_float32(get_config, _, args, kwargs):
        return {**get_config(*args, **kwargs), "bf16": {"enabled": False}}

    wrapt.wrap_function_wrapper(module, "get_train_ds_config", in_float32)
    wrapt.wrap_function_wrapper(module, "get_eval_ds_config", in_float32)


if __name__ == "__main__":
    doors.DPO.run()
