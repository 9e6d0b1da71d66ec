"""Batches along the chain, session state and generations of bundles, without sockets."""

import asyncio
import gc
from pathlib import Path
from weakref import WeakSet

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitneck.bundle import Bundle
from bitneck.errors import (
    BundleMismatch,
    MalformedFrame,
    ModelFailure,
    Overloaded,
    ProtocolError,
    UnknownModel,
)
from bitneck.ladder import Ladder, OperatingPoint
from bitneck.wire.messages import Classification, SetPoint
from bitneck_cloud.access.tokens import ResumeToken, TokenSigner
from bitneck_cloud.engine.chain_plan import plan_batch
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.fleet.patterns import Groups
from bitneck_cloud.sessions.outbox import Outbox
from bitneck_cloud.sessions.rates import MaxKbps
from bitneck_cloud.sessions.registry import Registry
from bitneck_cloud.sessions.session import Event, Phase, Session, StreamState, Verdict
from bitneck_testing.streams import Frames, assert_a_batch_equals_frame_by_frame, empty_result
from bitneck_testing.tiny_bundles import make_tiny_bundle


@given(st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=20))
def test_each_row_joins_once_at_its_own_split(points: list[str]) -> None:
    start = {"a": 1, "b": 1, "c": 2, "d": 4}
    plan = plan_batch(points, start, 5)
    joined = [(row, step.segment) for step in plan for group in step.joining for row in group.rows]
    assert sorted(row for row, _ in joined) == list(range(len(points)))
    assert all(segment == start[points[row]] for row, segment in joined)
    if points:
        assert [step.segment for step in plan] == list(range(min(start[p] for p in points), 5))
        groups = [group.point for step in plan for group in step.joining]
        assert len(groups) == len(set(points))  # one decoder pass per operating point


def test_a_mixed_batch_equals_frame_by_frame(tiny_bundle: Bundle) -> None:
    frames, model = Frames(tiny_bundle), ServedModel(tiny_bundle, threads=1)
    points = [list(frames.encoders)[k % 3] for k in range(10)]
    assert_a_batch_equals_frame_by_frame(frames, model, points)


def test_generations_share_the_operating_points_that_are_the_same(tiny_bundle: Bundle, tmp_path: Path) -> None:
    before = ServedModel(tiny_bundle, threads=1)
    fewer = ServedModel(make_tiny_bundle(tmp_path / "fewer", drop_points=("s2-r1",)), threads=1, before=before)
    assert set(fewer.decoders) == {"s1-r1", "s1-r2"}
    assert all(fewer.decoders[point] is before.decoders[point] for point in fewer.decoders)
    other = ServedModel(make_tiny_bundle(tmp_path / "other", seed=1), threads=1, before=before)
    assert not any(other.decoders[point] is before.decoders[point] for point in other.decoders)
    similar = ServedModel(make_tiny_bundle(tmp_path / "similar", similar=("s1-r2",)), threads=1, before=before)
    assert [p for p in similar.decoders if similar.decoders[p] is not before.decoders[p]] == ["s1-r2"]
    assert similar.decoders["s1-r2"].conditional is not None
    coded = ServedModel(make_tiny_bundle(tmp_path / "coded", contextual=("s1-r2",)), threads=1, before=before)
    assert [p for p in coded.decoders if coded.decoders[p] is not before.decoders[p]] == ["s1-r2"]
    better = [point.model_copy(update={"accuracy": 0.5}) for point in tiny_bundle.manifest.points]
    manifest = tiny_bundle.manifest.model_copy(update={"points": tuple(better)})
    measured = ServedModel(Bundle(tiny_bundle.root, manifest, manifest.to_json()), threads=1, before=before)
    assert measured.decoders == before.decoders  # measured again, and nothing else
    assert not set(measured.identities.values()) & set(before.identities.values())


def test_a_frame_without_finite_logits_fails_alone(tiny_bundle: Bundle) -> None:
    frames, model = Frames(tiny_bundle), ServedModel(tiny_bundle, threads=1)
    latent = model.decode("s1-r2", frames.payload("s1-r2", 1))
    good, bad = model.compute(["s1-r2", "s1-r2"], [latent, np.full_like(latent, np.nan)])
    assert isinstance(good, Classification)
    assert isinstance(bad, ModelFailure)


