{{/* The name of all objects. */}}
{{- define "sgpu.name" -}}
{{ .Values.nameOverride | default .Release.Name | trunc 63 | trimSuffix "-" }}
{{- end -}}

{{- define "sgpu.namespace" -}}
{{ .Values.namespaceOverride | default .Release.Namespace }}
{{- end -}}

{{- define "sgpu.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end -}}
{{- end -}}

{{/* A list of Kubernetes, as YAML, from the mapping in the values: "key" names its elements. null leaves one out. */}}
{{- define "sgpu.list" -}}
{{- $list := list -}}
{{- $key := .key -}}
{{- range $name, $value := .values -}}
{{- if kindIs "map" $value -}}
{{- $list = append $list (merge (dict $key $name) $value) -}}
{{- else if kindIs "string" $value -}}
{{- $list = append $list (dict $key $name "value" $value) -}}
{{- else if not (kindIs "invalid" $value) -}}
{{- $list = append $list (dict $key $name "value" (toJson $value)) -}}
{{- end -}}
{{- end -}}
{{ toYaml $list }}
{{- end -}}

{{/* A container, as YAML: all of "values" as it is, but env and volumeMounts, which are mappings there. */}}
{{- define "sgpu.container" -}}
{{- $container := dict "name" .name "image" (include "sgpu.image" .root) -}}
{{- with .root.Values.image.pullPolicy }}{{ $_ := set $container "imagePullPolicy" . }}{{ end -}}
{{- range $key, $value := .values -}}
{{- if eq $key "env" -}}
{{- $_ := set $container $key (include "sgpu.list" (dict "key" "name" "values" $value) | fromYamlArray) -}}
{{- else if eq $key "volumeMounts" -}}
{{- $_ := set $container $key (include "sgpu.list" (dict "key" "mountPath" "values" $value) | fromYamlArray) -}}
{{- else if not (kindIs "invalid" $value) -}}
{{- $_ := set $container $key $value -}}
{{- end -}}
{{- end -}}
{{ toYaml $container }}
{{- end -}}
