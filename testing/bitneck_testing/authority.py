"""Certificates for tests of TLS, made by an authority that nobody else trusts."""

import datetime
from collections.abc import Sequence
from pathlib import Path

import trustme

__all__ = ["Authority"]


class Authority:
    """A certificate authority of its own, and files of its certificates.

    Args:
        root: folder for the files; it is made.

    Attributes:
        ca: PEM file of the authority's certificate.
    """

    def __init__(self, root: Path) -> None:
        self._authority = trustme.CA()
        self._root = root
        root.mkdir(parents=True, exist_ok=True)
        self.ca = root / "ca.pem"
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(self, name: str, days: float = 1.0, hosts: Sequence[str] = ()) -> tuple[Path, Path]:
        """A certificate for loopback and its key, as PEM files.

        Args:
            name: common name, and name of the files.
            days: from now until it ends; below 0 for one that has ended.
            hosts: that it is for too.
        """
        now = datetime.datetime.now(datetime.UTC)
        issued = self._authority.issue_cert(
            "localhost",
            "127.0.0.1",
            *hosts,
            common_name=name,
            not_before=now - datetime.timedelta(days=2),
            not_after=now + datetime.timedelta(days=days),
        )
        cert, key = self._root / f"{name}.pem", self._root / f"{name}.key"
        issued.cert_chain_pems[0].write_to_path(cert)
        issued.private_key_pem.write_to_path(key)
        return cert, key
