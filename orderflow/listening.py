"""How a process listens: its API keys and its TLS certificate, and what is refused before it begins."""

from __future__ import annotations

import ssl
from ipaddress import ip_address
from pathlib import Path

from orderflow.orders.api_keys import ApiKeys, WrongKeys
from orderflow.settings import Settings, SettingsError


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`; a name other than localhost may be anything."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def api_keys(settings: Settings) -> ApiKeys:
    """The keys that the API asks for; none at all: it asks for none.

    Raises SettingsError for keys that cannot be read, and where everybody could reach an API that asks for none.
    """
    name = "ORDERFLOW_API_KEYS"
    try:
        entries = settings.api_keys
        if entries.startswith("@"):
            entries = Path(entries[1:]).read_text(encoding="utf-8")
        keys = ApiKeys(entries, settings.api_key_rate)
    except OSError as error:
        raise SettingsError(f"{name}: {settings.api_keys[1:]} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{name}: {settings.api_keys[1:]} is not a text") from None
    except WrongKeys as error:
        raise SettingsError(f"{name}: {error}") from None
    if settings.api_keys and not keys:
        raise SettingsError(f"{name}: there is no key in it; `orderflow keys new NAME` makes one")
    if not keys and not settings.allow_anonymous and not is_loopback(settings.http_host):
        raise SettingsError(
            f"ORDERFLOW_HTTP_HOST: {settings.http_host!r} can be reached from other machines, and the API asks for no key: "
            f"set {name} (`orderflow keys new NAME` makes one), or ORDERFLOW_ALLOW_ANONYMOUS=true where something else "
            "keeps strangers out"
        )
    return keys


def tls(settings: Settings) -> ssl.SSLContext | None:
    """What HTTPS is spoken with, TLS 1.2 or later; None for plain HTTP.

    Raises SettingsError that names the setting whose file cannot be used.
    """
    certificate, key = settings.http_certificate_file, settings.http_key_file
    if not certificate:
        if key:
            raise SettingsError("ORDERFLOW_HTTP_KEY_FILE: is of no use without ORDERFLOW_HTTP_CERTIFICATE_FILE")
        return None
    for name, file in (("ORDERFLOW_HTTP_CERTIFICATE_FILE", certificate), ("ORDERFLOW_HTTP_KEY_FILE", key)):
        try:
            if file:
                Path(file).read_bytes()
        except OSError as error:
            raise SettingsError(f"{name}: {file} cannot be read: {error.strerror}") from None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # The empty pass phrase: otherwise OpenSSL would ask for one on the terminal.
        context.load_cert_chain(certificate, key or None, password=lambda: b"")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise SettingsError("ORDERFLOW_HTTP_KEY_FILE: is not the key of ORDERFLOW_HTTP_CERTIFICATE_FILE") from None
        raise SettingsError(
            "ORDERFLOW_HTTP_CERTIFICATE_FILE: must be a certificate chain in PEM form, with its private key there or in "
            "ORDERFLOW_HTTP_KEY_FILE, which must not need a pass phrase"
        ) from None
    return context
