"""What ``bitneck-models evaluate`` prints for people."""

from rich.table import Table

from bitneck.text_tables import make_table
from bitneck_models.measure.evaluate import Evaluation

__all__ = ["evaluation_line", "evaluation_table"]


def evaluation_table(result: Evaluation) -> Table:
    """One row for each operating point, lowest rate first."""
    table = make_table(
        "point", "split", *result.metric.columns, "agreement", "bytes (5th, 95th)", "estimated", "bpp", "on the wire",
        text=("point", "split"),
    )  # fmt: skip
    for p in result.points:
        rate = p.rate
        table.add_row(
            p.id, p.split, *result.metric.cells(p.fields), f"{p.agreement:.4f}",
            f"{rate.payload_bytes_mean:.1f} ({rate.payload_bytes_p5:.0f}, {rate.payload_bytes_p95:.0f})",
            f"{rate.ideal_bytes_mean:.1f}", f"{rate.bpp_payload:.4f}", f"{rate.bpp_wire:.4f}",
        )  # fmt: skip
    return table


def evaluation_line(result: Evaluation) -> str:
    """The uncompressed network, on one line."""
    return result.metric.summary(result.accuracy, result.details, result.images)
