"""Tensors of the simulated device behave as tensors of a device do, and what is done with them is counted."""


def run(simulated, text: str):
    found = simulated.python(text)
    assert found.code == 0, found.stderr
    return found


def test_tensors_are_made_on_every_thread(simulated):
    text = """
from torch.autograd import Function

class Twice(Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.full((3,), 2.0, device='cuda') + torch.tensor([0.0, 1.0, 2.0], device='cuda')

x = torch.ones(3, device='cuda', requires_grad=True)
Twice.apply(x).sum().backward()
assert x.grad.is_cuda and x.grad.tolist() == [2, 3, 4]
"""
    run(simulated, text)


def test_a_module_moves_and_keeps_its_parameters(simulated):
    text = """
import copy
linear = torch.nn.Linear(4, 3)
weight, values = linear.weight, linear.weight.detach().clone()
linear.to('cuda')
assert linear.weight is weight and weight.is_cuda and isinstance(weight, torch.nn.Parameter)
assert torch.equal(weight.detach().cpu(), values)
twin = copy.deepcopy(linear)
assert twin.weight is not weight and isinstance(twin.weight, torch.nn.Parameter) and twin.weight.is_cuda
optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1, fused=True)
linear(torch.ones(2, 4, device='cuda')).sum().backward()
optimizer.step()
assert not torch.equal(weight.detach().cpu(), values) and torch.equal(twin.weight.detach().cpu(), values)
"""
    run(simulated, text)


def test_a_product_is_counted(simulated):
    text = """
a, b = torch.ones(8, 16, device='cuda'), torch.ones(16, 32, device='cuda')
device.counting = True
with device.accounts.within('counted'):
    c = a @ b
    view = c.T[1:]
    small = c.bfloat16()
row = device.accounts.phases()['counted']
assert row.kernels == 2, row
assert row.flops == {'fp32': 2 * 8 * 16 * 32}, row
assert row.read == 4 * (8 * 16 + 16 * 32) + 4 * 8 * 32, row
assert row.written == 4 * 8 * 32 + 2 * 8 * 32, row
assert row.syncs == {}, row
"""
    run(simulated, text)


def test_memory_is_what_is_alive(simulated):
    text = """
before = torch.cuda.memory_allocated()
x = torch.empty(1000, device='cuda')
view = x[10:]
assert torch.cuda.memory_allocated() - before == 4096
del x
assert torch.cuda.memory_allocated() - before == 4096
del view
assert torch.cuda.memory_allocated() == before
assert torch.cuda.max_memory_allocated() >= before + 4096
pool = torch.cuda.memory_reserved()
assert pool >= before + 4096
assert torch.cuda.mem_get_info() == (80_000_000_000 - pool, 80_000_000_000)
from lbllm_cli.runtime.backend import backend_of
assert backend_of(torch.device('cuda')).free_memory(torch.device('cuda')) == 80_000_000_000 - before
torch.cuda.empty_cache()
assert torch.cuda.mem_get_info() == (80_000_000_000 - before, 80_000_000_000)
"""
    run(simulated, text)


def test_large_tensors_have_no_values(simulated):
    """2^34 elements, multiplied: a norm is 1, a flag says that all is well, and an operator of the package is one kernel."""
    text = """
import lbllm_cli.runtime.cuda.head
device.shape = device.counting = True
x = torch.randn(1 << 17, 1 << 17, dtype=torch.bfloat16, device='cuda')
with device.accounts.within('counted'):
    y = x @ x
assert device.accounts.phases()['counted'].flops == {'bf16': 2.0 * 2**51}
assert y.shape == x.shape and torch.cuda.memory_allocated() >= 2 * 2 * 2**34
norm = y.float().norm()
assert norm.item() == 1 and bool(torch.isfinite(y).all()) and not bool(y.isnan().any())
assert torch.arange(5, device='cuda').sum().item() == 10
shapes = ((32000, 4096), (1, 4096))
weight, hidden = (torch.empty(shape, dtype=torch.bfloat16, device='cuda') for shape in shapes)
logits = torch.empty(1, 32000, device='cuda')
with device.accounts.within('head'):
    torch.ops.lbllm.head_logits(weight, hidden, logits)
row = device.accounts.phases()['head']
assert (row.kernels, row.flops) == (1, {'bf16': 2.0 * 32000 * 4096}), row
assert row.read == 2 * 4096 * 32001 and row.written == 4 * 32000, row
"""
    run(simulated, text)


def test_an_operator_of_the_package_computes_on_the_inside(simulated):
    text = """
from lbllm_cli.runtime.cuda.operators import operator

@operator("twice_for_a_test(Tensor x, Tensor(a!) out)")
def twice(x, out):
    assert x.device.type == out.device.type == 'cpu'
    out.copy_(2 * x)

x, out = torch.arange(3.0, device='cuda'), torch.empty(3, device='cuda')
device.counting = True
with device.accounts.within('counted'):
    twice(x, out)
assert out.tolist() == [0, 2, 4]
row = device.accounts.phases()['counted']
assert (row.kernels, row.read, row.written) == (1, 12, 12), row
"""
    assert "lbllm.twice_for_a_test" in run(simulated, text).operators


def test_going_on_needs_no_more_memory_than_the_steps(simulated):
    """Parameters and their mean are on the device already; whole, what was kept of them would lie beside them."""
    text = """
from lbllm_cli.runtime.backend import in_ram
from lbllm_cli.training.kept import by_owner, kept_tensors, put_back
from lbllm_cli.training.running_mean import RunningMean
parameters = {str(i): torch.nn.Parameter(torch.ones(1000, device='cuda')) for i in range(8)}
optimizer = torch.optim.AdamW(parameters.values(), fused=True)
mean = RunningMean(list(parameters.values()), 0.9)
sum(p.sum() for p in parameters.values()).backward()
optimizer.step()
optimizer.zero_grad(set_to_none=True)
kept = in_ram(kept_tensors(parameters, optimizer, mean, None))
held = torch.cuda.memory_allocated()
optimizer.state.clear()
torch.cuda.reset_peak_memory_stats()
put_back(by_owner(kept), parameters, optimizer, mean)
assert torch.cuda.memory_allocated() == held
# One tensor at a time is on its way.
assert torch.cuda.max_memory_allocated() <= held + 2 * 4096, torch.cuda.max_memory_allocated() - held
assert torch.equal(optimizer.state[parameters['3']]['exp_avg'].cpu(), kept['3/exp_avg'])
"""
    run(simulated, text)