def ladder() -> Ladder:
    return Ladder(
        OperatingPoint(
            id=name, unit="u", split="s1", step=1.0, stride=1, latent_shape=(1, 1, 1), payload_bytes=size,
            bpp_payload=0.1, accuracy=accuracy,
        )
        for name, size, accuracy in (("low", 10, 0.5), ("mid", 50, 0.7), ("high", 200, 0.9))
    )  # fmt: skip


def session(window: int = 3) -> Session:
    return Session(session_id="s-1", model="m", client="c", ladder=ladder(), window=window, assumed_fps=10, now=0.0)


def test_illegal_events_are_errors() -> None:
    state = StreamState()
    with pytest.raises(ProtocolError, match="send Open first"):
        state.on(Event.FRAME)
    state.on(Event.OPEN)
    state.on(Event.FRAME)
    with pytest.raises(ProtocolError, match="once"):
        state.on(Event.OPEN)
    state.on(Event.CLOSE)
    assert state.phase is Phase.CLOSED
    with pytest.raises(ProtocolError):
        state.on(Event.FRAME)


@given(st.lists(st.tuples(st.integers(1, 30), st.sampled_from(["send", "complete", "fail", "drop"])), max_size=120))
def test_a_seq_is_computed_once_and_the_window_holds(steps: list[tuple[int, str]]) -> None:
    it, flying, completed = session(), set[int](), set[int]()
    for now, (seq, action) in enumerate(steps):
        if action == "send":
            try:
                verdict = it.accept(seq, "low", 10, float(now))
            except Overloaded:
                assert len(flying) == it.window
                assert seq not in flying
            except MalformedFrame:
                assert seq not in flying
                assert any(done >= seq for done in completed)
            else:
                if verdict is Verdict.NEW:
                    assert seq not in flying
                    assert seq not in completed
                    flying.add(seq)
                elif verdict is Verdict.ATTACHED:
                    assert seq in flying
                else:
                    assert it.kept_answer(seq).seq == seq
        elif seq in flying:
            flying.discard(seq)
            if action == "complete":
                completed.add(seq)
                it.complete(empty_result(seq))
            elif action == "fail":
                it.fail(seq, 13)
            else:
                it.drop(seq)
        assert it.in_flight == len(flying) <= it.window


def test_max_kbps_moves_with_the_frame_rate_and_not_at_every_frame() -> None:
    it = session(window=1000)
    assert it.set_policy(MaxKbps(20.0)) == "mid"  # 250 bytes of the link for a frame at 10 frames a second
    chosen = []
    for k in range(200):
        it.accept(k + 1, "mid", 50, k * 0.1)
        chosen.append(it.weigh_again())
    assert set(chosen) == {None}
    for k in range(200):  # now 50 frames a second: 50 bytes each
        it.accept(1000 + k, "mid", 50, 20 + k * 0.02)
        chosen.append(it.weigh_again())
    assert [c for c in chosen if c] == ["low"]
    for k in range(200):  # 0.5 frames a second: everything fits; and far too many: the lowest stays
        it.accept(2000 + k, "low", 10, 30 + k * 2.0)
        chosen.append(it.weigh_again())
    assert [c for c in chosen if c][-1] == "high"


def test_resume_tokens_are_signed_and_grow_old() -> None:
    signer = TokenSigner(b"k" * 32, max_age_s=100)
    said = ResumeToken("s-0123456789ab", "tiny")
    text = signer.sign(said, 1000.0)
    assert signer.read(text, 1050.0) == said
    assert signer.read(text, 1101.0) is None
    assert TokenSigner(b"j" * 32, max_age_s=100).read(text, 1000.0) is None
    other = signer.sign(ResumeToken("s-ba9876543210", "tiny"), 1000.0)
    assert signer.read(text.split(".")[0] + "." + other.split(".")[1], 1000.0) is None
    for k in range(len(text)):
        changed = text[:k] + ("A" if text[k] != "A" else "B") + text[k + 1 :]
        # the last characters of base64 hold bits that do not count; no other change is taken
        assert signer.read(changed, 1000.0) in (None, said)
        if k < text.index("."):
            assert signer.read(changed, 1000.0) is None


@given(st.text(max_size=60))
def test_no_text_is_a_token_by_chance(text: str) -> None:
    assert TokenSigner(b"k" * 32, max_age_s=100).read(text, 0.0) is None


def registry(models: list[ServedModel], *, adopt: bool) -> Registry:
    return Registry(
        models, window=4, max_sessions=3, resume_s=10.0, assumed_fps=10.0, max_bytes_per_s=0.0,
        signer=TokenSigner(b"k" * 32, max_age_s=100), adopt=adopt,
    )  # fmt: skip


