//! Probes of a pod that the injector has sent to the sidecar: what the kubelet would have asked of the app. The shapes are
//! those of Kubernetes' `Probe`, with numbers for ports:
//! <https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/#Probe>.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

/// One probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KubeletProbe {
    /// `CONTAINER/KIND`, such as `app/readinessProbe`: it is asked at `/probe/CONTAINER/KIND`.
    pub name: String,
    /// What is asked.
    pub handler: ProbeHandler,
    /// The longest wait for the answer.
    pub timeout: Duration,
}

/// What is asked of the app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum ProbeHandler {
    /// GET; 200 to 399 is well.
    HttpGet(HttpGet),
    /// A connection.
    TcpSocket(Port),
    /// `grpc.health.v1.Health/Check`.
    Grpc(Grpc),
}

/// A GET of Kubernetes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HttpGet {
    /// The port.
    pub port: u16,
    /// The target.
    #[serde(default = "root")]
    pub path: String,
    /// `HTTP` or `HTTPS`, whose certificate is not checked, as the kubelet does not.
    #[serde(default)]
    pub scheme: Scheme,
    /// Further fields; `Host` in place of the address.
    #[serde(default)]
    pub http_headers: Vec<Field>,
}

/// Plain or with TLS.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Scheme {
    /// Plain.
    #[default]
    Http,
    /// With TLS.
    Https,
}

/// A header field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Field {
    /// Its name.
    pub name: String,
    /// Its value.
    #[serde(default)]
    pub value: String,
}

/// A port alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// The port.
    pub port: u16,
}

/// A question of gRPC's health protocol.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grpc {
    /// The port.
    pub port: u16,
    /// Which service; empty: the server.
    #[serde(default)]
    pub service: Option<String>,
}

/// A probe as it is written.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Written {
    #[serde(flatten)]
    handler: ProbeHandler,
    timeout_seconds: Option<u64>,
}

/// Kubernetes' default for probes.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);
impl KubeletProbe {
    /// Reads an object of probes by name.
    pub(super) fn parse_all(text: &str) -> Result<Vec<Self>, String> {
        let written: BTreeMap<String, Written> =
            serde_json::from_str(text).map_err(|error| error.to_string())?;
        Ok(written.into_iter().map(|(name, written)| KubeletProbe::of(name, written)).collect())
    }

    fn of(name: String, written: Written) -> Self {
        let timeout = written.timeout_seconds.map_or(DEFAULT_TIMEOUT, Duration::from_secs);
        KubeletProbe { name, handler: written.handler, timeout }
    }
}

fn root() -> String {
    "/".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_of_kubernetes_are_read() {
        let text = r#"{
            "app/livenessProbe": {"tcpSocket": {"port": 8080}, "timeoutSeconds": 3},
            "app/readinessProbe": {"grpc": {"port": 9090}},
            "app/startupProbe": {"httpGet": {"port": 8080, "path": "/stop", "scheme": "HTTPS",
                                 "httpHeaders": [{"name": "Host", "value": "orders"}]}}
        }"#;
        let probes = KubeletProbe::parse_all(text).unwrap();
        let names: Vec<&str> = probes.iter().map(|probe| probe.name.as_str()).collect();
        assert_eq!(names, ["app/livenessProbe", "app/readinessProbe", "app/startupProbe"]);
        assert_eq!((probes[0].timeout, probes[1].timeout), (Duration::from_secs(3), DEFAULT_TIMEOUT));
        assert_eq!(probes[1].handler, ProbeHandler::Grpc(Grpc { port: 9090, service: None }));
        let ProbeHandler::HttpGet(get) = &probes[2].handler else { panic!("{:?}", probes[2]) };
        assert_eq!((get.scheme, get.http_headers[0].value.as_str()), (Scheme::Https, "orders"));
    }

    #[test]
    fn what_is_no_probe_is_refused() {
        for text in
            ["[]", r#"{"a": {}}"#, r#"{"a": {"exec": {}}}"#, r#"{"a": {"tcpSocket": {"port": "http"}}}"#]
        {
            assert!(KubeletProbe::parse_all(text).is_err(), "{text}");
        }
    }
}
