-- Updates that touch no index: the outbox is read from a low-water mark, and a transition within an order's flight is no longer
-- a change of the index of the orders in flight. Locks and rewrites both tables: some minutes for ten million orders.
LOCK TABLE outbox, orders IN ACCESS EXCLUSIVE MODE;

ALTER TABLE orders SET (fillfactor = 60);
DROP INDEX orders_in_flight;
ALTER TABLE orders ADD COLUMN in_flight boolean NOT NULL GENERATED ALWAYS AS (state IN ('CREATED', 'PAYMENT_PENDING')) STORED;
CREATE INDEX orders_in_flight ON orders (created_at DESC, id DESC) WHERE in_flight;

ALTER TABLE outbox SET (fillfactor = 45);
CREATE INDEX outbox_log ON outbox (shard, seq);
CREATE TABLE outbox_low_water (
    shard smallint PRIMARY KEY,
    seq   bigint   NOT NULL
) WITH (fillfactor = 20);
-- Exact, as nobody else is writing: under the lock above no transaction can hold a number that is not to be seen yet.
INSERT INTO outbox_low_water (shard, seq)
SELECT shard, coalesce(min(seq) FILTER (WHERE published_at IS NULL AND available_at IS NULL) - 1, max(seq))
FROM outbox GROUP BY shard;
DROP INDEX outbox_due;
DROP INDEX outbox_scheduled;
CREATE INDEX outbox_scheduled ON outbox (available_at, seq) WHERE available_at < 'infinity';

CREATE FUNCTION outbox_schedule() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.available_at := least(NEW.created_at, now());
    RETURN NEW;
END $$;
CREATE TRIGGER outbox_schedule BEFORE UPDATE OF published_at, available_at ON outbox FOR EACH ROW
WHEN (NEW.published_at IS NULL AND NEW.available_at IS NULL AND (OLD.published_at IS NOT NULL OR OLD.available_at IS NOT NULL))
EXECUTE FUNCTION outbox_schedule();

ALTER TABLE gateway_charges DROP CONSTRAINT gateway_charges_pkey;
ALTER TABLE gateway_charges DROP CONSTRAINT gateway_charges_idempotency_key_key;
ALTER TABLE gateway_charges ADD PRIMARY KEY (idempotency_key);
