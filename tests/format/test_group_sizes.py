"""Which linears have groups of their own size."""

import pytest

from lbllm_cli.format.group_sizes import GroupSizes

UNITS = (("self_attn.q_proj", "self_attn.k_proj"), ("self_attn.o_proj",), ("mlp.down_proj",))
EXPERTS = (("mlp.experts.0.up_proj",), ("mlp.experts.1.up_proj",))


def test_without_patterns_all_are_alike():
    sizes = GroupSizes.matching(16, {}, 3, UNITS)
    assert sizes == GroupSizes(16)
    assert sizes.of(2, "mlp.down_proj") == sizes.of_unit(0, UNITS[0]) == 16
    assert sizes.as_dict() == {}
    assert str(sizes) == "16"


def test_patterns_name_linears_of_blocks():
    wanted = {"layers.[01].self_attn.*": 32, "layers.*.mlp.down_proj": 48, "layers.2.mlp.*": 16}
    sizes = GroupSizes.matching(16, wanted, 3, UNITS)
    assert dict(sizes.others) == {
        "layers.0.self_attn.q_proj": 32,
        "layers.0.self_attn.k_proj": 32,
        "layers.0.self_attn.o_proj": 32,
        "layers.0.mlp.down_proj": 48,
        "layers.1.self_attn.q_proj": 32,
        "layers.1.self_attn.k_proj": 32,
        "layers.1.self_attn.o_proj": 32,
        "layers.1.mlp.down_proj": 48,
    }
    # The smallest counts, whatever is said first.
    assert GroupSizes.matching(16, dict(reversed(wanted.items())), 3, UNITS).others == sizes.others
    assert sizes.as_dict() == {"group_sizes": dict(sizes.others)}
    assert sizes.of(2, "mlp.down_proj") == 16
    assert str(sizes) == "16, of some linears 32 and 48"


def test_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match=r"layers\.3\.\* matches no linear; they are called layers\.0\.self_attn\.q_proj to"):
        GroupSizes.matching(16, {"layers.3.*": 32}, 3, UNITS)


def test_a_pattern_that_decides_nothing():
    # Of one linear it counts.
    GroupSizes.matching(16, {"layers.*": 64, "layers.1.*": 32}, 2, UNITS)
    with pytest.raises(ValueError, match=r"layers\.1\.\*: 64 changes nothing: of patterns that match a linear the smallest"):
        GroupSizes.matching(16, {"layers.*": 32, "layers.1.*": 64}, 2, UNITS)


@pytest.mark.parametrize(
    ("units", "pattern", "two"),
    [(UNITS, "layers.1.self_attn.q_proj", "q_proj has groups of 32, layers.1.self_attn.k_proj of 16"),
     (EXPERTS, "layers.1.mlp.experts.1.*", "experts.0.up_proj has groups of 16, layers.1.mlp.experts.1.up_proj of 32")],
)  # fmt: skip
def test_linears_that_read_one_input_have_one_size(units, pattern, two):
    with pytest.raises(ValueError, match=f"{two}; they read one input"):
        GroupSizes.matching(16, {pattern: 32}, 2, units)
