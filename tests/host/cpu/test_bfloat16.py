"""Products of bfloat16 on a CPU without instructions for them: what they give, what stays PyTorch's, and the gain."""

import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from openrlhf_pgrpo.host.cpu import bfloat16

pytestmark = pytest.mark.host


@pytest.fixture
def replace(monkeypatch):
    """Replaces the products as on a CPU that has the instructions or not, for this test."""
    # Another test of this process may have replaced them. Nothing may hold them, or PyTorch's do not come back.
    were_replaced = bfloat16.speed_up_bfloat16.replaced is not None
    bfloat16.speed_up_bfloat16.replaced = None

    def replace(supported: bool) -> None:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
        bfloat16.speed_up_bfloat16()

    yield replace
    bfloat16.speed_up_bfloat16.replaced = None
    monkeypatch.undo()
    if were_replaced:
        bfloat16.speed_up_bfloat16()


@pytest.fixture
def without_instructions(replace):
    replace(supported=False)


def drawn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("shape", [(40, 24), (3, 40, 24)])
@pytest.mark.parametrize("bias", [None, 16])
def test_a_linear_layer_and_its_gradients_are_those_of_float32_rounded_once(without_instructions, shape, bias):
    inputs = [drawn(*shape), drawn(16, 24)] + ([] if bias is None else [drawn(bias)])
    upstream = drawn(*shape[:-1], 16)
    exact = [one.float().requires_grad_() for one in inputs]
    found = [one.clone().requires_grad_() for one in inputs]
    F.linear(*exact).backward(upstream.float())
    output = F.linear(*found)
    output.backward(upstream)
    torch.testing.assert_close(output, F.linear(*exact).bfloat16(), rtol=0, atol=0)
    for own, its in zip(found[:2], exact):  # of a bias, the gradient is a sum and no product
        torch.testing.assert_close(own.grad, its.grad.bfloat16(), rtol=0, atol=0)


def test_products_of_many_matrices_and_their_factors(without_instructions):
    left, right, added = drawn(5, 12, 20), drawn(5, 20, 9), drawn(5, 12, 9)
    exact = [one.float() for one in (left, right, added)]
    torch.testing.assert_close(left @ right, (exact[0] @ exact[1]).bfloat16(), rtol=0, atol=0)
    found = torch.baddbmm(added, left, right, beta=0.5, alpha=-2)
    torch.testing.assert_close(found, torch.baddbmm(exact[2], *exact[:2], beta=0.5, alpha=-2).bfloat16())
    found = torch.addmm(added[0], left[0], right[0], beta=0.5, alpha=-2)
    torch.testing.assert_close(
        found, torch.addmm(exact[2][0], exact[0][0], exact[1][0], beta=0.5, alpha=-2).bfloat16()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_other_types_keep_their_bits(replace, dtype):
    left, right = ((10 * drawn(50, 30, dtype=torch.float64)).to(dtype) for _ in range(2))
    before = left @ right.T
    replace(supported=False)
    assert torch.equal(left @ right.T, before)


def test_few_rows_keep_theirs(replace):
    """One new token after the other: there float32 would read twice as many bytes."""
    row, weight = drawn(bfloat16.FEW_ROWS - 1, 64), drawn(96, 64)
    before = F.linear(row, weight)
    replace(supported=False)
    assert torch.equal(F.linear(row, weight), before)


def test_a_cpu_that_has_the_instructions_keeps_them(replace):
    replace(supported=True)
    assert bfloat16.speed_up_bfloat16.replaced is None


def test_a_second_call_changes_nothing(without_instructions):
    before = bfloat16.speed_up_bfloat16.replaced
    bfloat16.speed_up_bfloat16()
    assert bfloat16.speed_up_bfloat16.replaced is before


@pytest.mark.skipif(torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has instructions for bfloat16")
def test_it_is_faster(replace):
    left, right = drawn(256, 512), drawn(512, 512)

    def seconds() -> float:
        start = time.thread_time()
        left.T @ left, left @ right
        return time.thread_time() - start

    before = min(seconds() for _ in range(3))
    replace(supported=False)
    assert min(seconds() for _ in range(3)) < before / 2


@pytest.mark.parametrize("module", ["patches", "vllm_worker"])
def test_both_processes_that_multiply_get_it(module):
    """The host's, when they import it, and vLLM's, when it imports the worker that reads weights."""
    code = f"""
import torch
torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: False
from openrlhf_pgrpo.host.cpu import bfloat16, {module}
getattr({module}, "patch_host", lambda host: None)(None)
assert bfloat16.speed_up_bfloat16.replaced
"""
    ended = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
