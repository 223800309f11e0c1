"""Records of keys and values: codes, step and zero, and what comes back."""

import pytest
import torch

from lbllm_cli.act_calib.search import Sample, fit_knees
from lbllm_cli.format.activations import ActivationFormat, uniform_levels
from lbllm_cli.format.names import KEYS
from lbllm_cli.runtime.kv_cache import read_record, record_bytes, write_record
from lbllm_cli.runtime.quantizer import empty_quantizer
from lbllm_cli.training.knees import tables_of


@pytest.mark.parametrize("form", ["knee", "uniform"])
@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.parametrize("width", [16, 24, 80])
def test_records_hold_exactly_what_the_quantizer_gives(form, bits, width):
    quantizer = empty_quantizer(ActivationFormat(4, bits, "group", "knee", form, 2, 64), KEYS, width)
    x = torch.randn(2, 3, 5, width, generator=torch.Generator().manual_seed(bits)) * 7
    if form == "uniform":
        quantizer.act_levels = uniform_levels(bits)
    else:
        tables = tables_of(fit_knees([Sample(x.reshape(-1, width)[:, :16], bits, 2)])[0])
        quantizer.act_levels, quantizer.act_zero = tables.levels, tables.zero
    records = write_record(x, quantizer)
    assert records.dtype == torch.uint8
    assert records.shape == (2, 3, 5, -(-width // quantizer.size) * record_bytes(quantizer))
    assert torch.equal(read_record(records, quantizer, width), quantizer(x))
