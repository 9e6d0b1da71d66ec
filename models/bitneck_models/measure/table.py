"""What `bitneck-models evaluate` prints for people."""

from rich.table import Table

from bitneck_models.measure.evaluation import Evaluation, PointResult
from bitneck_models.measure.map_evaluation import MapEvaluation, MapPointResult

__all__ = ["evaluation_line", "evaluation_table"]


def evaluation_table(result: Evaluation | MapEvaluation) -> Table:
    """One row for each operating point, lowest rate first."""
    maps = isinstance(result, MapEvaluation)
    accuracy = ("mean IoU (95 %)", "pixels") if maps else ("top-1 (95 %)",)
    table = Table(
        "point", "split", *accuracy, "agreement", "bytes (5th, 95th)", "estimated", "bpp", "on the wire",
        *(("map bytes",) if maps else ()),
    )  # fmt: skip
    for p in result.points:
        table.add_row(
            p.id, p.split, *_accuracy(p), f"{p.agreement:.4f}",
            f"{p.payload_bytes_mean:.1f} ({p.payload_bytes_p5:.0f}, {p.payload_bytes_p95:.0f})",
            f"{p.ideal_bytes_mean:.1f}", f"{p.bpp_payload:.4f}", f"{p.bpp_wire:.4f}",
            *((f"{p.map_bytes_mean:.0f}",) if isinstance(p, MapPointResult) else ()),
        )  # fmt: skip
    return table


def _accuracy(point: PointResult | MapPointResult) -> tuple[str, ...]:
    if isinstance(point, MapPointResult):
        low, high = point.mean_iou_interval
        return f"{point.mean_iou:.4f} ({low:.3f} to {high:.3f})", f"{point.pixel_accuracy:.4f}"
    low, high = point.top1_interval
    return (f"{point.top1:.4f} ({low:.3f} to {high:.3f})",)


def evaluation_line(result: Evaluation | MapEvaluation) -> str:
    """The uncompressed network, on one line."""
    if isinstance(result, MapEvaluation):
        return (
            f"uncompressed: mean IoU {result.mean_iou:.4f}, pixels {result.pixel_accuracy:.4f} "
            f"on {result.images} photographs; a class map has {result.map_bytes_mean:.0f} bytes"
        )
    return f"uncompressed: {result.top1:.4f} on {result.images} photographs"
