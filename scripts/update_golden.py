"""Write tests/golden/codec.json and contexts.json anew: only when the payload format changes on purpose.

Old payloads break then.
"""

import json
from pathlib import Path

import numpy as np

from bitneck.coding.context_codec import ContextCodec
from bitneck.coding.factorized_codec import FactorizedCodec
from bitneck.coding.factorized_model import FactorizedModel
from bitneck_testing.tiny_bundles import contexts

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "codec.json"


def main() -> None:
    cases = []
    rng = np.random.default_rng(20260101)
    for name, shape, scale, margin in (
        ("wide", (6, 2, 2), 20.0, 1),
        ("narrow", (8, 2, 2), 0.4, 1),
        ("one position", (5, 1, 1), 3.0, 2),
        ("7x7", (3, 7, 7), 1.5, 1),
        ("one symbol only: an empty payload", (4, 2, 2), 0.0, 0),
    ):
        train = np.rint(rng.laplace(size=(40, *shape)) * scale).astype(np.int32)
        model = FactorizedModel.fit(train, margin=margin)
        s = train[7]
        cases.append(
            {
                "name": name,
                "lo": model.lo.tolist(),
                "counts": [row.tolist() for row in model.counts],
                "symbols": s.tolist(),
                "payload": FactorizedCodec(model, shape).encode(s).hex(),
            }
        )
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(cases) + "\n")
    coded = []
    for name, shape in (("7x7", (6, 7, 7)), ("3x5", (5, 3, 5)), ("one row", (4, 1, 6))):
        train = np.rint(rng.laplace(size=(40, *shape)) * 2).astype(np.int32)
        model = FactorizedModel.fit(train)
        coded.append(
            {
                "name": name,
                "tables": model.to_npz().hex(),
                "contexts": contexts(model).to_npz().hex(),
                "symbols": train[7].tolist(),
                "payload": ContextCodec(model, contexts(model), shape).encode(train[7]).hex(),
            }
        )
    GOLDEN.with_name("contexts.json").write_text(json.dumps(coded) + "\n")


if __name__ == "__main__":
    main()
