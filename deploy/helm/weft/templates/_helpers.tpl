{{/* Labels of an object; "name" is the component's. */}}
{{- define "weft.labels" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/part-of: weft
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- end }}

{{/* The image of "name": sidecar, redirect or control. */}}
{{- define "weft.image" -}}
{{- $images := .root.Values.images -}}
{{- $whole := get $images .name -}}
{{- if $whole -}}
{{- $whole -}}
{{- else -}}
{{- $registry := required "images.registry is empty; name the registry that has weft-sidecar, weft-redirect and weft-control, for example --set images.registry=registry.example.com/weft" $images.registry -}}
{{- printf "%s/weft-%s:%s" (trimSuffix "/" $registry) .name ($images.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end }}

{{/* What all pods of the chart have in common; "values" are those of the component, "group" makes its volume writable. */}}
{{- define "weft.pod" -}}
enableServiceLinks: false
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 1338
  runAsGroup: 1338
  {{- if .group }}
  fsGroup: 1338
  # Otherwise every start opens all files in the volume to the group, and weft-ca refuses a key that others may read.
  fsGroupChangePolicy: OnRootMismatch
  {{- end }}
  seccompProfile: {type: RuntimeDefault}
{{- with .values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Of every container. */}}
{{- define "weft.container" -}}
imagePullPolicy: {{ .root.Values.images.pullPolicy }}
terminationMessagePolicy: FallbackToLogsOnError
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- with .values.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The injector's settings: injector/src/settings.rs. */}}
{{- define "weft.settings" -}}
{{- $values := .Values -}}
images:
  sidecar: {{ include "weft.image" (dict "root" . "name" "sidecar") | quote }}
  redirect: {{ include "weft.image" (dict "root" . "name" "redirect") | quote }}
  pullPolicy: {{ $values.images.pullPolicy }}
namespace: {{ .Release.Namespace }}
authority: weft-ca.{{ .Release.Namespace }}.svc:15080
{{- $consul := $values.consul.addresses }}
{{- if $values.consul.install }}
{{- $consul = list (printf "consul.%s.svc:8500" .Release.Namespace) }}
{{- end }}
trustDomain: {{ $values.trustDomain }}
consul: {{ toJson $consul }}
nativeSidecar: {{ $values.sidecar.native }}
preStopSleepSeconds: {{ $values.sidecar.preStopSleepSeconds }}
sidecar:
  mtls: {{ $values.sidecar.mtls }}
  {{- range $flag, $value := $values.sidecar.flags }}
  {{ $flag }}: {{ toString $value | quote }}
  {{- end }}
environment:
  {{- range $name, $value := $values.sidecar.environment }}
  {{ $name }}: {{ toString $value | quote }}
  {{- else }} {}
  {{- end }}
{{- $requests := $values.sidecar.resources.requests | default dict }}
{{- $limits := $values.sidecar.resources.limits | default dict }}
resources:
  cpuRequest: {{ get $requests "cpu" | toString | quote }}
  cpuLimit: {{ get $limits "cpu" | toString | quote }}
  memoryRequest: {{ get $requests "memory" | toString | quote }}
  memoryLimit: {{ get $limits "memory" | toString | quote }}
{{- end }}

{{/* Values that contradict each other, or the cluster. */}}
{{- define "weft.check" -}}
{{- $sidecar := .Values.sidecar -}}
{{- $version := .Capabilities.KubeVersion.Version -}}
{{- if and .Values.consul.install .Values.consul.addresses -}}
{{- fail "consul.install is true and consul.addresses names agents; choose one" -}}
{{- end -}}
{{- if and $sidecar.native (semverCompare "<1.29.0-0" $version) -}}
{{- fail (printf "sidecar.native needs Kubernetes 1.29, and this is %s; set sidecar.native=false" $version) -}}
{{- end -}}
{{- if and (gt (int $sidecar.preStopSleepSeconds) 0) (semverCompare "<1.30.0-0" $version) -}}
{{- fail (printf "sidecar.preStopSleepSeconds needs Kubernetes 1.30, and this is %s; set it to 0" $version) -}}
{{- end -}}
{{- end }}
