"""Operating points with contexts, from a device to a server and back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitneck.bundle import Bundle
from bitneck.chain import PointDecoder
from bitneck.coding.context_codec import ContextCodec
from bitneck.coding.context_model import ContextModel
from bitneck.coding.factorized_codec import FactorizedCodec
from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import BundleCorrupt
from bitneck_edge.answers.results import Answer
from bitneck_edge.client import EdgeClient
from bitneck_testing.photographs import photo
from bitneck_testing.processes import running_server
from bitneck_testing.streams import Frames
from bitneck_testing.tiny_bundles import make_tiny_bundle

POINTS = ("s1-r1", "s1-r2", "s2-r1")


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its points are those of the other bundle, and two of them have contexts."""
    return make_tiny_bundle(tmp_path_factory.mktemp("contexts") / "bundle", contextual=("s1-r2", "s2-r1"))


async def test_a_server_gives_the_same_answers(coded: Bundle, tiny_bundle: Bundle, tmp_path: Path) -> None:
    found = []
    for bundle in (tiny_bundle, coded):
        with running_server(bundle.root) as server:
            async with EdgeClient(server.grpc, cache_dir=tmp_path / bundle.bundle_id, threads=1, in_flight=1) as it:
                answers = []
                for k in range(9):
                    it.point = POINTS[k % 3]
                    answers.append(await it.infer(photo(k)))
        found.append(answers)
    assert all(isinstance(answer, Answer) for answers in found for answer in answers)
    assert [a.symbols_crc32c for a in found[0]] == [a.symbols_crc32c for a in found[1]]
    assert [a.labels for a in found[0]] == [a.labels for a in found[1]]
    assert {a.point for a in found[1]} == set(POINTS)


def test_each_point_has_the_codec_of_its_files(coded: Bundle, tiny_bundle: Bundle) -> None:
    for bundle, expected in ((tiny_bundle, FactorizedCodec), (coded, ContextCodec)):
        point = bundle.manifest.ladder["s1-r2"]
        assert isinstance(PointDecoder(bundle, point).codec, expected)
    plain, frames = Frames(tiny_bundle), Frames(coded)
    for k in range(5):
        symbols = [each.decoders["s2-r1"].symbols(each.payload("s2-r1", k)) for each in (plain, frames)]
        np.testing.assert_array_equal(*symbols)
    for side in ("edge", "cloud"):
        assert "points/s2-r1/contexts.npz" in coded.manifest.files_for(side)  # type: ignore[arg-type]
    assert "points/s2-r1/contexts.npz" in coded.manifest.files_of("s2-r1", "float32")


GOLDEN = json.loads((Path(__file__).parent / "golden" / "contexts.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_payloads_are_as_they_were(case: dict[str, Any]) -> None:
    """What one version of a device writes, another version of a server reads."""
    tables = FactorizedModel.from_npz(bytes.fromhex(case["tables"]))
    contexts = ContextModel.from_npz(bytes.fromhex(case["contexts"]))
    s = np.array(case["symbols"], dtype=np.int32)
    codec = ContextCodec(tables, contexts, s.shape)  # type: ignore[arg-type]
    assert codec.encode(s).hex() == case["payload"]
    np.testing.assert_array_equal(codec.decode(bytes.fromhex(case["payload"])), s)


def test_contexts_of_other_tables_are_refused(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "bundle", contextual=("s1-r2", "s2-r1"))
    other = bundle.path("points/s2-r1/contexts.npz").read_bytes()
    bundle.path("points/s1-r2/contexts.npz").write_bytes(other)
    with pytest.raises(BundleCorrupt, match="contexts of 6 channels, the tables have 8"):
        bundle.contexts("s1-r2", bundle.tables("s1-r2"))
