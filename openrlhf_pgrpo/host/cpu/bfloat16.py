"""Matrix products of bfloat16 on a CPU that has no instructions for them.

The host trains in bfloat16. Without AVX-512 (or Arm's bf16) PyTorch multiplies such matrices one element after the
other: a training step of SmolLM2-135M took ten times as long as with the products here. They are taken in float32
and rounded once, which is what the instructions do where a CPU has them.

Runs in every process that imports the host, and inside vLLM, so it imports PyTorch when called.
"""

import warnings

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
FEW_ROWS = 12  # below, reading the weights takes the time, and in float32 they are twice as large


def speed_up_bfloat16() -> None:
    """Replaces PyTorch's products on the CPU for bfloat16, if they are slow here. A second call changes nothing.

    All linear layers, attention in eager mode, and their gradients end in these four operators, whoever calls them:
    transformers, DeepSpeed's own linear layer under ZeRO-3, or vLLM. Other types keep PyTorch's kernels.
    Remove once PyTorch has a kernel for such CPUs.
    """
    import torch

    if speed_up_bfloat16.replaced or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that something is replaced
        for name in PRODUCTS:
            library.impl(name, _in_float32(torch.library.get_kernel(f"aten::{name}", "CPU")), "CPU", with_keyset=True)
    speed_up_bfloat16.replaced = library


speed_up_bfloat16.replaced = None  # PyTorch's kernels come back when this is let go


def _in_float32(kernel):
    import torch

    def product(keys, *operands, **factors):
        left, right = operands[-2:]
        slow = left.dtype is right.dtype is torch.bfloat16
        if not slow or min(*left.shape[-2:], right.shape[-1]) < FEW_ROWS:
            return kernel.call_boxed(keys, *operands, **factors)
        return kernel.call_boxed(keys, *(operand.float() for operand in operands), **factors).bfloat16()

    return product
