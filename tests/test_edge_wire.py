"""The edge's messages on the wire: every value of every field arrives, and what is unknown is passed over."""

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.messages import (
    Answers,
    Classification,
    ClassShare,
    CodedMap,
    Fault,
    Frame,
    GoAway,
    Label,
    Open,
    Opened,
    Result,
    SetPoint,
    Timings,
)
from bitneck_edge.link.wire import client_message, server_message

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
F32 = st.floats(width=32, allow_nan=False)
TEXT = st.text(max_size=20).filter(lambda text: text.isprintable())
OPEN = st.builds(
    Open, model=TEXT, bundle_id=TEXT, client=TEXT, resume_token=TEXT, references=st.booleans(),
    answers=st.sampled_from(Answers),
)  # fmt: skip
FRAME = st.builds(
    Frame, seq=U64, point=TEXT, payload=st.binary(max_size=50), crc32c=U32, deadline_ms=U32, captured_unix_us=U64,
    reference=U32, acknowledge=st.booleans(),
)  # fmt: skip
LABELS = st.lists(st.builds(Label, U32, TEXT, F32), max_size=4).map(tuple)
SHARES = st.lists(st.builds(ClassShare, U32, TEXT, F32), max_size=4).map(tuple)
OUTPUT = st.builds(Classification, LABELS) | st.builds(
    CodedMap, height=st.integers(1, 2**32 - 1), width=U32, map=st.binary(max_size=50), classes=SHARES,
    step=st.integers(1, 2**32 - 1),
)  # fmt: skip
TIMINGS = st.builds(Timings, received_unix_us=U64, queued_us=U64, decode_us=U64, compute_us=U64, batch=U32)


@given(OPEN | FRAME)
def test_what_a_client_sends(message: Open | Frame) -> None:
    kind = "open" if isinstance(message, Open) else "frame"
    wire = pb.ClientMessage.FromString(client_message(message).SerializeToString())
    assert wire.WhichOneof("message") == kind
    arrived = getattr(wire, kind)
    sent = asdict(message) | ({"answers": list(Answers).index(message.answers)} if isinstance(message, Open) else {})
    assert {name: getattr(arrived, name) for name in sent} == sent
    assert {field.name for field in arrived.DESCRIPTOR.fields} == set(asdict(message))


@given(U64, OUTPUT, TIMINGS)
def test_a_result(seq: int, output: Classification | CodedMap, timings: Timings) -> None:
    found = pb.Output()
    if isinstance(output, Classification):
        found.classification.labels.extend([pb.Label(**asdict(label)) for label in output.labels])
        found.classification.SetInParent()
    else:
        found.segmentation.MergeFrom(pb.Segmentation(height=output.height, width=output.width))
        found.segmentation.map, found.segmentation.step = output.map, output.step
        found.segmentation.classes.extend([pb.ClassShare(**asdict(share)) for share in output.classes])
        found.segmentation.SetInParent()
    wire = pb.ServerMessage(result=pb.Result(seq=seq, output=found, timings=pb.Timings(**asdict(timings))))
    assert server_message(pb.ServerMessage.FromString(wire.SerializeToString())) == Result(seq, output, timings)


@given(st.builds(Opened, session_id=TEXT, resume_token=TEXT, window=U32, point=TEXT, references=U32))
def test_an_open_session(message: Opened) -> None:
    assert server_message(pb.ServerMessage(opened=pb.Opened(**asdict(message)))) == message


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        (pb.ServerMessage(fault=pb.Fault(seq=3, code=15, message="damaged")), Fault(3, 15, "damaged")),
        (pb.ServerMessage(set_point=pb.SetPoint(point="s1-r1", reason="a test")), SetPoint("s1-r1", "a test")),
        (pb.ServerMessage(go_away=pb.GoAway(reason="a reload")), GoAway("a reload")),
        (pb.ServerMessage(), None),
    ],
)
def test_short_messages(wire: pb.ServerMessage, message: object) -> None:
    assert server_message(wire) == message


def test_a_result_without_output_or_timings() -> None:
    for result in (pb.Result(seq=1, cloud_us=7), pb.Result(seq=1, output=pb.Output(), cloud_us=7)):
        assert server_message(pb.ServerMessage(result=result)) == Result(1, None, None, 7)
