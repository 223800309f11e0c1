"""Which rank fits what, and that a block is fitted alike by one process and by several."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOY
from parallel.processes import done, lbllm, variables
from safetensors.torch import load_file, save_file

from lbllm_cli.format.levels import stored_grid
from lbllm_cli.format.weights import PackedWeight
from lbllm_cli.parallel.group import ALONE, Alone
from lbllm_cli.parallel.shares import share_of
from lbllm_cli.ptq.moments import InputMoments
from lbllm_cli.ptq.teams import Team, counted, gathered_weights, teams_of


class One(Alone):
    """One of several ranks, that takes note of what is summed where."""

    def __init__(self, rank: int, size: int):
        super().__init__()
        self.rank, self.size, self.asked = rank, size, []

    def share(self, rows):
        return share_of(rows, self.rank, self.size)

    def add(self, tensor):
        self.asked.append(("add", tensor))

    def send(self, tensor, rank):
        self.asked.append((f"to {rank}", tensor))


def shapes(*outs: int, width: int = 64) -> dict[tuple[str, ...], list[tuple[int, int]]]:
    return {(f"linear {place}",): [(out, width)] for place, out in enumerate(outs)}


def owners(size: int, *outs: int) -> list[int | None]:
    found = [[team.owner for team in teams_of(shapes(*outs), One(rank, size)).values()] for rank in range(size)]
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.mark.parametrize(
    ("size", "outs", "expected"),
    [
        # Fewer units than ranks: rows of each, where every rank gets 8 of each at least.
        (4, (32,), [None]),
        (4, (512, 32, 300), [None] * 3),
        (4, (31,), [0]),
        (4, (512, 31, 300), [0, 2, 1]),
        # As many, or more: whole ones, the costliest first, each to whom has least.
        (2, (64, 64), [0, 1]),
        (2, (100, 300, 200, 100), [1, 0, 1, 0]),
        (4, (512,) * 5, [0, 1, 2, 3, 0]),
        # One rank has rows of everything: all of them.
        (1, (8, 512), [None, None]),
    ],
)
def test_units_are_divided_or_owned(size, outs, expected):
    assert owners(size, *outs) == expected


def test_a_unit_costs_what_all_its_linears_cost():
    """Three linears that share an input: rows of all, and one factorisation."""
    units = {("q", "k", "v"): [(64, 64), (32, 64), (32, 64)], ("o",): [(64, 64)], ("down",): [(64, 192)], ("gate",): [(64, 64)]}
    teams = teams_of(units, One(0, 2))
    assert [team.owner for team in teams.values()] == [1, 1, 0, 1]


@pytest.mark.parametrize(("size", "rows"), [(2, 64), (4, 130), (3, 100)])
def test_rows_of_a_divided_linear_are_fitted_once(size, rows):
    teams = [teams_of(shapes(rows), One(rank, size))["linear 0",] for rank in range(size)]
    assert [row for team in teams for row in range(rows)[team.rows(rows)]] == list(range(rows))
    assert all(team.fits and team.together is team.ranks for team in teams)


def test_all_rows_of_an_owned_linear_are_fitted_by_its_owner():
    teams = [Team(One(rank, 3), owner=1) for rank in range(3)]
    assert [team.fits for team in teams] == [False, True, False]
    assert range(10)[teams[1].rows(10)] == range(10)
    # Sums over the rows of a linear are there already.
    assert all(team.together is ALONE for team in teams)


@pytest.mark.parametrize(("owner", "asked"), [(None, "add"), (2, "to 2")])
def test_moments_go_where_they_are_needed(owner, asked):
    group = One(0, 3)
    moments = InputMoments.empty(4, torch.device("cpu"), with_drift=True)
    Team(group, owner).pool(moments)
    (first, hessian), (second, drift) = group.asked
    assert (first, second) == (asked, asked)
    assert hessian is moments.hessian
    assert drift is moments.drift
    group.asked.clear()
    Team(group, owner).pool(InputMoments.empty(4, torch.device("cpu"), with_drift=False))
    assert [kind for kind, _ in group.asked] == [asked]


def test_tokens_of_all_ranks_are_counted():
    class Three(Alone):
        def total(self, numbers):
            return [3 * number for number in numbers]

    parts = [InputMoments(torch.zeros(1, 1), None, tokens) for tokens in (5, 0)]
    counted(Three(), parts)
    assert [part.tokens for part in parts] == [15, 0]
    assert all(type(part.tokens) is int for part in parts)


def test_whole_linears_are_put_together_out_of_rows():
    """The first linear is divided between two ranks; the second one is fitted by the other."""
    generator = torch.Generator().manual_seed(0)

    def packed(rows: int, width: int) -> PackedWeight:
        ranks = torch.randint(0, 4, (rows, width), generator=generator, dtype=torch.uint8)
        levels = torch.randn(rows, -(-width // 32), 4, generator=generator).sort(dim=-1).values
        return PackedWeight.of_ranks(ranks, *stored_grid(levels), 32)

    first, second = packed(10, 80), packed(6, 112)
    top, rest = first.split([4, 6])

    class Two(Alone):
        def gathered(self, tensors):
            return [tensors, {**rest.to_tensors("a"), **second.to_tensors("b")}]

    found = gathered_weights(Two(), {"a": top}, {"a": 80, "b": 112})
    for name, wanted in (("a", first), ("b", second)):
        assert torch.equal(found[name].values(), wanted.values())


@pytest.fixture(scope="module")
def one_block(tmp_path_factory) -> Path:
    """The trained toy, up to its first block."""
    folder = tmp_path_factory.mktemp("one") / "toy"
    shutil.copytree(TOY, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers." not in name or ".layers.0." in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.heavy
def test_a_block_has_the_codes_that_one_process_gives_it(one_block, tmp_path):
    """In a pass over all units at once; in sequential order a sum's last bit changes what later units read, and their codes."""
    found = {}
    for size in (1, 2, 4):
        output = tmp_path / str(size)
        keys = ["ptq.sequential=false", "data.calibration={source: 'builtin:calibration/novels', sequences: 8, length: 64}"]
        places = [f"output.dir={output}", f"model.path={one_block}", "runtime.device=cpu"]
        done(variables(size), lbllm, "ptq", "--recipe", str(ROOT / "recipes" / "toy.yaml"), *places, *keys)
        found[size] = load_file(output / "ptq" / "block_000.safetensors")
    codes = [name for name in found[1] if name.endswith(".weight")]
    assert len(codes) == 7
    for size in (2, 4):
        assert found[size].keys() == found[1].keys()
        differ = {name: int((found[size][name] != tensor).sum()) for name, tensor in found[1].items()}
        # Measured 0 of 57,344 bytes of codes.
        assert sum(differ[name] for name in codes) == 0
        # Sums are added up in another order: measured none of two ranks, of four one scale, and one level of a thousand.
        assert all(count <= 0.01 * found[1][name].numel() for name, count in differ.items()), differ
