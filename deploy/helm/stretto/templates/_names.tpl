{{- define "stretto.labels" -}}
app.kubernetes.io/name: stretto
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "stretto.selector" -}}
app.kubernetes.io/name: stretto
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "stretto.controller" -}}{{ .Release.Name }}-controller{{- end }}
{{- define "stretto.operator" -}}{{ .Release.Name }}-operator{{- end }}
{{- define "stretto.certificateSecret" -}}
{{ .Values.security.certificateSecret | default (printf "%s-certificate" .Release.Name) }}
{{- end }}
{{- define "stretto.tokensSecret" -}}
{{ .Values.security.tokensSecret | default (printf "%s-tokens" .Release.Name) }}
{{- end }}
{{- define "stretto.clientSecret" -}}
{{ .Values.security.clientSecret | default (printf "%s-client" .Release.Name) }}
{{- end }}

{{- /* All replicas by name: whichever leads, a client that knows all of them finds it. */ -}}
{{- define "stretto.endpoints" -}}
{{- $root := . -}}
{{- if eq .Values.controller.store "sqlite" -}}
{{ include "stretto.controller" . }}.{{ .Release.Namespace }}.svc:29400
{{- else -}}
{{- $names := list -}}
{{- range $index := until (int .Values.controller.replicas) -}}
{{- $name := include "stretto.controller" $root -}}
{{- $names = append $names (printf "%s-%d.%s-pods.%s.svc:29400" $name $index $name $root.Release.Namespace) -}}
{{- end -}}
{{ join "," $names }}
{{- end -}}
{{- end }}

{{- define "stretto.image" -}}
{{- $image := index .root.Values.images .component -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- /* The restricted profile of the pod security standards. */ -}}
{{- define "stretto.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}
{{- define "stretto.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "stretto.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}
