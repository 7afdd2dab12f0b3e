"""Payments: the gateway, and the handler that brings an order from CREATED to PAID or FAILED."""
