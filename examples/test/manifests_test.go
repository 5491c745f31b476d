// Package manifests checks the examples for Docker and Kubernetes, without running Docker
// or Kubernetes. It is a separate module, so that nothing else needs its dependencies.
package manifests

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

func loadCompose(t *testing.T, file string) (*types.Project, error) {
	t.Helper()
	options, err := cli.NewProjectOptions([]string{file}, cli.WithName("inkit"), cli.WithResolvedPaths(true))
	require.NoError(t, err)
	return options.LoadProject(context.Background())
}

// images has the paths, ports and variables from the documentation of the images. The sources are
// docs/README for caddy and python, the Dockerfile for Prometheus, and two pages for Grafana:
// "Configure a Grafana Docker image" and "Provision Grafana".
var images = map[string]struct {
	paths     []string // mount points, or folders that contain them
	ports     []uint32
	variables []string
}{
	"caddy":           {paths: []string{"/data", "/config", "/etc/caddy"}, ports: []uint32{8080}},
	"python":          {paths: []string{"/srv/backend.py"}},
	"prom/prometheus": {paths: []string{"/etc/prometheus", "/prometheus"}, ports: []uint32{9090}},
	"grafana/grafana": {
		paths: []string{"/etc/grafana/provisioning/datasources", "/etc/grafana/provisioning/dashboards", "/var/lib/grafana"},
		ports: []uint32{3000},
		// each name is GF_<SectionName>_<KeyName>, for a key in the configuration reference
		variables: []string{"GF_AUTH_ANONYMOUS_ENABLED", "GF_AUTH_ANONYMOUS_ORG_ROLE", "GF_AUTH_DISABLE_LOGIN_FORM"},
	},
}

func TestCompose(t *testing.T) {
	project, err := loadCompose(t, "../docker/compose.yaml")
	require.NoError(t, err)
	assert.Equal(t, []string{"backend", "caddy", "grafana", "prometheus"}, project.ServiceNames())
	for name, service := range project.Services {
		t.Run(name, func(t *testing.T) {
			image, _, _ := strings.Cut(service.Image, ":")
			if service.Build != nil {
				dockerfile, err := os.ReadFile(filepath.Join(service.Build.Context, service.Build.Dockerfile))
				require.NoError(t, err)
				image, _, _ = strings.Cut(string(dockerfile[bytes.LastIndex(dockerfile, []byte("FROM "))+len("FROM "):]), ":")
			}
			known, ok := images[image]
			require.True(t, ok, image)
			for _, volume := range service.Volumes {
				assert.True(t, slices.ContainsFunc(known.paths, func(path string) bool {
					return volume.Target == path || strings.HasPrefix(volume.Target, path+"/")
				}), "%s has a place for %s", image, volume.Target)
				switch volume.Type {
				case types.VolumeTypeBind:
					assert.FileExists(t, existing(volume.Source))
					assert.True(t, volume.ReadOnly, volume.Target)
				case types.VolumeTypeVolume:
					assert.Contains(t, project.Volumes, volume.Source)
				default:
					t.Error(volume.Type)
				}
			}
			for _, port := range service.Ports {
				assert.Contains(t, known.ports, port.Target)
			}
			for variable := range service.Environment {
				assert.Contains(t, known.variables, variable)
			}
			for _, secret := range service.Secrets {
				require.Contains(t, project.Secrets, secret.Source)
			}
		})
	}
	caddy := project.Services["caddy"]
	assert.Equal(t, []string{"inkit_webhook"}, []string{caddy.Secrets[0].Source})
	caddyfile := read(t, "../docker/caddy/Caddyfile")
	assert.Contains(t, caddyfile, "{file./run/secrets/inkit_webhook}")
	assert.Greater(t, time.Duration(*caddy.StopGracePeriod), gracePeriod(t, caddyfile))
	assert.Contains(t, read(t, "../docker/prometheus.yml"), "targets: [caddy:9180]")
	assert.Contains(t, read(t, "../docker/grafana/datasource.yml"), "url: http://prometheus:9090")
	for _, port := range slices.Concat(project.Services["prometheus"].Ports, project.Services["grafana"].Ports) {
		assert.Equal(t, "127.0.0.1", port.HostIP)
	}
}

// If path is a folder with files, the function "existing" returns the path of one of the files.
// Otherwise, it returns path.
func existing(path string) string {
	if files, err := filepath.Glob(path + "/*"); err == nil && len(files) > 0 {
		return files[0]
	}
	return path
}

