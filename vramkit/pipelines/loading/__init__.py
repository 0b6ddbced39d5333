"""Checkpoints: folders here or on the hub, the components that they name, configs and mapped weights."""
