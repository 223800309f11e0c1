"""What every command will need, as a table."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lbllm_cli.core.console import GIB
from lbllm_cli.pipeline.forecast import Need
from lbllm_cli.pipeline.world import World

_WIDEST = 10_000


def forecast_table(needs: list[Need], world: World | None = None) -> Table:
    """One row a command, sizes in GiB. world: ranks, default one."""
    several = world is not None and world.several
    table = Table(title=f"forecast, GiB of each of {world}; disk is of all together" if several else "forecast, GiB")
    for column in ("stage", "device", "RAM", "disk", "streams", "streams in"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for need in needs:
        sizes = (f"{value / GIB:.1f}" for value in (need.device, need.ram, need.disk + need.teacher, need.streams))
        table.add_row(need.stage, *sizes, "RAM" if need.place == "ram" else need.place)
    return table


def print_table(out: Console, table: Table) -> None:
    """A table with every value whole: in a narrow terminal its lines wrap, and where it is piped there is no width to keep to."""
    table.width = Measurement.get(out, out.options.update(max_width=_WIDEST), table).maximum
    out.print(table, crop=False)
