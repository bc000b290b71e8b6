//! `check`: what would keep the sidecar from working here, each with the next step. It starts nothing that stays,
//! sends no token, and changes nothing.

mod registry;

use std::{io, net::SocketAddr, process::ExitCode, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime,
    sync::watch,
    time::timeout,
};

use super::{build::default_policy, command};
use crate::{
    config::{Authority, Config, document::Mistake},
    discovery::{self, Directory, policies::Policies},
    identity, net,
    redirect::{self, Finding, Outcome},
};

/// For everything that a check waits for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Looks; what to print, and the exit code, which says whether anything is wrong.
pub fn check(config: &Config, as_json: bool) -> (String, ExitCode) {
    let findings = match runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(findings(config)),
        Err(error) => vec![Finding::wrong("runtime", error.to_string())],
    };
    let text = match as_json {
        true => format!("{:#}\n", serde_json::json!(findings)),
        false => findings.iter().map(|finding| format!("{finding}\n")).collect(),
    };
    let wrong = findings.iter().any(|finding| finding.outcome == Outcome::Wrong);
    (text, if wrong { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn findings(config: &Config) -> Vec<Finding> {
    let mut findings = vec![Finding::shown("settings", "read, without a mistake")];
    match command::settings(config) {
        Ok(settings) => findings.extend(redirect::check(&settings)),
        Err(error) => findings.push(Finding::wrong("this program", format!("{error:#}"))),
    }
    findings.push(authority(config.authority.as_ref()).await);
    findings.extend(registry::findings(config).await);
    findings.extend(documents(config).await);
    findings.extend(strict(config).await);
    findings
}

async fn authority(authority: Option<&Authority>) -> Finding {
    let subject = "certificate authority";
    let Some(authority) = authority else {
        return Finding::unknown(
            subject,
            "none is set: this sidecar would speak plaintext only (--authority)",
        );
    };
    match identity::prove(authority).await {
        Err(error) => Finding::wrong(subject, format!("{error:#}; is `weft-ca serve` running there?")),
        Ok(domain) => {
            let proven = format!("{} has proven itself for trust domain {domain}", authority.address);
            match &authority.token_file {
                Some(_) => Finding::shown(subject, proven),
                None => Finding::unknown(
                    subject,
                    format!("{proven}; without --token-file a kept certificate must do"),
                ),
            }
        }
    }
}

/// Reads the stores once, as a running sidecar would.
async fn documents(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Some(folder) = config.stores.services.clone() {
        let subject = format!("services in {}", folder.display());
        let (sender, mut directory) = watch::channel(Arc::new(Directory::default()));
        let (mistakes, found) = watch::channel(Vec::new());
        let reading =
            tokio::spawn(discovery::file::run(discovery::file::Settings { folder }, sender, mistakes));
        let read = timeout(PATIENCE, directory.changed()).await.is_ok();
        let count = directory.borrow().services().len();
        findings.extend(read_store(&subject, read, &format!("{count} services"), &found.borrow()));
        reading.abort();
    }
    if let Some(folder) = config.stores.policies.clone() {
        let subject = format!("policies in {}", folder.display());
        let (sender, mut policies) = watch::channel(Arc::new(Policies::default()));
        let (mistakes, found) = watch::channel(Vec::new());
        let settings = discovery::policies::Settings { folder, defaults: default_policy(config) };
        let reading = tokio::spawn(discovery::policies::run(settings, sender, mistakes));
        let read = timeout(PATIENCE, policies.changed()).await.is_ok();
        let count = policies.borrow().len();
        findings.extend(read_store(&subject, read, &format!("{count} policies"), &found.borrow()));
        reading.abort();
    }
    findings
}

fn read_store(subject: &str, was_read: bool, what: &str, mistakes: &[Mistake]) -> Vec<Finding> {
    if !was_read {
        return vec![Finding::unknown(subject, "could not be read in time")];
    }
    if mistakes.is_empty() {
        return vec![Finding::shown(subject, format!("{what}, without a mistake"))];
    }
    mistakes.iter().map(|mistake| Finding::wrong(subject, mistake.to_string())).collect()
}

/// Would strict mutual TLS refuse anybody who calls now? A sidecar that runs with these settings knows.
async fn strict(config: &Config) -> Option<Finding> {
    let subject = "strict mutual TLS";
    let admin = config.ports.admin;
    let address =
        if admin.ip().is_unspecified() { SocketAddr::from(([127, 0, 0, 1], admin.port())) } else { admin };
    let metrics = timeout(PATIENCE, metrics(address)).await.ok()?.ok()?;
    let callers: Vec<&str> = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("weft_plaintext_callers_total{address=\"")?.split('"').next())
        .collect();
    Some(if callers.is_empty() {
        Finding::shown(subject, format!("the sidecar at {address} met no plaintext caller since it started"))
    } else {
        let detail = format!(
            "it would refuse {}, who called the sidecar at {address} in plaintext",
            callers.join(", ")
        );
        Finding::unknown(subject, detail)
    })
}

async fn metrics(address: SocketAddr) -> io::Result<String> {
    let mut stream: TcpStream = net::dial(address).await?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: sidecar\r\nconnection: close\r\n\r\n").await?;
    let mut text = String::new();
    stream.take(MOST_METRICS).read_to_string(&mut text).await?;
    Ok(text)
}

/// Far more than any sidecar exposes.
const MOST_METRICS: u64 = 16 * 1024 * 1024;
