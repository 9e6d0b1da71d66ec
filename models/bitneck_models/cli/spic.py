"""``bitneck-models import-spic``: a checkpoint of the paper's authors as an operating point."""

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["import_spic"]


def import_spic(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint (.pth.tar) of the authors.", metavar="CHECKPOINT")],
    backbone: Annotated[str, typer.Option(help="resnet50 or deeplabv3_resnet50.")],
    split: Annotated[str, typer.Option(help="s1, s2 or s3; US1 and US2 of the authors are s1 and s2.")],
    step: Annotated[float, typer.Option(help="Quantizer step Q: `qp` in the authors' dict.yaml.")],
    stride: Annotated[int, typer.Option(help="Stride S: `stride_val` in the authors' dict.yaml.")],
    out: Annotated[Path, typer.Option(help="The point's folder.", metavar="POINT_DIR")],
    features: Annotated[
        Path | None,
        typer.Option(help="Features of the split point, .npy or .npz, to fit tables to and to estimate the rate on."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Write encoder.onnx, decoder.onnx and a record of a unit that the paper's authors published."""
    from bitneck_models.spic.checkpoint import load_spic
    from bitneck_models.spic.point import load_features, write_spic_point

    unit = load_spic(checkpoint, backbone=backbone, split=split, step=step, stride=stride)
    record = write_spic_point(
        unit,
        out,
        checkpoint=checkpoint.name,
        features=load_features(features) if features is not None else None,
        features_file=features.name if features is not None else "",
    )
    if as_json:
        print(json.dumps({"out": str(out)} | record.model_dump(mode="json")))  # noqa: T201
        return
    shapes = (record.feature_shape, record.latent_shape, record.output_shape)
    print(f"{out}: {' -> '.join('x'.join(map(str, shape)) for shape in shapes)}, step {record.step:g}")  # noqa: T201
    if not record.true_cut:
        print(f"note: trained on the output of {record.module}, where other tensors cross too: no split point")  # noqa: T201
    if record.estimate is not None:
        e = record.estimate
        trained = "" if record.prior_trained else ", which was never trained and says nothing about the rate"
        print(f"{e.tables_bits:.0f} bits a feature under the tables fitted to these {e.features}")  # noqa: T201
        print(f"{e.estimated_bits:.0f} bits by the checkpoint's own rate estimator{trained}")  # noqa: T201
