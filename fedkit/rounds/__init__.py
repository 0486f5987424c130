"""How a run goes: assignments, group calls, the journal, and the federation that strategies see.

Nothing here does I/O. `call` is the state machine of one group call; `journal` says what must survive; `federation`
turns a strategy's questions into assignments for any `Transport`; `conduct` drives a run from its first round to its
test scores, and takes it up again from its journal.
"""
