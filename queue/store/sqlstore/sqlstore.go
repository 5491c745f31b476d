// Package sqlstore has the SQL that the stores share: one schema, and a Dialect for the
// few differences between databases.
package sqlstore

import (
	"context"
	"database/sql"
	_ "embed"
	"errors"
	"fmt"
	"strings"
)

// version is the version of schema.sql.
const version = 1

//go:embed schema.sql
var schema string

// Dialect has the differences between databases. Its values replace {bytes}, {clustered},
// {schema}, {now} and {skip} in the statements of this package.
type Dialect struct {
	Bytes     string // the column type for bytes
	Clustered string // the end of a CREATE TABLE that stores the rows in the index of the primary key
	Schema    string // the prefix of table names, including the dot
	Rows      int    // how many events one statement adds or finishes
	Numbered  bool   // arguments are $1, $2 and so on, and not ?
	Now       string // the time in milliseconds, constant during a statement
	Skip      string // makes a SELECT skip locked rows; empty if no row can be locked
	Begin     string // the first statement of a transaction that writes, or empty
	More      string // statements to run after schema.sql
	Size      string // a SELECT of the size of the database in bytes

	// Wrap translates an error of the driver into an error of package store.
	Wrap func(error) error
}

// DB is a store that does not repair its database. A type that embeds DB can add repairs.
type DB struct {
	Dialect
	Write, Read *sql.DB

	// Check runs in each transaction that writes, before its first change. An error ends the
	// transaction. Nil means no check.
	Check func() error

	prepared map[string]*sql.Stmt // by the argument query of the method exec
}

// text returns a statement of this package in the dialect.
func (d *DB) text(query string) string {
	for _, part := range [][2]string{{"{bytes}", d.Bytes}, {"{clustered}", d.Clustered}, {"{schema}", d.Schema}, {"{now}", d.Now}, {"{skip}", d.Skip}} {
		query = strings.ReplaceAll(query, part[0], part[1]) // faster than a strings.Replacer
	}
	if !d.Numbered {
		return query
	}
	var b strings.Builder
	for i, part := range strings.Split(query, "?") {
		if i > 0 {
			fmt.Fprint(&b, "$", i)
		}
		b.WriteString(part)
	}
	return b.String()
}

// InTx calls f in a transaction that writes, and commits if f returns no error.
func (d *DB) InTx(ctx context.Context, f func(tx *sql.Tx) error) error {
	tx, err := d.Write.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
	if err != nil {
		return d.Wrap(err)
	}
	defer func() { _ = tx.Rollback() }()
	if d.Begin != "" {
		_, err = tx.ExecContext(ctx, d.Begin)
	}
	if err == nil && d.Check != nil {
		err = d.Check()
	}
	if err == nil {
		err = f(tx)
	}
	if err == nil {
		err = tx.Commit()
	}
	return d.Wrap(err)
}

// exec runs a statement, and returns the number of changed rows.
func (d *DB) exec(ctx context.Context, tx *sql.Tx, query string, args ...any) (int, error) {
	var result sql.Result
	var err error
	if stmt := d.prepared[query]; stmt != nil {
		result, err = tx.StmtContext(ctx, stmt).ExecContext(ctx, args...) //nolint:sqlclosecheck // the transaction closes it
	} else {
		result, err = tx.ExecContext(ctx, d.text(query), args...)
	}
	if err != nil {
		return 0, err
	}
	n, err := result.RowsAffected()
	return int(n), err
}

// change runs a statement in a transaction, and returns the number of changed rows.
func (d *DB) change(ctx context.Context, query string, args ...any) (n int, err error) {
	err = d.InTx(ctx, func(tx *sql.Tx) (err error) {
		n, err = d.exec(ctx, tx, query, args...)
		return err
	})
	return n, err
}

// each runs a query. It scans every row of the result into dest, and then calls the function row,
// unless this function is nil.
func (d *DB) each(ctx context.Context, db Querier, dest []any, row func(), query string, args ...any) error {
	rows, err := db.QueryContext(ctx, d.text(query), args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := rows.Scan(dest...); err != nil {
			return err
		}
		if row != nil {
			row()
		}
	}
	return rows.Err()
}

// read runs a query with the method `each`, outside of a transaction, and translates the error.
func (d *DB) read(ctx context.Context, dest []any, row func(), query string, args ...any) error {
	return d.Wrap(d.each(ctx, d.Read, dest, row, query, args...))
}

// SchemaSQL returns the statements that create the schema.
func (d *DB) SchemaSQL() string { return d.text(schema + d.More) }

// Querier is a database, or a transaction in it.
type Querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// CheckVersion refuses a schema of another version.
func (d *DB) CheckVersion(ctx context.Context, db Querier) error {
	var found int
	if err := db.QueryRowContext(ctx, d.text(`SELECT version FROM {schema}inkit_queue_schema`)).Scan(&found); err != nil {
		return err
	}
	if found != version {
		return fmt.Errorf("the database has the schema of another version: %d, and this Caddy needs %d", found, version)
	}
	return nil
}

// Close implements store.Store.
func (d *DB) Close() error {
	return errors.Join(d.Read.Close(), d.Write.Close())
}
