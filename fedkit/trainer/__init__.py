"""Local work at one client, without sockets: batches, the training loop, evaluation, summaries, the client's memory.

`Trainer` does the work on a device; `LocalClient` makes it idempotent and keeps what stays at the client.
"""
