"""Typed configuration: schema, composition, validation. Nothing here imports torch."""
