"""The JSON documents of the control API, and how they are made from sessions and models."""

from pydantic import BaseModel, Field

from bitneck.wire.messages import Device
from bitneck_cloud.engine.outputs import output_tensors
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.fleet.tables import policy_dict
from bitneck_cloud.sessions.session import Session

__all__ = [
    "DeviceInfo",
    "ModelInfo",
    "ModelMetadata",
    "PointInfo",
    "RateAnswer",
    "ReloadAnswer",
    "SessionInfo",
    "TensorInfo",
    "model_info",
    "model_metadata",
    "session_info",
]


class RateAnswer(BaseModel):
    """The rate that was set."""

    policy: dict[str, str | float | bool]
    point: str | None = Field(description="the chosen operating point; null if the client chooses")
    pushed: bool = Field(description="whether a connected client was told at once")


class PointInfo(BaseModel):
    """An operating point, as measured."""

    id: str
    unit: str = Field(description="points of one unit differ in step only")
    split: str
    stride: int
    channels: int
    step: float
    latent_shape: tuple[int, int, int]
    payload_bytes: float
    bpp_payload: float
    accuracy: float
    agreement: float
    dataset: str
    images: int


class TensorInfo(BaseModel):
    """A tensor, as the Open Inference Protocol describes one."""

    name: str
    datatype: str
    shape: list[int]


class ModelInfo(BaseModel):
    """A served model; its ladder is in order of rate."""

    name: str
    bundle_id: str
    task: str
    backbone: str
    input_height: int = Field(description="pixels")
    input_width: int
    classes: int
    outputs: list[TensorInfo] = Field(description="of an answer")
    uncompressed_accuracy: float = Field(description="top-1, or mean IoU for segmentation")
    problem: str = Field(
        description="what is wrong with the bundle's folder, which a restart and a reload need; empty if nothing is"
    )
    points: list[PointInfo]


class ReloadAnswer(BaseModel):
    """What a reload changed."""

    bundle_id: str
    changed: bool = Field(description="false if the folder has the bundle that is served already")
    added: list[str] = Field(description="operating points")
    removed: list[str]
    altered: list[str]
    files_loaded: int = Field(description="ONNX files that were read; files that both bundles share were not")


class ModelMetadata(BaseModel):
    """A model, as the Open Inference Protocol describes one. Its versions are bundle ids."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]


class DeviceInfo(BaseModel):
    """What a device says of itself, if it reports. Counts are of its program since that began."""

    age_s: float = Field(description="since the report came")
    pictures: int = Field(description="that came from its sources")
    answered: int
    failed: int
    dropped: int = Field(description="newer pictures overtook them")
    reconnects: int
    unanswered: int = Field(description="frames, when it reported")
    head_ms: float | None = Field(description="mean since the report before; null if nothing was answered since")
    encode_ms: float | None
    answer_ms: float | None = Field(description="from picture to answer")
    temperature_c: float | None


class SessionInfo(BaseModel):
    """A session, connected or waiting to be resumed."""

    id: str
    client: str
    model: str
    bundle_id: str
    spool: str | None = Field(description="id of the device's spool that its frames come from; null for live frames")
    connected: bool
    age_s: float
    policy: dict[str, str | float | bool] | None
    point_asked: str | None = Field(description="the point that the policy chose")
    point_last_used: str | None = Field(description="the point of the newest frame")
    frames_answered: int
    frames_resent: int
    frames_dropped: int
    frames_in_flight: int
    faults: dict[str, int] = Field(description="by gRPC status number")
    payload_bytes_mean: float | None
    message_bytes_up: int = Field(description="of the client's messages")
    message_bytes_down: int
    link_bytes_up: int = Field(description="the same with the headers of packets, as they cross the client's interface")
    link_bytes_down: int
    frames_per_s: float | None = Field(description="over the last messages; null until there are four")
    device: DeviceInfo | None = Field(description="null if it does not report")


def _outputs(served: ServedModel) -> list[TensorInfo]:
    tensors = output_tensors(served.manifest, len(served.labels))
    return [TensorInfo(name=tensor.name, datatype=tensor.datatype, shape=list(tensor.shape)) for tensor in tensors]


def model_info(served: ServedModel, problem: str) -> ModelInfo:
    """A served model with its ladder; `problem` is what is wrong with its folder."""
    manifest = served.manifest
    entries = {entry.id: entry for entry in manifest.points}
    points = [
        PointInfo(
            split=p.split,
            stride=p.stride,
            channels=p.latent_shape[0],
            latent_shape=p.latent_shape,
            **entries[p.id].model_dump(exclude={"measured"}),
        )
        for p in manifest.ladder
    ]
    return ModelInfo(
        name=manifest.name,
        bundle_id=served.bundle.bundle_id,
        task=manifest.task,
        backbone=manifest.backbone,
        input_height=manifest.input.height,
        input_width=manifest.input.width,
        classes=len(served.labels),
        outputs=_outputs(served),
        uncompressed_accuracy=manifest.uncompressed_accuracy,
        problem=problem,
        points=points,
    )


def session_info(session: Session, *, connected: bool, now: float) -> SessionInfo:
    """A session; `now` is on the monotonic clock of its times."""
    link, messages = session.link_bytes(now), session.message_bytes
    return SessionInfo(
        id=session.session_id,
        client=session.client,
        model=session.model,
        bundle_id=session.bundle_id,
        spool=session.spool or None,
        connected=connected,
        age_s=now - session.created,
        policy=None if session.policy is None else policy_dict(session.policy),
        point_asked=session.asked_point,
        point_last_used=session.last_point,
        frames_answered=session.answered,
        frames_resent=session.resent,
        frames_dropped=session.dropped,
        frames_in_flight=session.in_flight,
        faults={str(code): count for code, count in session.faults.items()},
        payload_bytes_mean=session.payload_bytes / session.accepted if session.accepted else None,
        message_bytes_up=round(messages.up),
        message_bytes_down=round(messages.down),
        link_bytes_up=round(link.up),
        link_bytes_down=round(link.down),
        frames_per_s=session.measured_frames_per_s,
        device=None if session.device is None else _device_info(*session.device, now),
    )


def _device_info(device: Device, at: float, now: float) -> DeviceInfo:
    return DeviceInfo(
        age_s=now - at,
        pictures=device.pictures,
        answered=device.answered,
        failed=device.failed,
        dropped=device.dropped,
        reconnects=device.reconnects,
        unanswered=device.unanswered,
        head_ms=device.head_us / 1e3 or None,
        encode_ms=device.encode_us / 1e3 or None,
        answer_ms=device.answer_us / 1e3 or None,
        temperature_c=device.temperature_c,
    )


def model_metadata(served: ServedModel) -> ModelMetadata:
    """A model, as the Open Inference Protocol describes one."""
    return ModelMetadata(
        name=served.name,
        versions=[served.bundle.bundle_id],
        platform="onnxruntime_onnx",
        inputs=[
            TensorInfo(name="point", datatype="BYTES", shape=[1]),
            TensorInfo(name="payload", datatype="BYTES", shape=[1]),
        ],
        outputs=_outputs(served),
    )