def test_a_model_must_be_named_where_several_are_served(tiny_bundle: Bundle, tmp_path: Path) -> None:
    models = [ServedModel(tiny_bundle, threads=1), ServedModel(make_tiny_bundle(tmp_path, name="other"), threads=1)]
    both = registry(models, adopt=False)
    assert both.model("other") is models[1]
    with pytest.raises(UnknownModel, match=r"name one of them \(--model\): tiny, other"):
        both.model("")


def test_a_replica_with_the_key_takes_a_returning_client(tiny_bundle: Bundle) -> None:
    model = ServedModel(tiny_bundle, threads=1)
    first, second, private = (registry([model], adopt=adopt) for adopt in (True, True, False))
    opened = first.open(model, "camera", "", 0.0, 1000.0)
    assert opened.how == "new"
    moved = second.open(model, "camera", opened.token, 500.0, 1001.0)
    assert (moved.how, moved.session.session_id) == ("adopted", opened.session.session_id)
    back = first.open(model, "camera", moved.token, 2.0, 1002.0)
    assert back.how == "resumed"
    assert back.session is opened.session
    alone = private.open(model, "camera", opened.token, 0.0, 1001.0)
    assert alone.how == "new"
    assert alone.session.session_id != opened.session.session_id


def test_generations_stay_while_they_are_used(tiny_bundle: Bundle, tmp_path: Path) -> None:
    old = ServedModel(tiny_bundle, threads=1)
    it = registry([old], adopt=False)
    session = it.open(old, "camera", "", 0.0, 0.0).session
    newer = [ServedModel(make_tiny_bundle(tmp_path / str(seed), seed=seed), threads=1) for seed in (1, 2, 3)]
    for model in newer:
        it.swap(model)
    assert it.model("") is newer[-1]
    assert it.generation("", old.bundle.bundle_id) is old  # a session uses it
    assert it.generation("tiny", newer[1].bundle.bundle_id) is newer[1]  # the one before
    with pytest.raises(BundleMismatch):
        it.generation("", newer[0].bundle.bundle_id)
    it.disconnect(session, 0.0)
    it.expire(11.0)
    it.swap(ServedModel(make_tiny_bundle(tmp_path / "4", seed=4), threads=1))
    with pytest.raises(BundleMismatch):
        it.generation("", old.bundle.bundle_id)


def test_a_candidate_that_is_tried_again_and_again_is_kept_once(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Also while a session stays with its bundle, as that of a pinned device does."""
    it = registry([ServedModel(tiny_bundle, threads=1)], adopt=False)
    bundle, alive = make_tiny_bundle(tmp_path / "new", seed=1), WeakSet[ServedModel]()
    for turn in range(5):
        candidate = ServedModel(bundle, threads=1)
        alive.add(candidate)
        it.begin(candidate, Groups().clients("*"))
        if turn == 0:
            it.open(candidate, "camera", "", 0.0, 0.0)
        it.withdraw("tiny")
        assert it.generation("tiny", bundle.bundle_id) is candidate
    del candidate
    gc.collect()
    assert len(alive) == 1


def test_a_session_has_an_allowance_of_bytes() -> None:
    it = Session(
        session_id="s-1", model="m", client="c", ladder=ladder(), window=1000, assumed_fps=10, now=0.0,
        max_bytes_per_s=100_000,
    )  # fmt: skip
    for seq in range(1, 11):
        it.accept(seq, "high", 10_000, 0.0)
    with pytest.raises(Overloaded, match="payload bytes a second"):
        it.accept(11, "high", 10_000, 0.0)
    assert it.in_flight == 10
    it.accept(11, "high", 10_000, 0.11)


async def test_an_outbox_is_bounded_and_control_goes_first() -> None:
    box = Outbox(limit=2)
    answers = [empty_result(k) for k in range(3)]
    box.put(answers[0])
    box.put(answers[1])
    waiting = asyncio.create_task(box.room())
    for point in ("old", "new"):
        box.control(SetPoint(point, "a reason"))
    await asyncio.sleep(0)
    assert not waiting.done()
    first = await box.get()
    assert first == SetPoint("new", "a reason")
    assert await box.get() == answers[0]
    await asyncio.wait_for(waiting, 1)
    box.put(answers[2])
    box.close()
    await asyncio.wait_for(box.room(), 1)  # nobody waits for room in a closed one
    assert [await box.get() for _ in range(3)] == [answers[1], answers[2], None]
