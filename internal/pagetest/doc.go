// Package pagetest drives the page of the queue with a real Chromium, and takes the
// screenshots of the documents.
package pagetest
