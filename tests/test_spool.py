"""The spool on the disk: what is written stays, in order, within its bounds, whatever happens to process and files."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitneck.errors import InvalidConfig, Unavailable
from bitneck_edge.spool.bounds import Limits
from bitneck_edge.spool.files import Spool
from bitneck_edge.spool.format import Damage, Done, FrameEntry, Header, Table, pack, read
from bitneck_edge.spool.pace import SpoolPace
from bitneck_edge.spool.segment import Kept
from bitneck_testing.processes import edge

BUNDLE, OTHER = "sha256:" + "ab" * 32, "sha256:" + "cd" * 32
LIMITS = Limits(most_bytes=10_000_000, most_age_s=86_400 * 7)
NOW_US = round(time.time() * 1e6)
PAYLOAD = 70

seqs = st.integers(0, (1 << 64) - 1)
entries = st.one_of(
    st.builds(Header, seqs, st.from_regex(r"\A[a-z0-9][a-z0-9-]{0,40}\Z")),
    st.builds(Table, st.integers(0, 65534), st.just(BUNDLE), st.from_regex(r"\A[a-z0-9.-]{1,20}\Z"), st.text("abc/#é")),
    st.builds(FrameEntry, seqs, seqs, st.integers(0, 65535), st.text("abcé#/", max_size=60), st.binary(max_size=200)),
    st.builds(Done, st.lists(seqs, max_size=20).map(tuple)),
)


def frame(number: int, *, bundle: str = BUNDLE, captured_us: int = NOW_US, payload: bytes | None = None) -> Kept:
    data = payload if payload is not None else random.Random(number).randbytes(PAYLOAD)
    return Kept(
        seq=0, bundle_id=bundle, point="s1-r3", payload=data, captured_unix_us=captured_us, name=f"cam#{number}"
    )


def names(spool: Spool) -> list[str]:
    """All that is to be sent, of one bundle; it stays in the spool."""
    return [each.name for each in spool.take(1 << 20, 1 << 30)]


def files(folder: Path, suffix: str = "frames") -> list[Path]:
    return sorted(folder.glob(f"*.{suffix}"))


@given(st.lists(entries, max_size=10))
def test_what_is_packed_is_read(some: list[Header | Table | FrameEntry | Done]) -> None:
    assert [entry for entry, _ in read(b"".join(pack(each) for each in some))] == some


@settings(max_examples=200)
@given(st.lists(entries, min_size=1, max_size=5), st.binary(max_size=64), st.integers(0, 1 << 16))
def test_damage_costs_what_it_hits(some: list[Header | Table | FrameEntry | Done], noise: bytes, where: int) -> None:
    """Bytes between two records cost none; overwritten ones cost those records alone."""
    parts = [pack(each) for each in some]
    whole = b"".join(parts)
    found = [entry for entry, _ in read(b"".join(part + noise for part in parts))]
    assert [entry for entry in found if not isinstance(entry, Damage)] == some
    place = where % len(whole)
    broken = bytearray(whole)
    broken[place] ^= 0x55
    left = [entry for entry, _ in read(bytes(broken)) if not isinstance(entry, Damage)]
    assert len(left) >= len(some) - 1
    assert all(entry in some for entry in left)


@given(st.binary(max_size=300))
def test_any_bytes_can_be_read(data: bytes) -> None:
    assert [end for _, end in read(data)][-1:] == [len(data)][: len(data)]


def test_a_day_of_frames_is_ten_megabytes(tmp_path: Path) -> None:
    """Measured on two thousand frames of 70 bytes: tables and the header are shared by many."""
    spool = Spool.open(tmp_path, LIMITS)
    for number in range(2000):
        spool.put(frame(number))
    spool.close()
    each = sum(path.stat().st_size for path in files(tmp_path)) / 2000
    assert each * 86_400 < 10e6


def test_frames_come_in_order_and_leave_when_they_are_done(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path, LIMITS)
    identity = spool.spool_id
    assert [spool.put(frame(number)) for number in range(40)] == list(range(1, 41))
    first = spool.take(16, 1 << 20)
    assert [each.seq for each in first] == list(range(1, 17))
    assert first[0] == frame(0) or first[0].payload == frame(0).payload
    assert (first[3].name, first[3].captured_unix_us, first[3].bundle_id) == ("cam#3", NOW_US, BUNDLE)
    assert len(spool.take(16, 3 * PAYLOAD)) == 3
    spool.done(each.seq for each in first if each.seq != 5)
    assert [each.seq for each in spool.take(3, 1 << 20)] == [5, 17, 18]
    spool.close()
    again = Spool.open(tmp_path, LIMITS)
    assert again.spool_id == identity
    assert [each.seq for each in again.take(3, 1 << 20)] == [5, 17, 18]
    assert again.put(frame(40)) == 41
    again.done(range(1, 42))
    again.tidy()
    assert not again.has_waiting()
    assert again.counts().bytes < 200
    again.close()
    last = Spool.open(tmp_path, LIMITS)
    assert last.put(frame(41)) == 42, "a number is never given twice, also not by an empty spool"
    last.close()


def test_held_frames_wait_for_their_session_but_not_for_another_process(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path, LIMITS)
    for number in range(4):
        spool.put(frame(number), held=number in (1, 2))
    assert names(spool) == ["cam#0", "cam#3"]
    spool.release(2)
    assert names(spool) == ["cam#0", "cam#1", "cam#3"]
    assert spool.counts().kept == 4
    spool.close()
    again = Spool.open(tmp_path, LIMITS)
    assert names(again) == [f"cam#{number}" for number in range(4)]
    again.close()


def test_a_batch_has_one_bundle_and_others_can_be_passed_over(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path, LIMITS)
    for number in range(6):
        spool.put(frame(number, bundle=OTHER if number in (2, 3) else BUNDLE))
    assert [each.name for each in spool.take(9, 1 << 20)] == ["cam#0", "cam#1"]
    assert [each.name for each in spool.take(9, 1 << 20, {BUNDLE})] == ["cam#2", "cam#3"]
    assert spool.kept_of([OTHER]) == 2
    assert not spool.has_waiting({BUNDLE, OTHER})
    spool.done([1, 2, 5, 6])
    assert not spool.has_waiting({OTHER}), "frames that are done count no more"
    assert spool.take(9, 1 << 20, {OTHER}) == []
    spool.close()


def test_a_torn_tail_is_cut_off_at_every_length(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path, LIMITS)
    for number in range(3):
        spool.put(frame(number))
    spool.close()
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    ends = [end for entry, end in read(whole) if isinstance(entry, FrameEntry)]
    for length in range(ends[1] + 1, ends[2]):
        path.write_bytes(whole[:length])
        spool = Spool.open(tmp_path, LIMITS)
        assert names(spool) == ["cam#0", "cam#1"]
        assert spool.counts().damaged == 1
        number = spool.put(frame(9))
        assert number is not None
        assert number > 3, "the number of the lost frame may have been seen by the cloud"
        spool.close()
        spool = Spool.open(tmp_path, LIMITS)
        assert names(spool) == ["cam#0", "cam#1", "cam#9"]
        assert spool.counts().damaged == 0
        spool.close()


@pytest.mark.parametrize("seed", range(6))
def test_damaged_files_open(tmp_path: Path, seed: int) -> None:
    """Noise anywhere, in both kinds of files: what opens has no frame that was not put, and takes new ones."""
    dice = random.Random(seed)
    spool = Spool.open(tmp_path, Limits(most_bytes=1_000_000, most_age_s=1e6))
    for number in range(600):
        spool.put(frame(number))
    spool.done(range(1, 20))
    spool.close()
    for path in (*files(tmp_path), *files(tmp_path, "done")):
        data = bytearray(path.read_bytes())
        for _ in range(4):
            place = dice.randrange(len(data))
            data[place : place + dice.randrange(40)] = dice.randbytes(dice.randrange(40))
        path.write_bytes(data[: dice.randrange(len(data) // 2, len(data) + 1)] if seed % 2 else data)
    spool = Spool.open(tmp_path, Limits(most_bytes=1_000_000, most_age_s=1e6))
    assert spool.counts().damaged
    kept = names(spool)
    assert set(kept) <= {f"cam#{number}" for number in range(600)}
    assert len(kept) == len(set(kept)) > 200
    number = spool.put(frame(1000))
    assert number is not None
    assert number > 600 or spool.counts().kept < 600
    assert names(spool)[-1] == "cam#1000"
    spool.close()


def test_files_that_are_no_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "00000001.frames").mkdir()
    os.mkfifo(tmp_path / "00000002.frames")
    (tmp_path / "00000003.frames").symlink_to("/etc/passwd")
    (tmp_path / "00000004.frames").write_bytes(b"")
    spool = Spool.open(tmp_path, LIMITS)
    assert spool.put(frame(0)) is not None
    assert spool.counts().damaged == 3
    spool.close()


@pytest.mark.parametrize("first", ["oldest", "newest"])
def test_what_falls_out_of_a_full_spool(tmp_path: Path, first: str) -> None:
    most = 1_000_000
    spool = Spool.open(
        tmp_path, Limits(most_bytes=most, most_age_s=1e6, first="oldest" if first == "oldest" else "newest")
    )
    total = 12_000
    for number in range(total):
        spool.put(frame(number))
    kept, counts = names(spool), spool.counts()
    assert counts.kept == len(kept)
    assert counts.kept + counts.dropped == total
    assert 0.9 * most < counts.bytes <= most
    assert sum(path.stat().st_size for path in files(tmp_path)) <= most
    expected = range(total - len(kept), total) if first == "oldest" else range(len(kept))
    assert kept == [f"cam#{number}" for number in expected]
    spool.close()


def test_old_frames_fall_out(tmp_path: Path) -> None:
    """Of a clock that nobody has set, no age can be told."""
    spool = Spool.open(tmp_path, Limits(most_bytes=10_000_000, most_age_s=3600))
    spool.put(frame(0, captured_us=NOW_US - 7200 * 10**6))
    spool.put(frame(1, captured_us=NOW_US - 1800 * 10**6))
    spool.put(frame(2, captured_us=60 * 10**6))
    assert names(spool) == ["cam#1", "cam#2"]
    assert spool.counts().dropped == 1
    spool.close()


def test_another_process_is_refused(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path, LIMITS)
    with pytest.raises(InvalidConfig, match="used by another process"):
        Spool.open(tmp_path, LIMITS)
    refused = edge("run", "--server", "127.0.0.1:9", "--cache-dir", tmp_path / "cache", "--spool", tmp_path, __file__)
    assert refused.returncode == 2
    assert "used by another process" in refused.stderr
    spool.close()
    Spool.open(tmp_path, LIMITS).close()
    with pytest.raises(Unavailable, match="closed"):
        spool.put(frame(0))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match="cannot be written"):
        Spool.open(tmp_path / "file" / "spool", LIMITS)


WRITER = """
import itertools, sys
from pathlib import Path
from bitneck_edge.spool.bounds import Limits
from bitneck_edge.spool.files import Spool
from bitneck_edge.spool.segment import Kept, Segment
spool = Spool.open(Path(sys.argv[1]), Limits(most_bytes=10_000_000, most_age_s=1e9))
print("open", spool.counts().kept, flush=True)
for turn in itertools.count():
    taken = spool.take(4, 1 << 20)
    if len(taken) == 4 and turn % 6 == 0:
        spool.done(each.seq for each in taken)
        print("done", *(each.seq for each in taken), flush=True)
    print("put", spool.put(Kept(seq=0, bundle_id="sha256:" + "ab" * 32, point="p", payload=b"x" * 70,
                                captured_unix_us=1, name="c#1")), flush=True)
