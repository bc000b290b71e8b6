//! The command of `exec`: its namespace, the sockets that come out of it, its signals and its end.

use std::{ffi::OsString, path::PathBuf, sync::Arc};

use anyhow::{Context, Result};

use crate::{
    config::Config,
    connect::Dialer,
    redirect::{Backend, Listeners, Namespace, NamespaceSettings},
};

/// Makes the namespace. The command runs when the sidecar is ready.
pub(super) fn start(words: &[OsString], settings: &NamespaceSettings) -> Result<(Arc<Namespace>, Listeners)> {
    let (namespace, listeners) = Namespace::start(words, settings)
        .context("cannot make a network namespace for the command; `weft-sidecar check` finds out why")?;
    Ok((Arc::new(namespace), listeners))
}

pub(super) fn settings(config: &Config) -> Result<NamespaceSettings> {
    Ok(NamespaceSettings {
        program: program()?,
        workers: config.limits.workers,
        outbound_port: config.ports.outbound,
        dns_port: config.ports.dns,
        ipv6: true,
        backend: Backend::default(),
        upstreams: config.upstreams.iter().map(|upstream| upstream.listen).collect(),
        ..NamespaceSettings::default()
    })
}

/// This program, also after its file was replaced.
fn program() -> Result<PathBuf> {
    std::env::current_exe().context("cannot find this program's own file")
}

/// Sockets to the app come out of its namespace.
pub(super) fn dialer(namespace: &Arc<Namespace>) -> Dialer {
    let namespace = namespace.clone();
    Dialer::Handed(Arc::new(move |is_ipv6| {
        let namespace = namespace.clone();
        Box::pin(async move { namespace.app_socket(is_ipv6).await })
    }))
}
