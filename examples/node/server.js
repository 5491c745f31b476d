// Caddy has verified each request. All that is left is to use it.
const fs = require('node:fs');
const http = require('node:http');

http.createServer(async (req, res) => {
	try {
		const event = JSON.parse(Buffer.concat(await req.toArray()));
		const key = req.headers['idempotency-key']; // the same if Caddy sends an event again
		fs.appendFileSync(process.env.EVENTS ?? 1, `${event.event_type} ${event.resource_id} ${key}\n`);
		res.writeHead(204).end();
	} catch (err) {
		console.error(err);
		res.writeHead(500).end();
	}
}).listen(process.env.PORT ?? 9000, 'localhost');
