"""What the library is told of a quantizer, against the format's own."""

import pytest
import torch

from lbllm_cli.engine.abi import nearest_codes, record_bytes
from lbllm_cli.format import kv_record
from lbllm_cli.format.activations import Tables, snap_table, uniform_levels


@pytest.mark.parametrize("seed", range(20))
def test_nearest_codes_are_those_of_the_format(seed):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randperm(128, generator=generator)[:16].sort().values
    levels = (levels - levels[0]).to(torch.uint8)
    assert nearest_codes(levels.tolist()) == snap_table(levels).tolist()


@pytest.mark.parametrize("size", [16, 20, 64, 100])
def test_records_have_the_bytes_of_the_format(size):
    tables = Tables(uniform_levels(4), None, torch.ones(1, 2))
    for width in (16, 20, 64, 128):
        assert record_bytes(width, size) == -(-width // size) * kv_record.record_bytes(tables, size)
