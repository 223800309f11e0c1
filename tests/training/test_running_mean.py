"""The running mean of what is trained: its numbers, and that parameters come back."""

import pytest
import torch
from torch import nn

from lbllm_cli.training.kept import by_owner, check_kept, kept_tensors, put_back
from lbllm_cli.training.running_mean import RunningMean


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (4,))]


def test_mean_is_that_of_the_steps_with_less_weight_on_the_start():
    one = nn.Parameter(torch.zeros(1))
    mean, expected = RunningMean([one], 0.9), 0.0
    for step in range(1, 200):
        value = (step * 37) % 11 - 4.0
        with torch.no_grad():
            one.fill_(value)
        mean.add(step)
        left = 0.9 if step > 79 else (1 + step) / (10 + step)
        expected = left * expected + (1 - left) * value
        # Measured: 2e-7 at most.
        assert mean.means[one].item() == pytest.approx(expected, abs=2e-6)


def test_parameters_have_the_mean_for_a_while_and_then_their_own_values_again():
    trained = parameters()
    mean = RunningMean(trained, 0.97)
    before = [parameter.detach().clone() for parameter in trained]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(1)
    mean.add(1)
    own, places = [parameter.detach().clone() for parameter in trained], [parameter.data_ptr() for parameter in trained]
    with mean.shown():
        assert all(torch.allclose(parameter, start + 9 / 11) for parameter, start in zip(trained, before, strict=True))
    assert all(map(torch.equal, own, trained))
    assert places == [parameter.data_ptr() for parameter in trained]


def test_what_is_kept_goes_on_and_is_refused_where_the_mean_is_not_there():
    named = dict(zip(("0.0", "1.0"), parameters(), strict=True))
    optimizer, mean = torch.optim.AdamW(named.values()), RunningMean(named.values(), 0.97)
    with torch.no_grad():
        named["0.0"].mul_(2)
    mean.add(1)
    tensors = {name: tensor.clone() for name, tensor in kept_tensors(named, optimizer, mean, None).items()}
    wanted = {name: tensor.clone() for name, tensor in tensors.items()}
    for parameter in named.values():
        nn.init.zeros_(parameter)
        mean.means[parameter].zero_()
    check_kept(by_owner(tensors), named, {}, averaged=True)
    put_back(by_owner(tensors), named, optimizer, mean)
    found = kept_tensors(named, optimizer, mean, None)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    without = {name: tensor for name, tensor in tensors.items() if name != "1.0/mean"}
    with pytest.raises(ValueError, match=r"1\.0/mean is missing"):
        check_kept(by_owner(without), named, {}, averaged=True)
    with pytest.raises(ValueError, match=r"0\.0/mean is of no training"):
        check_kept(by_owner(tensors), named, {}, averaged=False)
