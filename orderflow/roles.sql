-- Two roles and their rights in this database: `orderflow migrate --roles` runs this, and every later migration renews it.
--
--   orderflow_app    what `orderflow run` and the commands do, and nothing else: no DROP, ALTER or TRUNCATE, no order deleted,
--                    no trigger switched off; what belongs to an order is deleted by retention alone
--   orderflow_read   for people: SELECT
--
-- Nobody logs in as these; who logs in is their member: CREATE ROLE shop LOGIN PASSWORD '...' IN ROLE orderflow_app;
-- Roles belong to the whole server. Who runs this owns the tables, and may create roles where these are not there yet.
--
-- Beside the tables nothing needs a right: LISTEN, NOTIFY and advisory locks are anybody's, a trigger's function runs whoever
-- fires it, and the numbers of an identity column are given with the INSERT.

DO $$
DECLARE wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['orderflow_app', 'orderflow_read'] LOOP
        IF to_regrole(wanted) IS NULL THEN
            EXECUTE format('CREATE ROLE %I NOLOGIN', wanted);
        END IF;
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', current_schema(), wanted);
    END LOOP;
END $$;

-- What an earlier version gave and this one does not need.
REVOKE ALL ON schema_version, orders, outbox, outbox_low_water, processed_events, dead_letter_events, idempotency_keys,
              gateway_charges, gateway_control, circuits, held_aggregates, audit_result FROM orderflow_app, orderflow_read;

GRANT SELECT                         ON schema_version     TO orderflow_app;
GRANT SELECT, INSERT, UPDATE         ON orders             TO orderflow_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON outbox             TO orderflow_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_low_water   TO orderflow_app;
GRANT SELECT, INSERT, DELETE         ON processed_events   TO orderflow_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON dead_letter_events TO orderflow_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON idempotency_keys   TO orderflow_app;
GRANT SELECT, INSERT, DELETE         ON gateway_charges    TO orderflow_app;
GRANT SELECT, INSERT, UPDATE         ON gateway_control    TO orderflow_app;
GRANT SELECT, INSERT, UPDATE         ON circuits           TO orderflow_app;
GRANT SELECT, INSERT, DELETE         ON held_aggregates    TO orderflow_app;
GRANT SELECT, INSERT, UPDATE         ON audit_result       TO orderflow_app;
-- Without it the relay is not told the last number that was given, and from PostgreSQL 17 on hears of no error either.
GRANT SELECT ON SEQUENCE outbox_seq_seq TO orderflow_app, orderflow_read;

GRANT SELECT ON schema_version, orders, outbox, outbox_low_water, processed_events, dead_letter_events, idempotency_keys,
                gateway_charges, gateway_control, circuits, held_aggregates, audit_result TO orderflow_read;
