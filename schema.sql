-- orderflow: the whole current schema. Safe to run again; `orderflow migrate` runs it and records its version.
--
-- Two rules shape it. An order and its event commit together (outbox), and a consumed event and what it
-- changed commit together (processed_events). Everything else in the program may die at any moment.
--
-- Two more shape its speed. What changes often stands in no index, so that PostgreSQL writes the new version of a row beside the
-- old one and touches no index (a HOT update, half the cost of another one): the fill factors leave room for it, no index
-- mentions `published_at`, and that of the orders in flight goes by a column of its own. And what is read all day is read by key.
--
-- Autovacuum, a table at a time. Updated in place (orders, outbox): early and unthrottled. Inserted into only
-- (processed_events, idempotency_keys, gateway_charges): early by inserts, so that pages are marked all-visible and frozen
-- while they are few and still in memory, and the anti-joins and look-ups by key stay on their index. The two small tables
-- (dead_letter_events, gateway_control) keep the defaults.

CREATE TABLE IF NOT EXISTS schema_version (
    version    integer     PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- ---------------------------------------------------------------------------------------------------- orders
-- State and version move together, one step a transition, each UPDATE guarded by both:
--   CREATED (1) -> PAYMENT_PENDING (2) -> PAID (3) | FAILED (3);  CREATED (1) -> FAILED (2) when no charge ever began;
--   FAILED -> PAYMENT_PENDING only by a redrive, and only of a technical failure (never of a decline).
CREATE TABLE IF NOT EXISTS orders (
    id         uuid          PRIMARY KEY,
    user_id    uuid          NOT NULL,
    state      text          NOT NULL DEFAULT 'CREATED',
    version    integer       NOT NULL DEFAULT 1,
    amount     numeric(12,2) NOT NULL,
    -- Why a FAILED order failed: 'declined' is the gateway's answer and final, 'error' is technical and may be redriven.
    failure    text,
    created_at timestamptz   NOT NULL DEFAULT now(),
    updated_at timestamptz   NOT NULL DEFAULT now(),
    -- entered_at[v] is when version v began; the states between follow from (state, version) alone, see orders/model.py.
    entered_at timestamptz[] NOT NULL DEFAULT ARRAY[now()],
    -- When retention deleted its events, their deliveries and its charges, all of them at once; NULL while they are kept.
    retired_at timestamptz,
    -- What the index of the orders in flight goes by: unlike `state`, it changes once in an order's life.
    in_flight  boolean       NOT NULL GENERATED ALWAYS AS (state IN ('CREATED', 'PAYMENT_PENDING')) STORED,
    CONSTRAINT orders_state_known      CHECK (state IN ('CREATED', 'PAYMENT_PENDING', 'PAID', 'FAILED')),
    CONSTRAINT orders_version_fits     CHECK (CASE state WHEN 'CREATED' THEN version = 1
                                                         WHEN 'PAID'    THEN version >= 3
                                                         ELSE version >= 2 END),
    -- NaN is greater than every number in PostgreSQL.
    CONSTRAINT orders_amount_positive  CHECK (amount > 0 AND amount <> 'NaN'),
    -- NULL on a FAILED order: another program has failed it by plain SQL, and nothing here will redrive it.
    CONSTRAINT orders_failure_explains CHECK (failure IS NULL OR (state = 'FAILED' AND failure IN ('declined', 'error'))),
    CONSTRAINT orders_history_complete CHECK (cardinality(entered_at) = version)
) WITH (fillfactor = 60, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_insert_scale_factor = 0.05,
        autovacuum_vacuum_cost_delay = 1); -- ms: the default of 2 falls behind two updates an order

-- GET /orders: newest first by keyset. Creation time never changes, so a transition leaves this index alone.
CREATE INDEX IF NOT EXISTS orders_newest ON orders (created_at DESC, id DESC);
-- The few orders in flight: what the reconciler and `doctor` look for must not cost a scan of the many that ended.
CREATE INDEX IF NOT EXISTS orders_in_flight ON orders (created_at DESC, id DESC) WHERE in_flight;

CREATE OR REPLACE FUNCTION orders_refuse_transition() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'order % cannot go from % (version %) to % (version %)',
        OLD.id, OLD.state, OLD.version, NEW.state, NEW.version
        USING ERRCODE = 'check_violation', CONSTRAINT = 'orders_legal_transition',
              HINT = 'legal: CREATED -> PAYMENT_PENDING -> PAID or FAILED, CREATED -> FAILED, technically FAILED -> PAYMENT_PENDING; version + 1 each';
END $$;

-- What another program's plain SQL leaves out: the times of the transitions that it makes, and the end of a failure.
CREATE OR REPLACE FUNCTION orders_complete() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.entered_at := NEW.entered_at || array_fill(now(), ARRAY[greatest(0, NEW.version - cardinality(NEW.entered_at))]);
    IF TG_OP = 'UPDATE' AND NEW.state <> 'FAILED' THEN
        NEW.failure := NULL;
    END IF;
    RETURN NEW;
END $$;
-- Its name comes after orders_legal_transition: triggers fire by name, and what is refused needs no completing.
CREATE OR REPLACE TRIGGER orders_times_complete BEFORE INSERT OR UPDATE ON orders FOR EACH ROW
WHEN (cardinality(NEW.entered_at) < NEW.version OR (NEW.failure IS NOT NULL AND NEW.state <> 'FAILED'))
EXECUTE FUNCTION orders_complete();

-- The WHEN clause is evaluated without entering PL/pgSQL: a legal transition pays for a comparison, not for a call.
CREATE OR REPLACE TRIGGER orders_legal_transition BEFORE UPDATE OF state, version ON orders FOR EACH ROW
WHEN (NOT (
    (NEW.state = OLD.state AND NEW.version = OLD.version)
    OR (NEW.version = OLD.version + 1 AND (
           (OLD.state = 'CREATED'         AND NEW.state IN ('PAYMENT_PENDING', 'FAILED'))
        OR (OLD.state = 'PAYMENT_PENDING' AND NEW.state IN ('PAID', 'FAILED'))
        OR (OLD.state = 'FAILED' AND OLD.failure IS NOT DISTINCT FROM 'error' AND NEW.state = 'PAYMENT_PENDING')))
)) EXECUTE FUNCTION orders_refuse_transition();

-- ---------------------------------------------------------------------------------------------------- outbox
-- The one durable home of an event. Publishing, retrying, redriving, reconciling and replaying are one act:
-- make the row due (again). Who moves a row: the relay sets published_at after Kafka's acknowledgement; a failed
-- attempt, a redrive or a replay clears it.
CREATE TABLE IF NOT EXISTS outbox (
    event_id       uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    event_type     text        NOT NULL,
    aggregate_type text        NOT NULL DEFAULT 'order',
    aggregate_id   uuid        NOT NULL,
    payload        jsonb       NOT NULL DEFAULT '{}',
    created_at     timestamptz NOT NULL DEFAULT now(),
    published_at   timestamptz,
    -- NULL on the many that are published once, in the order of `seq`. Otherwise the row is to be published (again), not before
    -- this time; 'infinity': buried, no relay will touch it.
    available_at   timestamptz,
    -- Rises with every failed attempt, postponement and redrive; a delivery that carries a smaller one is a duplicate.
    attempt        integer     NOT NULL DEFAULT 1,
    -- Attempts are counted from here; a redrive moves it up, which is what gives the event fresh ones, and a postponement by as
    -- much as `attempt`, which uses up none.
    first_attempt  integer     NOT NULL DEFAULT 1,
    -- One object for each failed attempt: {"attempt", "at", "error", "message"}. NULL on the many that never failed.
    failures       jsonb,
    -- What the event carries besides its payload, such as the traceparent of the request that caused it.
    headers        jsonb,
    -- Order within an aggregate: assigned under the lock of the order's row, so it follows the order of transitions. Never with
    -- a CACHE: a session would hand out numbers that it took before it locked the table (see outbox_low_water).
    seq            bigint      GENERATED ALWAYS AS IDENTITY,
    shard          smallint    NOT NULL GENERATED ALWAYS AS ((uuid_hash(aggregate_id) & 31)::smallint) STORED,
    CONSTRAINT outbox_attempt_counts CHECK (first_attempt >= 1 AND attempt >= first_attempt),
    -- PostgreSQL's calendar is wider than Python's and JSON's: one row outside of theirs would stop every relay.
    CONSTRAINT outbox_created_at_is_a_time CHECK (created_at >= '0001-01-02' AND created_at < '9999-12-31')
) WITH (fillfactor = 45, autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 5000,
        autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05,
        autovacuum_vacuum_cost_delay = 0);

-- Each shard in order: what is published for the first time, from the low-water mark on. Not partial: the mark of a row that
-- was published would have to move through every index of the table.
CREATE INDEX IF NOT EXISTS outbox_log ON outbox (shard, seq);
-- What is to be published again: kept apart, so that a million waiting retries cost a fetch nothing.
CREATE INDEX IF NOT EXISTS outbox_scheduled ON outbox (available_at, seq) WHERE available_at < 'infinity';
-- One order's timeline, and the audit.
CREATE INDEX IF NOT EXISTS outbox_aggregate ON outbox (aggregate_id, seq);
-- Replay and reconciliation by time: a block range index costs an insert next to nothing.
CREATE INDEX IF NOT EXISTS outbox_created ON outbox USING brin (created_at) WITH (pages_per_range = 32, autosummarize = on);

-- Behind this number, nothing of the shard waits for its first publication: all of it is published, buried, or scheduled. The
-- shard's relay moves it up, only past numbers that no open transaction can still bring (outbox.fence), so that no row is
-- lost whose number is smaller and whose commit is later than those of its neighbours. It may lag; it never leads.
CREATE TABLE IF NOT EXISTS outbox_low_water (
    shard smallint PRIMARY KEY,
    seq   bigint   NOT NULL
) WITH (fillfactor = 20);

-- A row behind the low-water mark is found by its schedule alone: whoever makes it unpublished again, schedules it.
CREATE OR REPLACE FUNCTION outbox_schedule() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.available_at := least(NEW.created_at, now());
    RETURN NEW;
END $$;
CREATE OR REPLACE TRIGGER outbox_schedule BEFORE UPDATE OF published_at, available_at ON outbox FOR EACH ROW
WHEN (NEW.published_at IS NULL AND NEW.available_at IS NULL AND (OLD.published_at IS NOT NULL OR OLD.available_at IS NOT NULL))
EXECUTE FUNCTION outbox_schedule();

-- Wakes the relay whoever commits the row. Once a statement, not once a row: a commit with a notification takes an
-- instance-wide lock, and PostgreSQL folds equal notifications of one transaction into one.
CREATE OR REPLACE FUNCTION outbox_wake() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('orderflow_outbox', '');
    RETURN NULL;
END $$;
CREATE OR REPLACE TRIGGER outbox_wake AFTER INSERT ON outbox FOR EACH STATEMENT EXECUTE FUNCTION outbox_wake();

-- ------------------------------------------------------------------------------------------ what was consumed
-- Written in the transaction of the change that the event caused: whatever Kafka delivers again, the row decides.
CREATE TABLE IF NOT EXISTS processed_events (
    event_id     uuid        PRIMARY KEY,
    worker_id    text        NOT NULL,
    processed_at timestamptz NOT NULL DEFAULT now()
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);

-- Events that nobody will try again by themselves. A row leaves by redrive (deleted, the outbox row made due) and stays
-- when discarded, with the reason, until retention deletes it. An undecodable message has no event of ours: its id is derived
-- from its place in Kafka.
CREATE TABLE IF NOT EXISTS dead_letter_events (
    event_id       uuid        PRIMARY KEY,
    event_type     text,
    aggregate_id   uuid,
    payload        jsonb,
    reason         text        NOT NULL,
    failed_at      timestamptz NOT NULL DEFAULT now(),
    error_class    text,
    error_message  text,
    attempts       jsonb       NOT NULL DEFAULT '[]',
    headers        jsonb,
    topic          text,
    partition      integer,
    "offset"       bigint,
    raw            bytea,
    worker_id      text,
    discarded_at   timestamptz,
    discard_reason text,
    CONSTRAINT dead_letter_discard_explains CHECK ((discarded_at IS NULL) = (discard_reason IS NULL))
);
CREATE INDEX IF NOT EXISTS dead_letter_open ON dead_letter_events (failed_at DESC, event_id) WHERE discarded_at IS NULL;
CREATE INDEX IF NOT EXISTS dead_letter_aggregate ON dead_letter_events (aggregate_id);

-- Behind what later events of an aggregate wait, where a handler asks for that: its events that are retried, postponed, or buried.
-- Usually empty. A row leaves when its event is processed or discarded; one that outlived that holds nothing any more.
CREATE TABLE IF NOT EXISTS held_aggregates (
    aggregate_id uuid   NOT NULL,
    seq          bigint NOT NULL,
    event_id     uuid   NOT NULL,
    PRIMARY KEY (aggregate_id, seq)
);

-- ---------------------------------------------------------------------------------------------- circuit breakers
-- Whom no worker asks for the time being, because there was no answer. A row for each party outside, none until it first
-- happens. Who moves it: `failures` calls in a row of one worker open it; whoever comes first when `due_at` has come claims the
-- probe (half-open); the probe's end closes it or opens it for longer. A claim whose worker died is claimed again at `due_at`.
CREATE TABLE IF NOT EXISTS circuits (
    name      text        PRIMARY KEY,
    state     text        NOT NULL CHECK (state IN ('closed', 'open', 'half-open')),
    opened_at timestamptz NOT NULL DEFAULT now(),
    due_at    timestamptz NOT NULL,
    -- Claimed since it was opened. A probe's end names its own number: one that outlived its claim decides nothing.
    probes    integer     NOT NULL DEFAULT 0,
    worker_id text
) WITH (fillfactor = 20);

-- ------------------------------------------------------------------------------------------- continuous auditor
-- What it has found last, for every process to show. Who moves it: the elected process, after each of its turns.
CREATE TABLE IF NOT EXISTS audit_result (
    only_row   boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    audited_at timestamptz NOT NULL DEFAULT now(),
    process    text        NOT NULL,
    orders     integer     NOT NULL,
    -- {invariant: how many orders are known of which it does not hold}
    violations jsonb       NOT NULL
) WITH (fillfactor = 20);

-- ------------------------------------------------------------------------------------------- idempotency keys
CREATE TABLE IF NOT EXISTS idempotency_keys (
    key          text        PRIMARY KEY,
    request_hash bytea       NOT NULL,
    order_id     uuid        NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT idempotency_key_length CHECK (length(key) BETWEEN 1 AND 255)
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);

-- ------------------------------------------------------------------------------------- the simulated gateway
-- Stands for a system that is not ours: nothing of the order flow joins it but `audit`, `explain` and retention. One charge a
-- reference and a key, which is what a real gateway's idempotency promises and what makes a double charge visible.
CREATE TABLE IF NOT EXISTS gateway_charges (
    id              uuid          NOT NULL,
    idempotency_key text          PRIMARY KEY,
    reference       uuid          NOT NULL,
    amount          numeric(12,2) NOT NULL,
    status          text          NOT NULL CHECK (status IN ('settled', 'declined')),
    created_at      timestamptz   NOT NULL DEFAULT now()
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);
CREATE INDEX IF NOT EXISTS gateway_charges_reference ON gateway_charges (reference);

CREATE TABLE IF NOT EXISTS gateway_control (
    only_row   boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    mode       text        NOT NULL CHECK (mode IN ('random', 'succeed', 'decline', 'error', 'timeout', 'hang',
                                                        'unavailable')),
    changed_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO gateway_control (mode) VALUES ('random') ON CONFLICT DO NOTHING;
