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
CREATE OR REPLACE TRIGGER orders_complete BEFORE INSERT OR UPDATE ON orders FOR EACH ROW
WHEN (cardinality(NEW.entered_at) < NEW.version OR (NEW.failure IS NOT NULL AND NEW.state <> 'FAILED'))
EXECUTE FUNCTION orders_complete();