// TestGrafanaProvisioning checks that the provisioning files have only documented fields.
func TestGrafanaProvisioning(t *testing.T) {
	var datasources struct {
		APIVersion  int `json:"apiVersion"`
		Datasources []struct {
			Name      string `json:"name"`
			Type      string `json:"type"`
			Access    string `json:"access"`
			URL       string `json:"url"`
			IsDefault bool   `json:"isDefault"`
		} `json:"datasources"`
	}
	require.NoError(t, yaml.UnmarshalStrict([]byte(read(t, "../docker/grafana/datasource.yml")), &datasources))
	require.Len(t, datasources.Datasources, 1)
	assert.Equal(t, 1, datasources.APIVersion)
	assert.True(t, datasources.Datasources[0].IsDefault, "the dashboard uses the default data source")
	var dashboards struct {
		APIVersion int `json:"apiVersion"`
		Providers  []struct {
			Name    string `json:"name"`
			Type    string `json:"type"`
			Options struct {
				Path string `json:"path"`
			} `json:"options"`
		} `json:"providers"`
	}
	require.NoError(t, yaml.UnmarshalStrict([]byte(read(t, "../docker/grafana/dashboards.yml")), &dashboards))
	require.Len(t, dashboards.Providers, 1)
	assert.Contains(t, read(t, "../docker/compose.yaml"), ":"+dashboards.Providers[0].Options.Path+"/inkit.json:ro")
}

