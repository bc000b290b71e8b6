//! A client of Consul's catalog over its HTTP API: reads what is ours, and writes one operation at a time. Every request has
//! a time limit; several agents are tried in turn, from the one that answered last. It does not wait between attempts: its
//! caller knows how long. It speaks plain HTTP.
//!
//! API: <https://developer.hashicorp.com/consul/api-docs/catalog>.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    env, fs,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, header::CONTENT_TYPE};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    mirror::{Catalog, Instance, Node, Operation, Status},
    names::{META_CLUSTER, META_SOURCE, SOURCE},
    settings::Settings,
};

/// Consul's catalog, as far as one cluster owns it.
pub struct ConsulCatalog {
    http: Client<HttpConnector, Full<Bytes>>,
    agents: Vec<String>,
    /// The one that answered last.
    current: AtomicUsize,
    token_file: Option<PathBuf>,
    cluster: String,
}

/// For one request to one agent. Whoever may write until a point in time begins no write later than this before it.
pub const TIME_LIMIT: Duration = Duration::from_secs(3);
/// The longest answer: the services of one node, or all checks.
const MAX_ANSWER: usize = 64 << 20;
/// As much of an answer stands in an error.
const MAX_QUOTE: usize = 200;

impl ConsulCatalog {
    /// The catalog that the settings name. `variable` gives the variables of this container.
    ///
    /// # Errors
    /// An agent's address that cannot be used.
    pub fn new(settings: &Settings, variable: impl Fn(&str) -> Option<String>) -> Result<ConsulCatalog> {
        let own = &settings.controller.consul;
        let (key, written) =
            if own.is_empty() { ("consul", &settings.consul) } else { ("controller.consul", own) };
        let agents = written.iter().map(|text| {
            agent(text, &variable).with_context(|| format!("`{key}` of the settings has {text:?}"))
        });
        let cluster = &settings.controller.cluster;
        ensure!(
            is_name(cluster),
            "`controller.cluster` is {cluster:?}; expected lower-case letters, digits and dashes"
        );
        Ok(ConsulCatalog {
            http: Client::builder(TokioExecutor::new()).build_http(),
            agents: agents.collect::<Result<_>>()?,
            current: AtomicUsize::new(0),
            token_file: settings.controller.token_file.clone(),
            cluster: cluster.clone(),
        })
    }

    /// The same, with the variables of this process.
    ///
    /// # Errors
    /// As [`ConsulCatalog::new`].
    pub fn of(settings: &Settings) -> Result<ConsulCatalog> {
        Self::new(settings, |name| env::var(name).ok())
    }

    /// The names of this cluster's nodes, in order.
    ///
    /// # Errors
    /// As [`ConsulCatalog::read`].
    pub async fn nodes(&self) -> Result<BTreeSet<String>> {
        let nodes: Vec<NodeEntry> = self.get(&format!("/v1/catalog/nodes?{}", self.ours())).await?;
        Ok(nodes.into_iter().map(|entry| entry.node).collect())
    }

