{{/*
The webhook's serving certificate, as YAML: `secret`, the name of its Secret; `caBundle`, base64 (may be empty); and, where
the chart makes the Secret, its `data`. Two calls give two certificates: call it once per release (webhook.yaml).
*/}}
{{- define "weft.webhook.tls" -}}
{{- $tls := .Values.injector.webhook.tls -}}
{{- $name := include "weft.webhook.secret" . -}}
secret: {{ $name }}
{{- if $tls.existingSecret }}
{{- if not (or $tls.caBundle .Values.injector.webhook.annotations) }}
{{- fail "injector.webhook.tls.existingSecret needs injector.webhook.tls.caBundle, the CA that the API server trusts for it" }}
{{- end }}
caBundle: {{ contains "-----BEGIN" $tls.caBundle | ternary (b64enc $tls.caBundle) $tls.caBundle | quote }}
{{- else }}
{{- $kept := dig "data" dict (lookup "v1" "Secret" .Release.Namespace $name) }}
{{- if not (and (get $kept "tls.crt") (get $kept "tls.key") (get $kept "ca.crt")) }}
{{- $host := printf "weft-injector.%s.svc" .Release.Namespace }}
{{- $ca := genCAWithKey "weft webhook root" 3650 (genPrivateKey "ecdsa") }}
{{- $leaf := genSignedCertWithKey $host nil (list $host) 3650 $ca (genPrivateKey "ecdsa") }}
{{- $kept = dict "tls.crt" (b64enc $leaf.Cert) "tls.key" (b64enc $leaf.Key) "ca.crt" (b64enc $ca.Cert) }}
{{- end }}
caBundle: {{ get $kept "ca.crt" | quote }}
data:
  tls.crt: {{ get $kept "tls.crt" | quote }}
  tls.key: {{ get $kept "tls.key" | quote }}
  ca.crt: {{ get $kept "ca.crt" | quote }}
{{- end }}
{{- end }}

{{/* The name of the Secret with it. */}}
{{- define "weft.webhook.secret" -}}
{{ .Values.injector.webhook.tls.existingSecret | default "weft-injector-tls" }}
{{- end }}