"""


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """What `put` has returned is there; what `done` has returned is gone; no number comes twice."""
    dice = random.Random(1)
    put: list[int] = []
    done: set[int] = set()
    for _ in range(10):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline().startswith("open")
        time.sleep(dice.uniform(0.01, 0.15))
        child.send_signal(signal.SIGKILL)
        for line in child.stdout.read().splitlines()[:-1]:  # the last one may be cut off
            what, *numbers = line.split()
            if what == "put":
                put.append(int(numbers[0]))
            else:
                done |= {int(number) for number in numbers}
        child.wait()
        child.stdout.close()
    assert len(put) > 50
    assert len(done) > 20
    assert put == sorted(set(put))
    spool = Spool.open(tmp_path, LIMITS)
    there = {each.seq for each in spool.take(1 << 20, 1 << 30)}
    spool.close()
    assert not there & done
    missing = set(put) - done - there
    assert len(missing) <= 4 * 10, "only what was done a moment before the kill, and could not be told"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_full_disk(tmp_path: Path) -> None:
    """Frames that find no room are counted; the oldest ones make room; nothing breaks, and the spool opens again."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode()[:80]}")
    try:
        folder = tmp_path / "spool"
        limits = Limits(most_bytes=2_000_000, most_age_s=1e9)
        spool = Spool.open(folder, limits)
        for number in range(6000):
            spool.put(frame(number))
        counts, kept = spool.counts(), names(spool)
        assert counts.dropped > 1000
        assert counts.kept + counts.dropped == 6000
        assert kept == [f"cam#{number}" for number in range(6000 - len(kept), 6000)]
        spool.close()
        (tmp_path / "rest").write_bytes(b"x" * 1000)
        with (tmp_path / "rest").open("ab") as rest, pytest.raises(OSError, match="space"):
            while True:
                os.write(rest.fileno(), b"x" * 4096)
        with files(folder)[-1].open("ab") as torn:
            torn.write(b"\xb7\x5e\x50")
        spool = Spool.open(folder, limits)
        assert names(spool) == kept
        spool.done([each.seq for each in spool.take(10, 1 << 20)])
        assert names(spool) == kept[10:]
        spool.close()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_live_frames_come_first_in_the_pace() -> None:
    pace = SpoolPace()
    assert (pace.batch(16, 0), pace.batch(16, 16), pace.batch(16, 15)) == (16, 0, 1)
    first = pace.most_bytes
    for turn in range(4):  # a fast link: batches grow
        pace.took(pace.most_bytes, 0.02, 1000.0, 0.0, float(turn))
    assert pace.most_bytes == 16 * first
    pace.took(70, 0.02, 1000.0, 0.0, 5.0)
    assert pace.most_bytes == 16 * first, "a small one says nothing of large ones"
    for turn in range(20):  # live frames are sent, and a batch takes long: down to single frames
        pace.live(1000.0 * turn, True, 10.0 + turn)
        pace.took(pace.most_bytes, 0.5, 1000.0, 0.0, 10.0 + turn)
    assert pace.most_bytes < 70


def test_the_pace_keeps_to_what_live_frames_leave() -> None:
    pace = SpoolPace()
    for second in range(30):  # 8 kbit/s of live frames
        pace.live(1000.0 * second, False, float(second))
    pace.took(4, 0.02, 1000.0, 16.0, 30.0)
    assert pace.pause_s(16.0, 30.0) == pytest.approx(0.98, abs=0.05)
    assert pace.pause_s(7.0, 60.0) > 0, "nothing is left"
    assert pace.pause_s(16.0, 60.0) == 0
    limited = SpoolPace(kbps=8.0)
    limited.took(4, 0.02, 500.0, 0.0, 10.0)
    assert limited.pause_s(0.0, 10.0) == pytest.approx(0.48, abs=0.05)
