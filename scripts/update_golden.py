"""Write tests/golden/codec.json anew: only when the payload format changes on purpose, since old payloads break."""

import json
from pathlib import Path

import numpy as np

from bitneck.coding.factorized_codec import FactorizedCodec
from bitneck.coding.factorized_model import FactorizedModel

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


if __name__ == "__main__":
    main()
