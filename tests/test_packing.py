"""Frames that share a message, acknowledgements, coarse class maps and the model of packets: pure parts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from bitneck.coding.coarse_map import coarse, coarse_size, refined
from bitneck.errors import MalformedFrame
from bitneck.ladder import Ladder, OperatingPoint
from bitneck.v2 import inference_pb2 as pb
from bitneck.wire.frames import MAX_MESSAGE_BYTES, pack_bytes, seal_frame, wire_bytes
from bitneck.wire.link_bytes import LinkBytes, LinkMeter, beside_payload
from bitneck.wire.messages import (
    Ack,
    Answers,
    ClassShare,
    CodedMap,
    Fault,
    Frame,
    Pack,
    Result,
    Results,
    Shares,
    Timings,
)
from bitneck_cloud.api.wire import from_wire
from bitneck_cloud.sessions.acknowledging import Acknowledging
from bitneck_cloud.sessions.answering import Answering, answer_for
from bitneck_cloud.sessions.session import Session
from bitneck_edge.link.cost import LinkCost
from bitneck_edge.link.packing import Packer, frames_of, together
from bitneck_edge.link.records import Records
from bitneck_edge.link.wire import client_message

TIMINGS = Timings(received_unix_us=5, queued_us=100, decode_us=200, compute_us=300, batch=2)


def frame(seq: int, size: int = 3, *, position: int = 1, **values: int) -> Frame:
    return seal_frame(seq=seq, point="s1-r1", payload=bytes([seq % 256]) * size, position=position, **values)


@st.composite
def packs(draw: st.DrawFn) -> Pack:
    count, seq = draw(st.integers(1, 12)), draw(st.integers(1, 2**40))
    deadline, last_asks = draw(st.integers(0, 2**20)), draw(st.booleans())
    frames = [
        seal_frame(
            seq=seq + k, point="", payload=draw(st.binary(max_size=200)), deadline_ms=deadline,
            captured_unix_us=draw(st.sampled_from([0, 1_700_000_000_000_000])) + draw(st.integers(0, 10**6)),
            position=draw(st.integers(1, 300)), acknowledge=last_asks and k == count - 1,
            reference=draw(st.integers(0, 200)),
        )
        for k in range(count)
    ]  # fmt: skip
    if draw(st.booleans()):
        frames = [seal_frame(seq=f.seq, point="", payload=f.payload, position=7) for f in frames]
    return Pack(tuple(frames))


@given(packs())
def test_a_pack_arrives_as_it_was_sent_and_takes_the_bytes_that_are_counted(pack: Pack) -> None:
    message = pb.ClientMessage.FromString(client_message(pack).SerializeToString())
    assert from_wire(message, 12) == pack
    assert message.ByteSize() == pack_bytes(pack)


def test_ten_frames_of_28_bytes_take_35_bytes_each() -> None:
    frames = [frame(200 + k, 28) for k in range(10)]
    assert pack_bytes(Pack(tuple(frames))) <= 355
    assert wire_bytes(frames[0]) == 42


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"payload": []}, "a pack of 0 frames"),
        ({"payload": [b"x"] * 5}, "1 to 4 frames"),
        ({"seq": 0}, "from seq 0"),
        ({"seq": 2**64 - 1}, "from seq 18446744073709551615"),
        ({"crc32c": [1]}, "has 1 CRCs"),
        ({"position": [1, 2, 3]}, "3 positions"),
        ({"reference": [1, 2, 3]}, "3 references"),
        ({"captured_unix_us": [1]}, "1 times"),
    ],
)
def test_packs_whose_parts_do_not_fit_are_refused(change: dict[str, object], text: str) -> None:
    fields = {"seq": 1, "payload": [b"x", b"y"], "crc32c": [1, 2], "position": [1]} | change
    message = pb.ClientMessage(pack=pb.Pack(**fields))  # type: ignore[arg-type]
    with pytest.raises(MalformedFrame, match=text):
        from_wire(message, 4)


def test_frames_wait_until_a_message_is_full() -> None:
    packer = Packer(3)
    assert packer.add(frame(1)) == packer.add(frame(2)) == []
    (full,) = packer.add(frame(3))
    assert [f.seq for f in frames_of(full)] == [1, 2, 3]
    assert packer.add(frame(4)) == []
    assert packer.take() == [frame(4)]
    assert packer.take() == []


@pytest.mark.parametrize(
    "other", [frame(3), frame(2, deadline_ms=5), frame(2, position=0), frame(2, MAX_MESSAGE_BYTES // 2)]
)
def test_a_frame_that_cannot_join_begins_another_message(other: Frame) -> None:
    packer = Packer(3)
    assert packer.add(frame(1)) == []
    messages = packer.add(other) + packer.take()
    assert messages == [frame(1), other]


@given(sizes=st.lists(st.integers(0, 40_000), max_size=40), most=st.integers(1, 12))
def test_frames_together_keep_their_order_and_fit_into_a_message(sizes: list[int], most: int) -> None:
    frames = [frame(1 + k, size) for k, size in enumerate(sizes)]
    messages = together(frames, most)
    assert [f for message in messages for f in frames_of(message)] == frames
    for message in messages:
        size = pack_bytes(message) if isinstance(message, Pack) else wire_bytes(message)
        assert size <= MAX_MESSAGE_BYTES
        assert len(frames_of(message)) <= most


def test_at_most_twelve_frames_wait_for_their_acknowledgement() -> None:
    it = Acknowledging()
    for seq in range(1, 12):
        assert it.computed(seq, 10.0 + seq, 30.0) == ()
    assert it.computed(12, 22.0, 30.0) == (Ack(12, 11, 8_000_000),)
    assert it.flush(31.0) == ()


def test_a_frame_that_asks_is_acknowledged_with_those_before() -> None:
    it = Acknowledging()
    it.expect([4])
    assert it.computed(1, 0.0, 1.0) == it.computed(3, 0.0, 1.0) == ()
    assert it.computed(4, 0.5, 1.0) == (Ack(1, 0, 1_000_000), Ack(4, 1, 500_000))
    it.expect([6])
    assert it.computed(5, 1.0, 1.0) == ()
    assert it.failed(6, 1.0) == (Ack(5, 0, 0),)  # the client waits for no answer to it any more
    assert it.failed(7, 1.0) == ()


def results(*seqs: int, map_bytes: int = 0) -> list[Result]:
    output = CodedMap(height=8, width=8, map=bytes(map_bytes), classes=(ClassShare(1, "road", 0.5),))
    return [Result(seq, output, TIMINGS) for seq in seqs]


def test_the_answers_of_a_pack_come_together_and_faults_at_once() -> None:
    it = Answering(Answers.ALL, brief=False)
    it.expect([frame(1), frame(2), frame(3)])
    first, third = results(1, 3)
    assert it.settled(third, 0.0, 1.0) == ()
    fault = Fault(2, 15, "damaged")
    assert it.settled(fault, 0.0, 1.0) == (fault,)
    assert it.settled(first, 0.0, 1.0) == (Results((third, first)),)
    (again,) = results(2)
    assert it.settled(again, 0.0, 1.0) == (again,)  # sent again, alone


def test_a_frame_that_comes_again_leaves_the_pack_that_it_was_in() -> None:
    it = Answering(Answers.ALL, brief=False)
    it.expect([frame(1), frame(2), frame(3)])
    one, two, three, four = results(1, 2, 3, 4)
    assert it.settled(one, 0.0, 1.0) == it.settled(two, 0.0, 1.0) == ()
    assert it.expect([frame(3), frame(4)]) == (Results((one, two)),)  # nothing is left to wait for
    assert it.settled(three, 0.0, 1.0) == ()
    assert it.flush(1.0) == (three,)
    assert it.settled(four, 0.0, 1.0) == (four,)


def test_who_has_answers_needs_no_acknowledgements() -> None:
    it = Answering(Answers.ALL, brief=False)
    for seq in range(1, 100):
        assert it.acknowledge([seq], 1.0) == ()
    assert not it._acknowledging._awaited


def test_large_maps_of_a_pack_come_in_several_messages() -> None:
    it = Answering(Answers.ALL, brief=True)
    it.expect([frame(seq) for seq in range(1, 5)])
    answers = results(1, 2, 3, 4, map_bytes=30_000)
    sent = [message for result in answers for message in it.settled(result, 0.0, 1.0)]
    assert [len(m.results) for m in sent if isinstance(m, Results)] == [2, 2]


def test_a_client_gets_what_it_asked_for() -> None:
    (whole,) = results(1, map_bytes=5)
    assert answer_for(whole, Answers.ALL, brief=False, cloud_s=1.0) == whole
    brief = answer_for(whole, Answers.ALL, brief=True, cloud_s=1.0)
    assert brief.timings is not None
    assert brief.timings.received_unix_us == 0
    assert brief.output == CodedMap(height=0, width=0, map=bytes(5), classes=())
    shares = answer_for(whole, Answers.SHARES, brief=True, cloud_s=0.002)
    assert shares == Result(1, Shares((ClassShare(1, "", 0.5),)), None, 2000)
    assert answer_for(whole, Answers.MAP, brief=False, cloud_s=0.0).output == whole.output


def test_without_answers_a_client_asks_before_its_window_is_full() -> None:
    records = Records[None](window=6, ask_s=5.0)
    asks = [records.add("p", b"", answer=None, now_s=0.0).frame.acknowledge for _ in range(6)]
    assert asks == [True, False, False, True, False, False]
    alone = Records[None](window=6, ask_s=5.0)
    assert [alone.add("p", b"", answer=None, now_s=0.0, in_flight=1).frame.acknowledge] == [True]
    late = Records[None](window=100, ask_s=5.0)
    asks = [late.add("p", b"", answer=None, now_s=now).frame.acknowledge for now in (0.0, 1.0, 5.5, 6.0)]
    assert asks == [True, False, True, False]
    answered = Records[None](window=2)
    assert not answered.add("p", b"", answer=None, now_s=0.0, ask=True).frame.acknowledge


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


@given(classes=SIZES.flatmap(lambda size: npst.arrays(np.uint8, size)), step=st.integers(1, 15))
def test_a_refined_map_has_the_coarse_maps_pixels_in_their_places(classes: NDArray[np.uint8], step: int) -> None:
    small = coarse(classes, step)
    height, width = classes.shape
    assert small.shape == (coarse_size(height, step), coarse_size(width, step))
    fine = refined(small, step, height=height, width=width)
    assert fine.shape == classes.shape
    assert (coarse(fine, step) == small).all()
    assert set(np.unique(fine)) <= set(np.unique(small))
    if step == 1:
        assert (fine == classes).all()


def test_an_edge_lies_half_way_between_its_pixels() -> None:
    classes = np.full((9, 9), 3, dtype=np.uint8)
    classes[:, 4:] = 8
    fine = refined(coarse(classes, 4), 4, height=9, width=9)  # its columns 0, 4 and 8
    assert fine[5].tolist() == [3, 3, 3, 8, 8, 8, 8, 8, 8]  # at column 2 both are equally strong


def test_link_bytes_are_those_of_a_recorded_stream() -> None:
    """A stream without answers, as the interface saw it: eight frames, 200 ms apart, and an acknowledgement."""
    meter = LinkMeter()
    meter.sent(41, 0.0)
    meter.received(7, 0.006)
    before = meter.total(0.19)
    for at in (0.2, 0.402, 0.6, 0.793, 0.994, 1.202, 1.395):
        meter.sent(39, at)
    meter.sent(41, 1.595)
    meter.received(9, 1.599)
    up = 145 + 6 * 119 + 121 + 66
    down = 8 * 66 + 115
    assert meter.total(1.7) - before == LinkBytes(up, down)


def test_what_a_frame_will_cost_follows_from_what_frames_have_cost() -> None:
    meter = LinkMeter()
    for k in range(40):
        meter.sent(40, k * 0.2)
        meter.received(45, k * 0.2 + 0.005)
    counted = meter.total(8.0) / 40
    expected = meter.expected(40 - beside_payload(1), 0.2)
    assert expected.up == pytest.approx(counted.up, rel=0.03)
    assert expected.down == pytest.approx(counted.down, rel=0.03)
    packed = LinkMeter()
    size = pack_bytes(Pack(tuple(frame(200 + k, 28) for k in range(10))))
    for k in range(40):
        packed.sent(size, k * 2.0, frames=10)
        packed.received(200, k * 2.0 + 0.005)
    assert packed.expected(28, 0.2).up == pytest.approx((packed.total(80.0) / 400).up, rel=0.03)


def test_encryption_longer_headers_large_messages_and_keepalives_cost_more() -> None:
    def cost(size: int = 40, *, later: float = 1.0, **options: float) -> LinkBytes:
        meter = LinkMeter(**options)  # type: ignore[arg-type]
        meter.sent(size, 0.0)
        meter.received(45, 0.005)
        return meter.total(later)

    plain = cost()
    assert cost(tls=True) - plain == LinkBytes(22, 22)
    assert cost(ipv6=True) - plain == LinkBytes(40, 20)
    assert (cost(1440) - plain).up == 1400 + 66  # one packet more
    meter = LinkMeter(keepalive_s=10.0)
    meter.received(45, 0.0)
    meter.sent(40, 25.0)  # two pings before it
    quiet = LinkMeter()
    quiet.received(45, 0.0)
    quiet.sent(40, 25.0)
    assert meter.total(26.0) - quiet.total(26.0) == LinkBytes(2 * (2 * 66 + 17), 2 * (2 * 66 + 17))


def test_the_busier_direction_counts() -> None:
    assert LinkCost(beside=180, down=150).bytes(28) == 208
    assert LinkCost(beside=180, down=2000).bytes(28) == 2000  # a class map: a smaller payload saves nothing
    assert LinkCost(beside=20, down=50, frames=10).bytes(28) == 500
    assert LinkCost(beside=20, down=50, frames=10).bytes(28, frames=3) == 150
    assert LinkCost(beside=180).bytes(3000) == 3000 + 180 + 2 * 66


def test_a_session_in_packs_has_the_frame_rate_of_its_pictures() -> None:
    point = OperatingPoint(
        id="low", unit="u", split="s1", step=1.0, stride=4, latent_shape=(8, 2, 2), payload_bytes=10, bpp_payload=0.1,
        accuracy=0.5,
    )  # fmt: skip
    it = Session(session_id="s", model="m", client="c", ladder=Ladder([point]), window=100, assumed_fps=10, now=0.0)
    for number in range(8):  # ten frames every two seconds
        for k in range(10):
            it.accept(10 * number + k + 1, "low", 10, 2.0 * number)
            it.complete(Result(10 * number + k + 1, None, TIMINGS))
    assert it.frames_per_s == pytest.approx(5.0)
