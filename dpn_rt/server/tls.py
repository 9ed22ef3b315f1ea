"""TLS files, checked before anything is loaded: by a handshake with themselves."""

from __future__ import annotations

import ssl
from pathlib import Path

from dpn_rt.errors import ConfigError
from dpn_rt.schema.files import TEXT_BYTES, is_there, read_file

_EXPIRED, _NOT_YET = 10, 9
"""OpenSSL's codes: X509_V_ERR_CERT_HAS_EXPIRED, X509_V_ERR_CERT_NOT_YET_VALID."""


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """Checks the files of a server's certificate and its key; None for both without TLS.

    Raises:
        ConfigError: a file is missing or is something else, the two do not belong together, or the certificate is not
            valid now.
    """
    if certificate is None:
        if key is not None:
            raise ConfigError("--ssl-keyfile without --ssl-certfile: expected the certificate as well")
        return
    for path, option in ((certificate, "--ssl-certfile"), (key, "--ssl-keyfile")):
        if path is not None and not is_there(path):
            raise ConfigError(f"{option} {path}: no such file")
        if path is not None:
            try:
                read_file(path, ConfigError, TEXT_BYTES)
            except ConfigError as error:
                raise ConfigError(f"{option} {error}") from error
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    names = f"--ssl-certfile {certificate}, --ssl-keyfile {key or certificate}"
    try:
        server.load_cert_chain(certificate, key, password=_no_password)
    except _PasswordError:
        raise ConfigError(f"{names}: the key has a password, expected one without") from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{names}: the key is not that of the certificate") from None
        raise ConfigError(
            f"{names}: expected a certificate and its key as PEM files, or one file with both (are they swapped?)"
        ) from None
    except OSError as error:
        raise ConfigError(f"{names}: cannot be read: {error.strerror}") from None
    _check_dates(server, certificate)


class _PasswordError(Exception):
    """A key asks for a password."""


def _no_password() -> str:
    """Instead of a question on the terminal."""
    raise _PasswordError


def _check_dates(server: ssl.SSLContext, certificate: Path) -> None:
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it need not be a root to be trusted here
    client.load_verify_locations(certificate)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    try:
        for _ in range(3):
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in (_EXPIRED, _NOT_YET):
            when = "has expired" if error.verify_code == _EXPIRED else "is not valid yet"
            raise ConfigError(f"--ssl-certfile {certificate}: the certificate {when}: expected one valid now") from None
    except ssl.SSLError:
        pass  # other faults are between it and its clients, such as a chain that they know
