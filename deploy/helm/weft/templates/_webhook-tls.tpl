{{/*
The CA bundle of the webhook, base64, where the operator brings a certificate of his own. Else the authority gives the
certificate, and the injector writes the bundle.
*/}}
{{- define "weft.webhook.caBundle" -}}
{{- $tls := .Values.injector.webhook.tls -}}
{{- if $tls.existingSecret }}
{{- if not (or $tls.caBundle .Values.injector.webhook.annotations) }}
{{- fail "injector.webhook.tls.existingSecret needs injector.webhook.tls.caBundle, the CA that the API server trusts for it" }}
{{- end }}
{{- contains "-----BEGIN" $tls.caBundle | ternary (b64enc $tls.caBundle) $tls.caBundle }}
{{- end }}
{{- end }}
