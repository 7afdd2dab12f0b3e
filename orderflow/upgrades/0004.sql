-- Retention: which orders' events, deliveries and charges were deleted.
ALTER TABLE orders ADD COLUMN retired_at timestamptz;
-- The circuit breaker of the gateway, shared by all workers.
CREATE TABLE circuits (
    name      text        PRIMARY KEY,
    state     text        NOT NULL CHECK (state IN ('closed', 'open', 'half-open')),
    opened_at timestamptz NOT NULL DEFAULT now(),
    due_at    timestamptz NOT NULL,
    -- Claimed since it was opened. A probe's end names its own number: one that outlived its claim decides nothing.
    probes    integer     NOT NULL DEFAULT 0,
    worker_id text
) WITH (fillfactor = 20);

-- The simulated gateway can be unavailable.
ALTER TABLE gateway_control DROP CONSTRAINT gateway_control_mode_check;
ALTER TABLE gateway_control ADD CONSTRAINT gateway_control_mode_check
    CHECK (mode IN ('random', 'succeed', 'decline', 'error', 'timeout', 'hang', 'unavailable'));

-- Behind what later events of an aggregate wait, where a handler asks for that.
CREATE TABLE held_aggregates (
    aggregate_id uuid   NOT NULL,
    seq          bigint NOT NULL,
    event_id     uuid   NOT NULL,
    PRIMARY KEY (aggregate_id, seq)
);
