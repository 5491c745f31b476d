-- Times are milliseconds since 1970, by the clock of the database or, in SQLite, of the
-- machine. docs/queue.md explains the columns.
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

-- The pending events in the order in which they are due. It also answers how many there
-- are, and since when.
CREATE INDEX inkit_queue_due ON {schema}inkit_queue_events (queue, due, queued) WHERE state = 'pending';

CREATE INDEX inkit_queue_dead ON {schema}inkit_queue_events (queue, queued) WHERE state = 'dead';

CREATE TABLE {schema}inkit_queue_schema (version INTEGER NOT NULL);

INSERT INTO {schema}inkit_queue_schema VALUES (1);
