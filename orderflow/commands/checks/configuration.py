"""Are the settings what somebody meant them to be?"""

from __future__ import annotations

from orderflow.commands import environment
from orderflow.commands.checks import Check, ok, problem, warning
from orderflow.settings import Settings

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
    set_here = sum(name in where for name in environment.names().values())
    return [ok(ABOUT, f"{set_here} of {len(environment.names())} set in the environment or .env"), *checks]
