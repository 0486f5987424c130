"""The tables of a coordinator's database, version by version."""

from __future__ import annotations

import sqlite3

from fedkit.errors import ConfigError

__all__ = ["migrate"]

# JSON is what fedkit.server.records writes, BLOBs are what fedkit.packing packs, digests are hexadecimal.
_FIRST = """
CREATE TABLE runs (
    name         TEXT PRIMARY KEY,
    id           TEXT NOT NULL UNIQUE,   -- what its assignment ids are made of
    file         TEXT NOT NULL,          -- JSON: the run file
    init         TEXT,                   -- digest of the weights it begins with, a file
    state        TEXT NOT NULL CHECK (state IN ('waiting', 'running', 'finished', 'failed', 'cancelled')),
    detail       TEXT NOT NULL,
    submitted_at REAL NOT NULL,          -- seconds since 1970, UTC
    ended_at     REAL,
    outcome      TEXT                    -- JSON
);

CREATE TABLE rounds (
    position INTEGER PRIMARY KEY,        -- rounds of one run end in the order of their positions
    run      TEXT NOT NULL REFERENCES runs (name) ON DELETE CASCADE,
    number   INTEGER NOT NULL,
    attempt  INTEGER NOT NULL,
    clients  TEXT NOT NULL,              -- JSON: those the round began with
    state    TEXT NOT NULL CHECK (state IN ('open', 'committed', 'abandoned')),
    record   TEXT,                       -- JSON, when it is over
    model    TEXT,                       -- digest, when it is committed
    best     INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX open_round ON rounds (run) WHERE state = 'open';
CREATE INDEX rounds_of_run ON rounds (run, state, position);

-- What a run goes on from. Of older rounds only the record and the model's digest are kept.
CREATE TABLE standing (
    run         TEXT PRIMARY KEY REFERENCES runs (name) ON DELETE CASCADE,
    last        INTEGER NOT NULL REFERENCES rounds (position),
    best        INTEGER REFERENCES rounds (position),
    state       BLOB,                    -- the strategy's, packed, unless it is large:
    state_file  TEXT,                    -- digest of the file it is in then
    accepted    TEXT NOT NULL,           -- JSON: assignment ids
    dropped     TEXT NOT NULL
);

-- Asynchronous work under way at the last commit.
CREATE TABLE flights (
    run        TEXT NOT NULL REFERENCES runs (name) ON DELETE CASCADE,
    position   INTEGER NOT NULL,
    assignment TEXT NOT NULL,            -- JSON
    model      TEXT NOT NULL,            -- digest
    PRIMARY KEY (run, position)
);

-- Facts of open rounds, in order.
CREATE TABLE entries (
    position INTEGER PRIMARY KEY,
    round    INTEGER NOT NULL REFERENCES rounds (position) ON DELETE CASCADE,
    fact     TEXT NOT NULL               -- JSON
);
CREATE INDEX entries_of_round ON entries (round);

-- Accepted answers of open rounds. The vectors of an update that came over the network stay in its spool file.
CREATE TABLE answers (
    round   INTEGER NOT NULL REFERENCES rounds (position) ON DELETE CASCADE,
    id      TEXT NOT NULL,
    file    TEXT,                        -- name in the run's spool folder
    content BLOB NOT NULL,
    PRIMARY KEY (round, id)
);

-- Models that are too small for a file of their own.
CREATE TABLE models (
    digest  TEXT PRIMARY KEY,
    content BLOB NOT NULL
);

CREATE VIEW referenced (digest) AS
    SELECT init FROM runs WHERE init IS NOT NULL
    UNION SELECT state_file FROM standing WHERE state_file IS NOT NULL
    UNION SELECT model FROM rounds WHERE position IN (SELECT last FROM standing UNION SELECT best FROM standing)
    UNION SELECT model FROM flights;

-- What became of each assignment, for ever: its client may ask much later.
CREATE TABLE settled (
    id       TEXT PRIMARY KEY,
    accepted INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE clients (
    name         TEXT PRIMARY KEY,
    state        TEXT NOT NULL CHECK (state IN ('here', 'away', 'left')),
    last_seen    REAL NOT NULL,          -- seconds since 1970, UTC
    max_examples INTEGER NOT NULL,
    tasks        TEXT NOT NULL           -- JSON
);
"""

# 32 bytes of a run's own, for draws and noise that nobody may foresee.
_SECOND = "ALTER TABLE runs ADD COLUMN secret BLOB;"

_VERSIONS = (_FIRST, _SECOND)


def migrate(connection: sqlite3.Connection, where: str) -> None:
    """Brings the tables to this version, each step whole or not at all; raises `ConfigError` for a newer one."""
    found: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if found > len(_VERSIONS):
        raise ConfigError(
            f"{where} was written by a newer fedkit (version {found} of its tables, this one knows {len(_VERSIONS)}): "
            "install that version again, or choose another folder"
        )
    for version in range(found, len(_VERSIONS)):
        step = f"{_VERSIONS[version]} PRAGMA user_version = {version + 1};"
        connection.executescript(f"BEGIN IMMEDIATE; {step} COMMIT;")
