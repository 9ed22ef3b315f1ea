"""TLS files that cannot work are refused by name before anything is loaded; with others replies are the same."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest

from dpn_rt import serve
from tests.server.command import serving

FILES = Path(__file__).parent / "tls_files"
BOTH = Path(__file__).parent / "media" / "images_test.pem"


@pytest.mark.parametrize(
    ("certificate", "key", "message"),
    [
        ("nowhere.crt", "valid.key", "nowhere.crt: no such file"),
        ("valid.crt", "nowhere.key", "nowhere.key: no such file"),
        ("valid.key", "valid.crt", "are they swapped?"),
        ("valid.crt", "other.key", "the key is not that of the certificate"),
        ("valid.crt", "valid.crt", "expected a certificate and its key"),
        ("valid.crt", None, "expected a certificate and its key"),
        (None, "valid.key", "without --ssl-certfile"),
        ("valid.crt", "secret.key", "the key has a password"),
        ("expired.crt", "valid.key", "expected one valid now"),
        (str(Path(__file__)), "valid.key", "expected a certificate and its key as PEM files"),
        (".", "valid.key", "a directory, expected a regular file"),
        ("/dev/zero", "valid.key", "--ssl-certfile /dev/zero: a device, expected a regular file"),
        ("valid.crt", "/dev/zero", "--ssl-keyfile /dev/zero: a device, expected a regular file"),
        ("valid.crt", "/dev/null", "/dev/null: a device, expected a regular file"),
    ],
)
def test_files_that_cannot_work(
    capsys: pytest.CaptureFixture[str], certificate: str | None, key: str | None, message: str
) -> None:
    options = [f"--ssl-certfile={FILES / certificate}"] if certificate else []
    options += [f"--ssl-keyfile={FILES / key}"] if key else []
    assert serve.main(["--engine", "nowhere", *options]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: --ssl-") and message in told and "Traceback" not in told


@pytest.mark.parametrize("content", [b"", b"\n" * 10**6, b"\0" * 99, b"-----BEGIN CERTIFICATE-----\n"])
@pytest.mark.parametrize("is_key", [True, False])
def test_empty_and_cut_files(content: bytes, is_key: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / "cut.pem"
    cut.write_bytes(content)
    certificate, key = (FILES / "valid.crt", cut) if is_key else (cut, FILES / "valid.key")
    assert serve.main(["--engine", "nowhere", f"--ssl-certfile={certificate}", f"--ssl-keyfile={key}"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: --ssl-") and "expected a certificate and its key as PEM files" in told


@pytest.mark.parametrize(
    "options",
    [[f"--ssl-certfile={BOTH}"], [f"--ssl-certfile={FILES / 'valid.crt'}", f"--ssl-keyfile={FILES / 'valid.key'}"]],
)
def test_a_server_with_tls(engine_dir: Path, options: list[str]) -> None:
    with serving(engine_dir, *options) as (_, url, _):
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with httpx.Client(base_url=url, verify=context) as client:
            assert client.get("/health").json() == {"status": "ok"}
            assert client.get("/health", headers={"X": "x" * 70_000}).status_code == 431
            assert client.post("/tokenize", json={"prompt": "a"}).status_code == 200
