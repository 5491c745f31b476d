// Caddy has verified each request, so only use the event here. After any status except
// 2xx, Caddy sends the event again.
const http = require('node:http');

http.createServer(async (req, res) => {
	try {
		const event = JSON.parse(Buffer.concat(await req.toArray()));
		const key = req.headers['idempotency-key']; // the same if Caddy sends an event again
		console.log(event.event_type, event.resource_id, key);
		res.writeHead(204).end();
	} catch (err) {
		console.error(err);
		res.writeHead(500).end();
	}
}).listen(9000, 'localhost');