// TestComposeIsChecked checks that the check of compose.yaml finds mistakes.
func TestComposeIsChecked(t *testing.T) {
	compose := read(t, "../docker/compose.yaml")
	for _, tt := range []struct{ name, old, new string }{
		{"an unknown option", "restart: unless-stopped", "restarts: unless-stopped"},
		{"a malformed duration", "stop_grace_period: 30s", "stop_grace_period: 30 seconds"},
		{"an undeclared volume", "  caddy_data:\n", ""},
		{"an undeclared secret", "secrets:\n  inkit_webhook:\n    file: ./inkit_webhook.secret\n", ""},
		{"a malformed port", `"8080:8080"`, `"8080:http"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			require.Contains(t, compose, tt.old)
			file := filepath.Join(t.TempDir(), "compose.yaml")
			require.NoError(t, os.WriteFile(file, []byte(strings.Replace(compose, tt.old, tt.new, 1)), 0o600))
			_, err := loadCompose(t, file)
			assert.Error(t, err)
		})
	}
}

// manifest has the documents of examples/kubernetes.
type manifest struct {
	configMap   corev1.ConfigMap
	service     corev1.Service
	statefulSet appsv1.StatefulSet
}

// loadManifest decodes each document into the Go type of its kind, and refuses unknown
// fields.
func loadManifest(text string) (m manifest, err error) {
	reader := utilyaml.NewYAMLReader(bufio.NewReader(strings.NewReader(text)))
	for {
		document, err := reader.Read()
		if errors.Is(err, io.EOF) {
			return m, nil
		}
		if err != nil {
			return m, err
		}
		var meta metav1.TypeMeta
		if err := yaml.Unmarshal(document, &meta); err != nil {
			return m, err
		}
		into, ok := map[string]any{
			"v1 ConfigMap": &m.configMap, "v1 Service": &m.service, "apps/v1 StatefulSet": &m.statefulSet,
		}[meta.APIVersion+" "+meta.Kind]
		if !ok {
			return m, errors.New("no type for " + meta.APIVersion + " " + meta.Kind)
		}
		// as in the API server, field names are case-sensitive here; encoding/json ignores case
		text, err := yaml.YAMLToJSONStrict(document)
		if err != nil {
			return m, err
		}
		strict, err := json.UnmarshalStrict(text, into)
		if err := errors.Join(append(strict, err)...); err != nil {
			return m, err
		}
	}
}

func TestKubernetes(t *testing.T) {
	m, err := loadManifest(read(t, "../kubernetes/inkit.yaml"))
	require.NoError(t, err)
	set := m.statefulSet
	pod := set.Spec.Template.Spec
	require.Len(t, pod.Containers, 1)
	caddy := pod.Containers[0]
	caddyfile := m.configMap.Data["Caddyfile"]
	require.NotEmpty(t, caddyfile)

	t.Run("the labels find the Pod", func(t *testing.T) {
		require.NotEmpty(t, m.service.Spec.Selector)
		assert.Equal(t, set.Spec.Template.Labels, m.service.Spec.Selector)
		assert.Equal(t, set.Spec.Template.Labels, set.Spec.Selector.MatchLabels)
		assert.Equal(t, m.service.Name, set.Spec.ServiceName)
	})
	ports := make(map[string]int32)
	for _, port := range caddy.Ports {
		ports[port.Name] = port.ContainerPort
	}
	t.Run("the Caddyfile has the same ports and paths", func(t *testing.T) {
		assert.Equal(t, map[string]int32{"http": 8080, "metrics": 9180}, ports)
		assert.Contains(t, caddyfile, "\nhttp://:8080 {\n")
		assert.Contains(t, caddyfile, "\nhttp://:9180 {\n")
		assert.Equal(t, intstr.FromString("http"), m.service.Spec.Ports[0].TargetPort)
		for _, probe := range []*corev1.Probe{caddy.ReadinessProbe, caddy.LivenessProbe} {
			assert.Equal(t, intstr.FromString("http"), probe.HTTPGet.Port)
			assert.Contains(t, caddyfile, "handle "+probe.HTTPGet.Path+" {")
		}
		assert.Equal(t, "9180", set.Spec.Template.Annotations["prometheus.io/port"])
	})
	t.Run("each mount has a volume, and each volume has a mount", func(t *testing.T) {
		volumes := make(map[string]bool)
		for _, volume := range pod.Volumes {
			volumes[volume.Name] = true
			switch {
			case volume.ConfigMap != nil:
				assert.Equal(t, m.configMap.Name, volume.ConfigMap.Name)
			case volume.Secret != nil:
				assert.Equal(t, "inkit-webhook", volume.Secret.SecretName)
				assert.Equal(t, int32(0o440), *volume.Secret.DefaultMode)
			default:
				assert.NotNil(t, volume.EmptyDir, volume.Name)
			}
		}
		for _, claim := range set.Spec.VolumeClaimTemplates {
			volumes[claim.Name] = true
			assert.Equal(t, int64(2<<30), claim.Spec.Resources.Requests.Storage().Value())
		}
		mounts := make(map[string]bool)
		paths := make(map[string]string)
		for _, mount := range caddy.VolumeMounts {
			mounts[mount.Name] = true
			paths[mount.MountPath] = mount.Name
			assert.Empty(t, mount.SubPath, "with a subPath, a new secret does not arrive")
		}
		assert.Equal(t, volumes, mounts)
		// the paths of data, configuration and Caddyfile in the image of Caddy
		assert.Equal(t, map[string]string{"/data": "data", "/config": "config", "/etc/caddy": "caddyfile", "/etc/inkit": "secret"}, paths)
		assert.Contains(t, caddyfile, "{file./etc/inkit/secret}")
		assert.Contains(t, read(t, "../kubernetes/README.md"), "secret generic inkit-webhook --from-file=secret=")
	})
	t.Run("the Pod has enough time to stop", func(t *testing.T) {
		_, delay, found := strings.Cut(caddyfile, "shutdown_delay ")
		require.True(t, found)
		delay, _, _ = strings.Cut(delay, "\n")
		shutdownDelay, err := time.ParseDuration(delay)
		require.NoError(t, err)
		assert.Greater(t, time.Duration(*pod.TerminationGracePeriodSeconds)*time.Second, shutdownDelay+gracePeriod(t, caddyfile))
	})
	t.Run("one Pod, because each Pod has its own events", func(t *testing.T) {
		assert.Equal(t, int32(1), *set.Spec.Replicas)
	})
}

func TestKubernetesIsChecked(t *testing.T) {
	text := read(t, "../kubernetes/inkit.yaml")
	for _, tt := range []struct{ name, old, new, err string }{
		{"an unknown field", "readOnlyRootFilesystem:", "readonlyRootFilesystem:", `unknown field "spec.template.spec.containers[0].securityContext.readonlyRootFilesystem"`},
		{"a number that is a text", "replicas: 1", `replicas: "1"`, "cannot unmarshal string"},
		{"an unknown kind", "kind: StatefulSet", "kind: StatefullSet", "no type for apps/v1 StatefullSet"},
		{"a malformed quantity", "storage: 2Gi", "storage: 2GB", "quantities must match"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			require.Contains(t, text, tt.old)
			_, err := loadManifest(strings.Replace(text, tt.old, tt.new, 1))
			assert.ErrorContains(t, err, tt.err)
		})
	}
}

func gracePeriod(t *testing.T, caddyfile string) time.Duration {
	t.Helper()
	_, text, found := strings.Cut(caddyfile, "grace_period ")
	require.True(t, found)
	text, _, _ = strings.Cut(text, "\n")
	period, err := time.ParseDuration(text)
	require.NoError(t, err)
	return period
}

func read(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(content)
}
