"""What goes over the wire, as pydantic models: they validate the request and make up /openapi.json."""

from __future__ import annotations

import re
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic.alias_generators import to_camel

from orderflow.engine.ids import parse_id
from orderflow.orders.amounts import LARGEST, SMALLEST, parse_amount
from orderflow.orders.body import printable
from orderflow.orders.model import Failure, State
from orderflow.orders.problems import Problem, fields_wrong

MOST_ERRORS = 10

_UUID = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")


def parse_uuid(value: Any) -> UUID:
    """A UUID in its 36-character form; parse_id takes misplaced hyphens as well. Raises ValueError."""
    if not isinstance(value, str) or _UUID.fullmatch(value) is None:
        raise ValueError("must be a UUID such as 3f0c8a52-6d1e-4b7f-9a43-0c5d2e8f7b61")
    return parse_id(value)


Id = Annotated[UUID, BeforeValidator(parse_uuid), WithJsonSchema({"type": "string", "format": "uuid"})]
AmountIn = Annotated[
    Decimal,
    BeforeValidator(parse_amount),
    WithJsonSchema({
        "description": "0.01 to 9999999999.99, at most two decimals, as a number or a decimal string; kept exact.",
        "anyOf": [
            {"type": "number", "minimum": float(SMALLEST), "maximum": float(LARGEST), "multipleOf": 0.01},
            {"type": "string", "pattern": r"^(?!0+(\.0+)?$)[0-9]{1,10}(\.[0-9]{1,2})?$"},
        ],
    }),
]  # fmt: skip
AmountOut = Annotated[str, Field(pattern=r"^[0-9]{1,10}\.[0-9]{2}$", examples=["299.99"])]


class Wire(BaseModel):
    """Names in camelCase on the wire."""

    model_config = ConfigDict(alias_generator=to_camel, frozen=True)


class PlaceOrder(Wire):
    """A new order."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"userId": "3f0c8a52-6d1e-4b7f-9a43-0c5d2e8f7b61", "amount": "299.99"}]},
    )

    user_id: Id
    amount: AmountIn


class OrderPlaced(Wire):
    """The order as it was placed: it and its event are durable."""

    order_id: UUID
    state: Literal["CREATED"]
    version: Literal[1]
    user_id: UUID
    amount: AmountOut
    created_at: datetime


class OrderView(Wire):
    """An order as it is now. `failure` says why a FAILED one failed."""

    id: UUID
    user_id: UUID
    state: State
    version: Annotated[int, Field(ge=1)]
    amount: AmountOut
    failure: Failure | None
    created_at: datetime
    updated_at: datetime


class OrderPage(Wire):
    """Orders, newest first; `next` is what `after` takes for the page that follows, null on the last."""

    orders: list[OrderView]
    next: str | None


class Transition(Wire):
    """When a version of the order began, and its state then."""

    state: State
    version: Annotated[int, Field(ge=1)]
    at: datetime


class FailedAttempt(Wire):
    """One failed attempt at handling an event."""

    attempt: int
    at: datetime
    error: str
    message: str


class EventView(Wire):
    """An event of the order, and what became of it."""

    event_id: UUID
    event_type: str
    payload: Any
    created_at: datetime
    published_at: datetime | None
    processed_at: datetime | None
    worker_id: str | None
    attempt: Annotated[int, Field(ge=1)]
    failures: list[FailedAttempt]
    buried_at: datetime | None
    reason: str | None


class Timeline(Wire):
    """The order's transitions and events, oldest first. `retiredAt`: when its events were deleted, for their age."""

    order_id: UUID
    transitions: list[Transition]
    events: list[EventView]
    retired_at: datetime | None


class DependencyState(Wire):
    """How a dependency was found."""

    state: Literal["up", "down"]
    detail: str


class Audited(Wire):
    """What the continuous auditor knows: violations by invariant, the orders of its last turn, its time, and its process."""

    violations: Annotated[int, Field(ge=0)]
    by_invariant: dict[str, Annotated[int, Field(ge=0)]]
    orders: Annotated[int, Field(ge=0)]
    at: datetime
    process: str


class Live(Wire):
    """The process runs."""

    status: Literal["live"]


class Ready(Wire):
    """The process takes requests."""

    status: Literal["ready"]
    dependencies: dict[str, DependencyState]
    audit: Audited | None = None


class FieldError(Wire):
    """A field, header or parameter that is wrong, and what it may be."""

    field: str
    message: str


class ProblemDocument(Wire):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None


class FieldProblem(ProblemDocument):
    """A problem that names each field that is wrong."""

    errors: list[FieldError]


class DatabaseProblem(ProblemDocument):
    """`orderId` is there when a commit was under way: the order has this id if it was placed."""

    order_id: UUID | None = None


class NotReady(ProblemDocument):
    """Why the process takes no requests."""

    state: Literal["starting", "draining", "unavailable"]
    dependencies: dict[str, DependencyState]
    audit: Audited | None = None


_NAMES: Final = {"userId", "amount"}


def place_order(document: Any) -> tuple[UUID, Decimal]:
    """User id and amount of a valid request. Raises Problem (422) that names every wrong field, ten at the most."""
    if isinstance(document, dict) and document.keys() == _NAMES:
        try:
            return parse_uuid(document["userId"]), parse_amount(document["amount"])
        except ValueError:
            pass  # the model says everything that is wrong, and not only the first thing
    try:
        order = PlaceOrder.model_validate(document)
        return order.user_id, order.amount
    except ValidationError as error:
        raise _problem(error) from None


def _problem(error: ValidationError) -> Problem:
    wrong = []
    for found in error.errors(include_url=False, include_input=False, include_context=False)[:MOST_ERRORS]:
        field = ".".join(printable(str(part)) for part in found["loc"]) or "body"
        match found["type"]:
            case "missing":
                message = "is required"
            case "extra_forbidden":
                message = "is not a field of this request"
            case "model_type" | "model_attributes_type":
                message = "must be a JSON object with userId and amount"
            case "string_unicode":
                message = "has a name that is not Unicode"
            case _:
                message = found["msg"].removeprefix("Value error, ")
        wrong.append((field, message))
    return fields_wrong(wrong)
