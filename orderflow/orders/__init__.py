"""Orders: their states, their table, and the HTTP API that takes them."""
