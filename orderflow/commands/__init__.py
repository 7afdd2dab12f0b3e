"""The commands, one module each; `orderflow.cli` imports each only when it runs."""
