"""The engine: outbox, relay, consumer and settlement. It knows messages, never orders."""
