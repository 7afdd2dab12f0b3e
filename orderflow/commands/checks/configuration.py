"""Are the settings what somebody meant them to be?"""

from __future__ import annotations

from orderflow import listening
from orderflow.commands import environment
from orderflow.commands.checks import Check, ok, problem, warning
from orderflow.settings import Settings, SettingsError

ABOUT = "settings"


def check(settings: Settings) -> list[Check]:
    """Names in the environment that are no setting, and settings that contradict each other."""
    where = environment.given()
    checks = []
    for name, meant in environment.unknown(where).items():
        advice = f"did you mean {meant}?" if meant else "remove it, or see `orderflow settings` for the names"
        checks.append(warning(ABOUT, f"{name} ({where[name]}) is not a setting", advice))
    sasl = settings.kafka_security_protocol.startswith("SASL")
    if sasl and not (settings.kafka_username and settings.kafka_password):
        checks.append(
            problem(
                ABOUT,
                f"{settings.kafka_security_protocol} without a user and a password",
                "set ORDERFLOW_KAFKA_USERNAME and ORDERFLOW_KAFKA_PASSWORD",
            )
        )
    if not sasl and settings.kafka_username:
        checks.append(
            warning(
                ABOUT,
                f"ORDERFLOW_KAFKA_USERNAME is not used with {settings.kafka_security_protocol}",
                "set ORDERFLOW_KAFKA_SECURITY_PROTOCOL to SASL_SSL or SASL_PLAINTEXT",
            )
        )
    if settings.gateway_timeout_ms <= settings.gateway_delay_ms:
        checks.append(
            problem(
                ABOUT,
                f"the gateway takes {settings.gateway_delay_ms} ms and is given {settings.gateway_timeout_ms} ms",
                "raise ORDERFLOW_GATEWAY_TIMEOUT_MS above ORDERFLOW_GATEWAY_DELAY_MS",
            )
        )
    if settings.backoff_base_ms > settings.backoff_cap_ms:
        checks.append(
            warning(
                ABOUT,
                f"backoff starts at {settings.backoff_base_ms} ms and ends at {settings.backoff_cap_ms} ms",
                "raise ORDERFLOW_BACKOFF_CAP_MS",
            )
        )
    checks.extend(_listening(settings))
    set_here = sum(name in where for name in environment.names().values())
    return [ok(ABOUT, f"{set_here} of {len(environment.names())} set in the environment or .env"), *checks]


def _listening(settings: Settings) -> list[Check]:
    """What keeps strangers from the API, and listeners from its keys."""
    try:
        keys = listening.api_keys(settings)
        listening.tls(settings)
    except SettingsError as error:
        name, _, seen = str(error).partition(": ")
        return [problem(ABOUT, f"{name}: {seen}", "`orderflow run` does not start the API like this")]
    if listening.is_loopback(settings.http_host):
        return []
    checks = []
    if not keys:
        seen = f"the API listens on {settings.http_host} and asks for no key"
        checks.append(warning(ABOUT, seen, "make sure that something else keeps strangers out, or set ORDERFLOW_API_KEYS"))
    if not settings.http_certificate_file:
        seen = f"the API listens on {settings.http_host} without TLS"
        checks.append(warning(ABOUT, seen, "end TLS in a proxy beside it, or set ORDERFLOW_HTTP_CERTIFICATE_FILE"))
    return checks
