"""The torture: load, a seeded plan of crashes and faults on real servers, then the audit of everything that was promised."""
