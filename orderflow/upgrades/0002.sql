-- Legal transitions by another program's plain SQL are accepted: the database completes what they leave out.
ALTER TABLE orders DROP CONSTRAINT orders_failure_explains;
ALTER TABLE orders ADD CONSTRAINT orders_failure_explains
    CHECK (failure IS NULL OR (state = 'FAILED' AND failure IN ('declined', 'error')));

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

-- A failure may be unknown now, and what is NULL is no technical failure.
CREATE OR REPLACE TRIGGER orders_legal_transition BEFORE UPDATE OF state, version ON orders FOR EACH ROW
WHEN (NOT (
    (NEW.state = OLD.state AND NEW.version = OLD.version)
    OR (NEW.version = OLD.version + 1 AND (
           (OLD.state = 'CREATED'         AND NEW.state IN ('PAYMENT_PENDING', 'FAILED'))
        OR (OLD.state = 'PAYMENT_PENDING' AND NEW.state IN ('PAID', 'FAILED'))
        OR (OLD.state = 'FAILED' AND OLD.failure IS NOT DISTINCT FROM 'error' AND NEW.state = 'PAYMENT_PENDING')))
)) EXECUTE FUNCTION orders_refuse_transition();

ALTER TABLE idempotency_keys SET (autovacuum_vacuum_insert_scale_factor = 0.05);
ALTER TABLE gateway_charges SET (autovacuum_vacuum_insert_scale_factor = 0.05);