    /// What it holds of this cluster.
    ///
    /// # Errors
    /// No agent answers, or one says something else than a catalog.
    pub async fn read(&self) -> Result<Catalog> {
        let ours = self.ours();
        let nodes: Vec<NodeEntry> = self.get(&format!("/v1/catalog/nodes?{ours}")).await?;
        let mut statuses = HashMap::new();
        if !nodes.is_empty() {
            let checks: Vec<CheckEntry> = self.get(&format!("/v1/health/state/any?{ours}")).await?;
            statuses.extend(checks.into_iter().map(|check| ((check.node, check.check_id), check.status)));
        }
        let mut catalog = Catalog::new();
        for NodeEntry { node, address } in nodes {
            // A name that needs an escape is none that this program wrote.
            if !node.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte)) {
                continue;
            }
            let found: Option<NodeServices> = self.get(&format!("/v1/catalog/node/{node}")).await?;
            let services = found.and_then(|found| found.services).unwrap_or_default();
            let status =
                |id: &str| statuses.get(&(node.clone(), check_id(id))).map_or("", String::as_str).to_owned();
            let instances = services
                .into_iter()
                .map(|(id, entry)| {
                    let status = status(&id);
                    (id, instance(entry, &status))
                })
                .collect();
            catalog.insert(node, Node { address, instances });
        }
        Ok(catalog)
    }

    /// The query that finds what is ours.
    fn ours(&self) -> String {
        format!("node-meta={META_SOURCE}:{SOURCE}&node-meta={META_CLUSTER}:{}", self.cluster)
    }

    /// Writes one operation. Writing it twice changes nothing.
    ///
    /// # Errors
    /// No agent takes it; the message says what and where.
    pub async fn write(&self, operation: &Operation) -> Result<()> {
        let (path, document) = match operation {
            Operation::Register { node, address, id, instance } => {
                ("/v1/catalog/register", self.registration(node, address, id, instance))
            }
            Operation::Deregister { node, id } => {
                ("/v1/catalog/deregister", json!({ "Node": node, "ServiceID": id }))
            }
            Operation::DeregisterNode { node } => ("/v1/catalog/deregister", json!({ "Node": node })),
        };
        self.ask(&Method::PUT, path, &document.to_string()).await.map(drop).with_context(|| match operation {
            Operation::Register { node, id, .. } => format!("instance {id} on node {node}: not registered"),
            Operation::Deregister { node, id } => format!("instance {id} on node {node}: not removed"),
            Operation::DeregisterNode { node } => format!("node {node}: not removed"),
        })
    }

    fn registration(&self, node: &str, address: &str, id: &str, instance: &Instance) -> Value {
        let status = if instance.status == Status::Passing { "passing" } else { "critical" };
        json!({
            "Node": node,
            "Address": address,
            "NodeMeta": {
                META_SOURCE: SOURCE, META_CLUSTER: self.cluster,
                // No agent runs there: a convention of Consul's own tools.
                "external-node": "true",
            },
            "Service": {
                "ID": id, "Service": instance.service, "Address": instance.address, "Port": instance.port,
                "Meta": instance.meta,
            },
            "Check": {
                "CheckID": check_id(id), "ServiceID": id, "Name": "Kubernetes", "Status": status,
                "Notes": "the conditions of the pod's endpoint",
            },
        })
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let body = self.ask(&Method::GET, path, "").await?;
        let mut deserializer = serde_json::Deserializer::from_slice(&body);
        serde_path_to_error::deserialize(&mut deserializer)
            .with_context(|| format!("Consul's answer to {path} cannot be read"))
    }

    /// Asks the agents in turn, until one gives an answer that another would not better.
    async fn ask(&self, method: &Method, path: &str, body: &str) -> Result<Bytes> {
        let first = self.current.load(Ordering::Relaxed);
        let mut failures = Vec::new();
        for at in 0..self.agents.len() {
            let at = (first + at) % self.agents.len();
            let agent = &self.agents[at];
            match self.ask_agent(agent, method, path, body).await {
                Ok((status, answer)) if status.is_success() => {
                    self.current.store(at, Ordering::Relaxed);
                    return Ok(answer);
                }
                Ok((status, answer)) => {
                    let said = String::from_utf8_lossy(&answer);
                    let said: String = said.trim().chars().take(MAX_QUOTE).collect();
                    let remedy = match status {
                        StatusCode::FORBIDDEN => {
                            "; the token needs node:write, service:write, node:read and service:read"
                        }
                        _ => "",
                    };
                    let failure = format!("Consul at {agent}, {path}: status {status}: {said}{remedy}");
                    if status.is_client_error() {
                        bail!(failure);
                    }
                    failures.push(failure);
                }
                Err(error) => failures.push(format!("Consul at {agent}, {path}: {error:#}")),
            }
        }
        bail!(failures.join("; "))
    }

    async fn ask_agent(
        &self,
        agent: &str,
        method: &Method,
        path: &str,
        body: &str,
    ) -> Result<(StatusCode, Bytes)> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("http://{agent}{path}"))
            .header(CONTENT_TYPE, "application/json");
        if let Some(file) = &self.token_file {
            let token = fs::read_to_string(file)
                .with_context(|| format!("the token file {} cannot be read", file.display()))?;
            request = request.header("x-consul-token", token.trim());
        }
        let request = request.body(Full::from(body.to_owned()))?;
        let answer = async {
            let answer = self.http.request(request).await?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
            let body = body.map_err(|error| anyhow::anyhow!("its answer broke off: {error}"))?;
            anyhow::Ok((status, body.to_bytes()))
        };
        let limit = TIME_LIMIT / u32::try_from(self.agents.len()).unwrap_or(1).max(1);
        timeout(limit, answer).await.with_context(|| format!("no answer within {limit:?}"))?
    }
}

/// An agent as hyper is asked for it: `HOST:PORT`.
fn agent(text: &str, variable: &impl Fn(&str) -> Option<String>) -> Result<String> {
    let mut text = text.trim().to_owned();
    while let Some((before, (name, after))) =
        text.split_once("$(").and_then(|(before, rest)| Some((before, rest.split_once(')')?)))
    {
        let value = variable(name).with_context(|| {
            format!("the injector's container has no variable {name}; set it, or `controller.consul`")
        })?;
        // An address of IPv6 stands in brackets before a port.
        let value = if value.contains(':') && before.is_empty() { format!("[{value}]") } else { value };
        text = format!("{before}{value}{after}");
    }
    let plain = text.strip_prefix("http://").unwrap_or(&text).trim_end_matches('/');
    ensure!(
        !plain.contains("://"),
        "the controller speaks plain HTTP only; name another agent in `controller.consul`, or set \
         `controller: {{enabled: false}}`"
    );
    let authority: hyper::http::uri::Authority =
        plain.parse().context("expected HOST:PORT, such as consul.weft-system.svc:8500")?;
    ensure!(!authority.host().is_empty(), "expected HOST:PORT");
    Ok(match authority.port() {
        Some(_) => authority.to_string(),
        None => format!("{authority}:8500"),
    })
}

fn is_name(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

/// The convention of Consul's agents.
fn check_id(id: &str) -> String {
    format!("service:{id}")
}

fn instance(entry: ServiceEntry, status: &str) -> Instance {
    Instance {
        service: entry.service,
        address: entry.address,
        // One that is no port differs from every port that should be there.
        port: u16::try_from(entry.port).unwrap_or(0),
        meta: entry.meta.unwrap_or_default(),
        status: match status {
            "passing" => Status::Passing,
            "critical" => Status::Critical,
            _ => Status::Unknown,
        },
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct NodeEntry {
    node: String,
    address: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct NodeServices {
    services: Option<HashMap<String, ServiceEntry>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ServiceEntry {
    service: String,
    #[serde(default)]
    address: String,
    /// Consul leaves out 0 since 1.11.
    #[serde(default)]
    port: i64,
    #[serde(default)]
    meta: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct CheckEntry {
    node: String,
    #[serde(rename = "CheckID")]
    check_id: String,
    status: String,
}

#[cfg(test)]
mod tests;
