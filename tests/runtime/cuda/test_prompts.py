"""Records of many tokens, against `format.kv_record.write_record`."""

import pytest
import torch

from lbllm_cli.format import kv_record
from lbllm_cli.format.activations import Tables, uniform_levels
from lbllm_cli.runtime.cuda.prompts import write_records
from lbllm_cli.runtime.cuda.records import RecordTables
from lbllm_cli.training.knees import Shape, tables_of

KNEES = tables_of([Shape(3, 4, 4, 4, 5, 6), Shape(5, 6, 2, 2, 3, 3)])
UNIFORM = Tables(uniform_levels(4), None, torch.tensor([[0.9, 1.0]]))


@pytest.mark.parametrize("tables", [KNEES, UNIFORM], ids=["knee", "uniform"])
@pytest.mark.parametrize(("width", "size"), [(32, 32), (48, 32), (20, 20)])
def test_records_are_those_of_the_format(device, tables, width, size):
    x = torch.randn(2, 3, 7, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = kv_record.write_record(x, tables, size)
    moved = Tables(*(None if part is None else part.to(device) for part in tables))
    found = write_records(x.to(device), RecordTables.of(moved, size)).cpu()
    assert found.shape == expected.shape
    # A step at the edge of its last bit, or two candidates alike to the rounding of a sum, may go the other way.
    assert (found != expected).float().mean() <= 0.002  # measured 0
