"""The simulated device refuses what CUDA refuses, and writes down what this project refuses beside it."""

import pytest

MIXED = {
    "a sum": "torch.ones(2, device='cuda') + torch.ones(2)",
    "a number of the CPU in a product": "torch.ones(2, 2, device='cuda') @ torch.ones(2, 2) * torch.tensor(1.0)",
    "in place into the CPU's": "torch.tensor(1.0).add_(torch.tensor(1.0, device='cuda'))",
    "the CPU's values by the device's indices": "torch.ones(4)[torch.tensor([1], device='cuda')]",
    "indices of the CPU in an embedding": "torch.nn.functional.embedding(torch.tensor([1]), torch.ones(4, 2, device='cuda'))",
    "values of the CPU put to indices": "torch.ones(4, device='cuda')[torch.tensor([1, 2])] = torch.ones(2)",
    "gathering by the CPU's indices": "torch.ones(4, device='cuda').gather(0, torch.tensor([1]))",
    "joining": "torch.cat([torch.ones(1), torch.ones(1, device='cuda')])",
    "a number of the CPU among what is joined": "torch.stack([torch.tensor(1.0), torch.tensor(1.0, device='cuda')])",
    "a step of AdamW that is counted on the CPU": (
        "x = torch.ones(2, device='cuda')\n"
        "torch._fused_adamw_([x], [x.clone()], [x.clone()], [x.clone()], [], [torch.tensor(1.0)], lr=0.1, beta1=0.9, beta2=0.9, "
        "weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False)"
    ),
}
TAKEN = {
    "a number of the CPU": "assert (torch.ones(2, device='cuda') * torch.tensor(3.0)).sum() == 6",
    "one to be filled with": "assert torch.ones(2, device='cuda').fill_(torch.tensor(3.0)).sum() == 6",
    "indices of the CPU": "assert torch.arange(4, device='cuda')[torch.tensor([1, 2])].tolist() == [1, 2]",
    "copies": "x = torch.ones(2, device='cuda'); x.copy_(torch.arange(2)); assert x.cpu().tolist() == [0, 1]",
    "where one side is a number": "assert torch.where(torch.ones(2, device='cuda') > 0, torch.tensor(2.0), 0.0).sum() == 4",
}
NOT_PINNED = "a non-blocking copy from memory that is not pinned"
WAITS = "a training step waits for the device: "
LARGE = "more than 64 KiB are copied to the device from memory that is not pinned, in a {}"
# What is done in a step or a pass -> the rule that it breaks.
BREAKING = {
    "x.sum().item()": WAITS + "item",
    "bool((x > 0).all())": WAITS + "item",
    "x.cpu()": WAITS + "a copy to RAM",
    "x.tolist()": WAITS + "a copy to RAM",
    "torch.equal(x, x)": WAITS + "equal",
    "x.nonzero()": WAITS + "a shape that depends on values",
    "x[x > 0]": WAITS + "a shape that depends on values",
    "x[x > 0] = torch.ones(4, device='cuda')": WAITS + "a shape that depends on values",
    "torch.tensor([1.0], device='cuda')": WAITS + "a copy from RAM",
    "x[torch.tensor([1])]": WAITS + "a copy from RAM",
    "torch.cuda.synchronize()": WAITS + "synchronize",
    "torch.ones(4).to('cuda', non_blocking=True)": NOT_PINNED,
    "torch.ones(20_000).to('cuda')": LARGE.format("training step"),
}
# What does not wait.
FREE = (
    "x[x > 0] = 1.0",
    "torch.where(x > 0, x, 0)",
    "torch.ones(20_000).pin_memory().to('cuda', non_blocking=True)",
    "x.to('cpu', non_blocking=True)",
    "torch.empty_like(x).copy_(x)",
    "torch.nn.functional.one_hot(x.long(), 4)",
)


@pytest.mark.parametrize("case", MIXED)
def test_tensors_of_two_devices_are_refused(simulated, case):
    found = simulated.python(MIXED[case])
    assert found.code != 0
    assert "DeviceMismatch" in found.stderr


def test_what_cuda_takes_of_the_cpu_is_taken(simulated):
    found = simulated.python("\n".join(TAKEN.values()))
    assert found.code == 0, found.stderr


def _in_steps(lines, region: str) -> str:
    """Each in a region of its own."""
    each = "".join(f"with device.rules.within({region!r}):\n    {line}\n" for line in lines)
    return f"x = torch.ones(4, device='cuda')\n{each}"


def test_training_steps_do_not_wait(simulated):
    found = simulated.python(_in_steps(BREAKING, "training step"))
    broken = [rule for _, rule, times in found.broken for _ in range(times)]
    expected = list(BREAKING.values())
    # An upload that is refused for what it comes from waits as well.
    assert sorted(set(broken)) == sorted(set(expected)), found.stderr
    for rule in set(expected) - {WAITS + "a copy from RAM"}:
        assert broken.count(rule) == expected.count(rule), rule


def test_outside_of_them_the_same_is_free(simulated):
    found = simulated.python(_in_steps([line for line in BREAKING if BREAKING[line] != NOT_PINNED], "elsewhere"))
    assert (found.code, found.broken) == (0, []), found.stderr


def test_what_does_not_wait_breaks_nothing(simulated):
    found = simulated.python(_in_steps(FREE, "training step"))
    assert (found.code, found.broken) == (0, []), found.stderr


def test_passes_take_large_tensors_out_of_pinned_memory(simulated):
    lines = ["torch.ones(20_000).to('cuda')", "torch.ones(9).to('cuda')", "x.sum().item()"]
    found = simulated.python(_in_steps(lines, "pass of hidden states"))
    assert [rule for _, rule, _ in found.broken] == [LARGE.format("pass of hidden states")]


def test_threads_of_a_pool_may_wait_in_a_step(simulated):
    text = """
from concurrent.futures import ThreadPoolExecutor
x = torch.ones(4, device='cuda')
with device.rules.within('training step'), ThreadPoolExecutor(1) as pool:
    assert pool.submit(x.tolist).result() == [1, 1, 1, 1]
"""
    found = simulated.python(text)
    assert (found.code, found.broken) == (0, []), found.stderr
