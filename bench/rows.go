package main

import (
	"encoding/base64"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const secret = "test_inkit_webhook_secret"

// path is under /hooks/, because the program webhook serves no other paths.
const path = "/hooks/inkit"

const njsModule = "/usr/lib/nginx/modules/ngx_http_js_module.so"

// rows returns pairs: a program without verification, and the same program with
// verification. `caddy` is the path of the Caddy binary. `backend` is the address of the backend.
func rows(caddy, backend string) (all []*row) {
	pair := func(proxy string, files func(addr string, verifies bool) map[string]string, command func(dir, addr string) *exec.Cmd) {
		for _, verifies := range []bool{false, true} {
			all = append(all, &row{proxy: proxy, verifies: verifies, files: func(addr string) map[string]string {
				contents := files(addr, verifies)
				for name, content := range contents {
					contents[name] = strings.NewReplacer("<addr>", addr, "<backend>", backend, "<secret>", secret).Replace(content)
				}
				return contents
			}, command: command})
		}
	}
	when := func(verifies bool, text string) string {
		if verifies {
			return text
		}
		return ""
	}

	pair("Caddy, inkit_webhook", func(_ string, verifies bool) map[string]string {
		return map[string]string{"Caddyfile": "{\n\tadmin off\n\tauto_https off\n\tlog {\n\t\tlevel ERROR\n\t}\n}\nhttp://<addr> {\n" + when(verifies, `
	inkit_webhook {
		secret {env.INKIT_WEBHOOK_SECRET}
		max_size 64MiB
	}
`) + "\treverse_proxy <backend>\n}\n"}
	}, func(dir, _ string) *exec.Cmd {
		return exec.Command(caddy, "run", "--config", filepath.Join(dir, "Caddyfile"))
	})

	// If nginx writes a large body to a file, r.requestBuffer is empty, and the script rejects the request.
	pair("nginx, njs", func(_ string, verifies bool) map[string]string {
		location := "location / { proxy_pass http://backend; }"
		if verifies {
			location = "location / { js_content inkit.verify; } location @backend { proxy_pass http://backend; }"
		}
		return map[string]string{
			"inkit.js": `import crypto from 'crypto';
function verify(r) {
	const hmac = crypto.createHmac('sha256', process.env.INKIT_WEBHOOK_SECRET);
	if (r.headersIn['Inkit-Signature'] !== hmac.update(r.requestBuffer || '').digest('hex')) {
		r.return(401);
		return;
	}
	r.internalRedirect('@backend');
}
export default { verify };
`,
			"nginx.conf": `load_module ` + njsModule + `;
user root root;
daemon off;
worker_processes 2;
worker_rlimit_nofile 8192;
pid nginx.pid;
error_log stderr crit;
env INKIT_WEBHOOK_SECRET;
events { worker_connections 4096; }
http {
	access_log off;
	js_import inkit from inkit.js;
	client_body_temp_path body;
	proxy_temp_path proxy;
	fastcgi_temp_path fastcgi;
	uwsgi_temp_path uwsgi;
	scgi_temp_path scgi;
	client_max_body_size 64m;
	client_body_buffer_size 64m;
	proxy_http_version 1.1;
	proxy_set_header Connection "";
	upstream backend { server <backend>; keepalive 64; }
	server { listen <addr>; ` + location + ` }
}
`,
		}
	}, func(dir, _ string) *exec.Cmd {
		return exec.Command("nginx", "-p", dir, "-e", "stderr", "-c", "nginx.conf")
	})

	// HAProxy buffers only the first 16 KiB (tune.bufsize) of a body, so it rejects larger bodies.
	pair("HAProxy, hmac", func(_ string, verifies bool) map[string]string {
		return map[string]string{"haproxy.cfg": `global
	maxconn 4000
	nbthread 2
defaults
	mode http
	timeout client 1m
	timeout server 1m
	timeout connect 5s
	timeout http-request 1m
frontend site
	bind <addr>
` + when(verifies, `	option http-buffer-request
	http-request set-var(txn.hmac) req.body,hmac(sha256,`+base64.StdEncoding.EncodeToString([]byte(secret))+`),hex,lower
	http-request deny deny_status 401 unless { req.hdr(Inkit-Signature),secure_memcmp(txn.hmac) }
`) + `	default_backend events
backend events
	server one <backend>
`}
	}, func(dir, _ string) *exec.Cmd {
		return exec.Command("haproxy", "-db", "-f", filepath.Join(dir, "haproxy.cfg"))
	})

	// The program webhook has no backend: it runs another program for each event.
	pair("webhook, which runs /bin/true", func(_ string, verifies bool) map[string]string {
		return map[string]string{"hooks.json": `[{"id": "inkit", "execute-command": "/bin/true"` + when(verifies, `, "trigger-rule-mismatch-http-response-code": 401,
	"trigger-rule": {"match": {"type": "payload-hmac-sha256", "secret": "<secret>", "parameter": {"source": "header", "name": "Inkit-Signature"}}}`) + "}]"}
	}, func(dir, addr string) *exec.Cmd {
		host, port, _ := net.SplitHostPort(addr)
		return exec.Command("webhook", "-hooks", filepath.Join(dir, "hooks.json"), "-ip", host, "-port", port)
	})

	// Flask has no backend either: it is itself the backend.
	pair("Flask under gunicorn", func(_ string, verifies bool) map[string]string {
		return map[string]string{"app.py": `import hashlib
import hmac
import os

from flask import Flask, request

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = 64 << 20


@app.post("` + path + `")
def webhook():
    body = request.get_data()
` + when(verifies, `    digest = hmac.new(os.environ["INKIT_WEBHOOK_SECRET"].encode(), body, hashlib.sha256).hexdigest()
    if request.headers.get("Inkit-Signature") != digest:
        return "", 401
`) + `    return str(len(body))
`}
	}, func(dir, addr string) *exec.Cmd {
		return exec.Command("gunicorn", "--bind", addr, "--workers", "2", "--threads", "8", "--keep-alive", "75", "--log-level", "critical", "--chdir", dir, "app:app")
	})
	return all
}

// row is a program with or without verification, and its figures.
type row struct {
	proxy    string
	verifies bool
	files    func(addr string) map[string]string // contents by file name
	command  func(dir, addr string) *exec.Cmd

	cpu, p50, p99                spread // µs
	rest, slow, unsigned, forged int64  // bytes of resident memory
	beside                       timing // response time of a genuine event while slow connections are open
}

func (r *row) name() string {
	if r.verifies {
		return r.proxy
	}
	name, _, _ := strings.Cut(r.proxy, ",")
	return name + ", not verifying"
}

// start runs the program in its own folder.
func (r *row) start(parent string) (*process, error) {
	dir, err := os.MkdirTemp(parent, "row")
	if err != nil {
		return nil, err
	}
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	for name, content := range r.files(addr) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			return nil, err
		}
	}
	cmd := r.command(dir, addr)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir, "INKIT_WEBHOOK_SECRET="+secret, "PYTHONDONTWRITEBYTECODE=1")
	p, err := startProcess(cmd, addr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", cmd.Path, err)
	}
	return p, nil
}
