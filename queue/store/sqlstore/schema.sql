-- Times are milliseconds since 1970. PostgreSQL uses the clock of its server, and SQLite uses
-- the clock of the machine. docs/queue.md explains the columns.
CREATE TABLE {schema}inkit_queue_events (
	id          TEXT    NOT NULL PRIMARY KEY,
	queue       TEXT    NOT NULL,
	state       TEXT    NOT NULL,
	received    BIGINT  NOT NULL,
	queued      BIGINT  NOT NULL,
	due         BIGINT  NOT NULL,
	lease       BIGINT,
	owner       TEXT,
	attempts    INTEGER NOT NULL,
	last_error  TEXT    NOT NULL,
	event_type  TEXT    NOT NULL,
	resource_id TEXT    NOT NULL,
	request     {bytes} NOT NULL,
	checksum    {bytes} NOT NULL
);

-- The pending events, sorted by due time. This index also counts the events and finds the
-- oldest event.
CREATE INDEX inkit_queue_due ON {schema}inkit_queue_events (queue, due, queued) WHERE state = 'pending';

-- The dead events, sorted by time, for searches. This index also counts the events.
CREATE INDEX inkit_queue_dead ON {schema}inkit_queue_events (id, queue, queued) WHERE state = 'dead';

CREATE INDEX inkit_queue_resource ON {schema}inkit_queue_events (resource_id, id) WHERE resource_id <> '';

-- One row for each delivered event, without the request.
CREATE TABLE {schema}inkit_queue_history (
	id          TEXT    NOT NULL PRIMARY KEY,
	queue       TEXT    NOT NULL,
	event_type  TEXT    NOT NULL,
	resource_id TEXT    NOT NULL,
	received    BIGINT  NOT NULL,
	finished    BIGINT  NOT NULL,
	attempts    INTEGER NOT NULL,
	status      INTEGER NOT NULL
){clustered};

CREATE INDEX inkit_queue_finished ON {schema}inkit_queue_history (queue, finished, attempts);

CREATE INDEX inkit_queue_history_resource ON {schema}inkit_queue_history (resource_id, id) WHERE resource_id <> '';

-- The keys of events that are stored only once. A key has the SHA-256 of the body and the id
-- of the first event.
CREATE TABLE {schema}inkit_queue_once (
	queue      TEXT    NOT NULL,
	digest     {bytes} NOT NULL,
	id         TEXT    NOT NULL,
	expires    BIGINT  NOT NULL,
	duplicates INTEGER NOT NULL,
	PRIMARY KEY (queue, digest)
){clustered};

CREATE INDEX inkit_queue_once_id ON {schema}inkit_queue_once (id);

CREATE INDEX inkit_queue_once_expires ON {schema}inkit_queue_once (expires);

CREATE INDEX inkit_queue_duplicates ON {schema}inkit_queue_once (queue, duplicates) WHERE duplicates > 0;

-- The paused queues, and the start of each pause.
CREATE TABLE {schema}inkit_queue_paused (
	queue TEXT   NOT NULL PRIMARY KEY,
	since BIGINT NOT NULL
);

CREATE TABLE {schema}inkit_queue_schema (version INTEGER NOT NULL);

INSERT INTO {schema}inkit_queue_schema VALUES (1);
