-- What the continuous auditor has found last, for every process to show.
CREATE TABLE audit_result (
    only_row   boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    audited_at timestamptz NOT NULL DEFAULT now(),
    process    text        NOT NULL,
    orders     integer     NOT NULL,
    -- {invariant: how many orders are known of which it does not hold}
    violations jsonb       NOT NULL
) WITH (fillfactor = 20);
